"""The content digest of a conversion, from the digests that it makes anyway: nothing is read or hashed again.

In: a plan and its digests. Out: what the manifest says of what is held, or None. It never guesses: an expert's gate, up and
down have to stand by themselves, axes (out, in), among what was written or among what it was made from.

The rule is that of `convert.verifier.content`, with xxh3-128 in the place of sha256: against accidents, and below no signature.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xxhash import xxh3_128

from convert.commit.manifest import SOURCE, Digest
from convert.errors import UsageError
from convert.options import Choices
from convert.planning.planner import Plan
from convert.planning.targets import OTHER, Target
from layouts.disk.written import quoted
from layouts.language.layout import ROLES
from layouts.language.slots import Index
from layouts.language.template import Template
from layouts.tensors import itemsize

FORM = "moe-content-xxh3-1"
"""The first line of what is hashed; another rule has another one."""
_WORDS: Mapping[str, Sequence[str]] = {"wi": ("gate", "up"), "wo": ("down",)}
_OUT_IN: Mapping[str, str] = {"wi": "n k", "wo": "k n"}
"""How a slice is stored whose bytes are hashed as they are."""
TERMS = "the names and axes of Hugging Face"


def line_of(name: str | list[Any], dtype: str, shape: Sequence[int], digest: str) -> str:
    """What is hashed of one logical tensor."""
    return _text([name, dtype, shape, digest])


def digest_of(lines: Iterable[str]) -> str:
    """Of all of them, xxh3-128 in hex."""
    whole = xxh3_128(f"{FORM}\n".encode())
    for line in sorted(lines):
        whole.update(f"{line}\n".encode())
    return whole.hexdigest()


def content_of(plan: Plan, digests: Mapping[str, Digest]) -> dict[str, Any] | None:
    """What a Hugging Face output holds that was made of Hugging Face.

    None where a slice has no digest of its own, or values are computed.
    """
    if plan.computed or plan.merging or plan.format != "hf" or any(first.role == OTHER for first, _ in plan.targets.forms):
        return None
    lines, nbytes = list[str](), 0
    known: dict[tuple[int, str], _Slices | None] = {}
    for target in plan.targets:
        spec = target.spec
        if target.role not in ROLES:
            if not isinstance(found := digests.get(spec.name), str):
                return None
            lines.append(line_of(spec.name, spec.dtype, spec.shape, found))
            nbytes += spec.nbytes
            continue
        if (way := (id(target.way), spec.dtype)) not in known:
            known[way] = _slices(target)
        if (slices := known[way]) is None:
            return None
        for each in slices.named(target):
            if not isinstance(found := digests.get(each[0]), str):
                return None
            lines.append(slices.line(target.index, *each[1:], found))
            nbytes += slices.nbytes
    return {"model": {"xxh3": digest_of(lines), "tensors": len(lines), "bytes": nbytes}, "state": None, "terms": TERMS}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slices:
    """What is the same for all experts' slices of a way: there may be 100,000 of them, and a few hundred ways.

    `names` are those of the sources that have their digests, along `spans`; None where each target is a slice itself.
    """

    names: Template | None
    spans: Mapping[str, range]
    words: Sequence[str]
    rest: str
    part: str
    nbytes: int
    places: dict[tuple[Any, ...], str]

    def named(self, target: Target) -> Iterator[tuple[str, Any, Any]]:
        """Under which name the digest of each slice is, and which expert, and gate or up, it is of."""
        index = target.index
        if self.names is None:
            yield target.spec.name, index["e"], index.get("g", 0)
            return
        axes = [self.spans.get(axis) or (index.get(axis, 0),) for axis in ("e", "g")]
        for name, (e, g) in zip(self.names.names(index, self.spans), itertools.product(*axes), strict=True):
            yield SOURCE + name, e, g

    def line(self, index: Index, e: int, g: int, digest: str) -> str:
        """What `line_of` makes of a slice."""
        at = index.get("path", ""), index.get("l"), *([index["kind"]] if "kind" in index else [])
        if (place := self.places.get(at)) is None:
            place = self.places[at] = _text(at)
        return f"[[{place},{e},{self.words[g]},{self.part}],{self.rest},{quoted(digest)}]"


def _slices(target: Target) -> _Slices | None:
    """What the slices of a target, and of all of its way, have in common; None if they have no digests of their own."""
    role, part, spec = target.role, target.part, target.spec
    written = "e" in target.target.key.slots
    side, sizes = (target.target, target.sizes) if written else (target.source, target.source_sizes)
    words = _WORDS[role]
    if not set("eg"[: len(words)]) <= set(side.key.slots) or not _is_plain(target, side.pattern.text):
        return None
    shape = side.pattern.shape(sizes)
    return _Slices(
        names=None if written else side.key,
        spans={} if written else {axis: range(sizes[axis]) for axis in ("e", "g") if axis in side.key.slots},
        words=[_text(word) for word in words],
        rest=f"{_text(spec.dtype)},{_text(shape)}",
        part=_text(part),
        nbytes=math.prod(shape) * itemsize(spec.dtype),
        places={},
    )


def _text(found: Any) -> str:
    return json.dumps(found, separators=(",", ":"))


def _is_plain(target: Target, pattern: str) -> bool:
    """Whether a slice is stored as it is hashed: (out, in), or with at most one axis."""
    return pattern == _OUT_IN[target.role] or (bool(target.part) and len(pattern.split()) <= 1 and "(" not in pattern)


def check_content(plan: Plan, choices: Choices) -> None:
    """See that the output is to hold what the input holds, if the digest of that is asked for.

    Raises:
        UsageError: it is not.
    """
    rule = plan.computed or choices.compute  # also where originals, or what is exact, come back as they were
    if rule or choices.drop_mtp:
        why = f"values are computed ({rule})" if rule else "--drop-mtp leaves out tensors"
        raise UsageError(f"--content: {why}, so the output holds another content than the input")
