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
from typing import Any

from xxhash import xxh3_128

from convert.commit.manifest import SOURCE, Digest
from convert.planning.planner import Plan
from convert.planning.targets import OTHER, Target
from layouts.language.layout import ROLES
from layouts.tensors import itemsize

FORM = "moe-content-xxh3-1"
"""The first line of what is hashed; another rule has another one."""
_WORDS: Mapping[str, Sequence[str]] = {"wi": ("gate", "up"), "wo": ("down",)}
_OUT_IN: Mapping[str, str] = {"wi": "n k", "wo": "k n"}
"""How a slice is stored whose bytes are hashed as they are."""
TERMS = "the names and axes of Hugging Face"


def line_of(name: str | list[Any], dtype: str, shape: Sequence[int], digest: str) -> str:
    """What is hashed of one logical tensor."""
    return json.dumps([name, dtype, shape, digest], separators=(",", ":"))


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
    if plan.computed or plan.merging or plan.format != "hf" or any(target.role == OTHER for target in plan.targets):
        return None
    lines, nbytes = [], 0
    for target in plan.targets:
        for found in _logical(target, digests):
            if found is None:
                return None
            lines.append(found[0])
            nbytes += found[1]
    return {"model": {"xxh3": digest_of(lines), "tensors": len(lines), "bytes": nbytes}, "state": None, "terms": TERMS}


def _logical(target: Target, digests: Mapping[str, Digest]) -> Iterator[tuple[str, int] | None]:
    """A line for each logical tensor of a target, and its bytes; None for one that has no digest."""
    spec, role = target.spec, target.role
    if role not in ROLES:
        found = digests.get(spec.name)
        yield (line_of(spec.name, spec.dtype, spec.shape, found), spec.nbytes) if isinstance(found, str) else None
        return
    written = "e" in target.target.key.slots
    side, sizes = (target.target, target.sizes) if written else (target.source, target.source_sizes)
    slots = {"e", "g"} if role == "wi" else {"e"}
    if not slots <= set(side.key.slots) or not _is_plain(target, side.pattern.text):
        yield None
        return
    free = [slot for slot in ("e", "g") if slot in side.key.slots and not (written and slot in target.index)]
    shape = side.pattern.shape(sizes)
    nbytes = math.prod(shape) * itemsize(spec.dtype)
    for point in itertools.product(*(range(sizes[slot]) for slot in free)):
        at: dict[str, Any] = {**target.index, **dict(zip(free, point, strict=True))}
        found = digests.get(spec.name if written else SOURCE + side.key.render(at))
        place = [at.get("path", ""), at.get("l"), *([at["kind"]] if "kind" in at else [])]
        name = [place, at["e"], _WORDS[role][at["g"] if role == "wi" else 0], target.part]
        yield (line_of(name, spec.dtype, shape, found), nbytes) if isinstance(found, str) else None


def _is_plain(target: Target, pattern: str) -> bool:
    """Whether a slice is stored as it is hashed: (out, in), or with at most one axis."""
    return pattern == _OUT_IN[target.role] or (bool(target.part) and len(pattern.split()) <= 1 and "(" not in pattern)
