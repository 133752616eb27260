"""What a manifest says, looked through: whoever reads `convert_manifest.json` may have been given it by anybody.

In: the directory of a checkpoint. Out: `Manifest`, all of whose parts have the types that they should have. It never opens a
file that a manifest names, and digests that leave out a part of a tensor are none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.commit.inventory import FileEntry
from convert.commit.manifest import MADE, NAME, SEAL, Digest, read, seal_of
from layouts.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """What a manifest says of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    digest: Digest

    def json(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        return {"dtype": self.dtype, "shape": list(self.shape), "xxh3_128": self.digest}


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A manifest that has been looked through: all of it has the types that it should have.

    `made` holds action, format, family, layout, record and computed; `input` is `identity.input_digest`'s.
    """

    made: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    sources: Mapping[str, Digest]
    """Of tensors of the input; whether they cover all of one, `check_spans` tells."""
    files: Mapping[str, FileEntry]
    input: str
    hashed: str | None
    headers: Mapping[str, str]
    """The digest of each shard's header."""
    content: Mapping[str, Any] | None
    """The digest of what the input held: by sha256 if asked for, by xxh3 where it cost nothing."""
    intact: bool | None
    """Whether its digest of itself is right; None if it has none."""
    originals: Mapping[str, TensorEntry]
    """The originals of computed tensors, which are kept beside the manifest."""
    tool: object
    """The version of this tool that wrote it, as it says."""


Load = Callable[[Path], Manifest | None]
"""`load`, or who keeps what it has given: a manifest may name 100,000 tensors."""


def load(path: Path) -> Manifest | None:
    """The manifest in a checkpoint's directory, if it has one, looked through.

    Raises:
        InputError: it is no manifest that this tool has written.
    """
    found = read(path)
    if found is None:
        return None
    where = f"{path / NAME}: not a manifest of this version of the tool"
    for key, kind in (("tensors", dict), ("files", dict), ("input", str)):
        if not isinstance(found.get(key), kind):
            raise InputError(f"{where}: {key!r} should be of type {kind.__name__}; convert again to have one")
    try:
        return Manifest(
            made={key: found.get(key) for key in MADE},
            tensors={name: _tensor(entry) for name, entry in found["tensors"].items()},
            sources={str(name): _digest(each) for name, each in found.get("sources", {}).items()},
            files={name: FileEntry.parse(entry) for name, entry in found["files"].items()},
            input=found["input"],
            hashed=found.get("hashed"),
            headers={str(name): str(digest) for name, digest in found.get("headers", {}).items()},
            content=_content(found.get("content")),
            intact=found[SEAL] == seal_of(found) if SEAL in found else None,
            originals={name: _tensor(entry) for name, entry in found.get("originals", {}).items()},
            tool=found.get("tool"),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: {error!r}; convert again to have one") from None


def _content(found: Any) -> Mapping[str, Any] | None:
    if found is None:
        return None
    digests = [found["model"], *([found["state"]] if found["state"] else [])]
    texts = [found["terms"], *(digest.get("sha256", digest.get("xxh3")) for digest in digests)]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("content that is no digest")
    return dict(found)


def _tensor(entry: Mapping[str, Any]) -> TensorEntry:
    dtype, shape, digest = entry["dtype"], tuple(entry["shape"]), entry["xxh3_128"]
    if not isinstance(dtype, str) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"a tensor of type {dtype!r} and shape {shape!r}")
    check_spans(_digest(digest), shape)
    return TensorEntry(dtype=dtype, shape=shape, digest=digest)


def _digest(found: Any) -> Digest:
    """A text, or one for each span.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(found, str) and not (isinstance(found, dict) and all(isinstance(each, str) for each in found.values())):
        raise ValueError(f"{found!r} is no digest")
    return found


def check_spans(digest: Digest, shape: tuple[int, ...]) -> None:
    """See that digests are of all of a tensor of this shape, without gaps: a digest of nothing would prove nothing.

    Raises:
        ValueError: they are not.
    """
    if isinstance(digest, str):
        return
    end = 0
    for span in map(span_of, digest):
        if span.start != end or not span:
            raise ValueError(f"digests of spans that do not follow one another: {span}")
        end = span.stop
    if not shape or end != shape[0]:
        raise ValueError(f"digests of {end} rows of a tensor of shape {shape}")


def span_of(text: str) -> range:
    """`4:8` as the range that it is.

    Raises:
        ValueError: it is none.
    """
    start, _, stop = text.partition(":")
    span = range(int(start), int(stop))
    if text != f"{span.start}:{span.stop}":
        raise ValueError(f"{text!r} is no span")
    return span


def spans_of(digest: Digest) -> Iterator[tuple[range | None, str]]:
    """Each span of the first dimension that has a digest of its own, with it; None for a whole tensor."""
    if isinstance(digest, str):
        yield None, digest
    else:
        yield from ((span_of(text), each) for text, each in digest.items())
