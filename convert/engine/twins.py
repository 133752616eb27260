"""See that tensors hold what they have to, where others stand for them: twins, ones, and originals of computed tensors.

In: names, the open input. Out: nothing, a name, or an error. It runs before anything is written.

DeepSeek's MTP block is published with copies of the embedding and of the head; MaxText's block uses those of the model. To take
their equality for granted would drop a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import xxhash

from convert.commit.recorded import load
from convert.errors import InputError, PlanError
from convert.options.values import in_units
from convert.planning.across.computed import kept_bytes, originals_of
from convert.planning.planner import Plan
from layouts.checkpoint import FORMATS
from layouts.computing import NOTHING, OriginalsReader, Values, computing, ones, open_originals
from layouts.language.pattern import strips
from layouts.reader import Reader, ReadLimits
from layouts.side_files import ORIGINALS
from layouts.windows import Windows

_STRIP = 4 << 20
"""Elements that are compared at a time."""
_READ = ReadLimits(cache=64 << 20, stream=64 << 20, streams=1)
"""What reading arrays for it may hold."""


def compare_twins(twins: Iterable[tuple[str, str]], reader: Reader) -> None:
    """Compare the bytes of each pair.

    Raises:
        PlanError: they differ, so that one would be lost.
    """
    for one, other in twins:
        first, second = reader.tensors[one], reader.tensors[other]
        same = (first.dtype, first.shape) == (second.dtype, second.shape)
        if not (same and all(_equal(reader, one, other, part) for part in strips(first.shape, _STRIP))):
            raise PlanError(
                f"{reader.path}: {one} (in {reader.where(one)}) is not what {other} is, and MaxText has one tensor for both; "
                f"--drop-mtp leaves out the block that has it"
            )


def check_exact(plan: Plan, reader: Reader) -> None:
    """See that the other format has each value that is converted, and that what are to be ones are ones.

    Raises:
        InputError: it has not, or they are not: nobody could tell on the way back, or something would be dropped.
    """
    if plan.values.types or plan.values.ones:
        reader.hold(_READ, Windows())
    for name in (*plan.values.types, *plan.values.ones):
        spec = reader.tensors[name]
        for part in strips(spec.shape, _STRIP):
            block = reader.read(name, part)  # which refuses what cannot be converted
            if name in plan.values.ones and not np.array_equal(block, ones(block.shape, spec.dtype)):
                raise InputError(
                    f"{reader.path}: {name} (in {reader.where(name)}) is not all ones, and no checkpoint of Hugging Face has "
                    f"a place for it; what it was trained or changed to would be lost"
                )


def _equal(reader: Reader, one: str, other: str, part: tuple[slice, ...]) -> bool:
    return np.array_equal(reader.read(one, part), reader.read(other, part))


def with_computed(plan: Plan, reader: Reader) -> tuple[Plan, Reader]:
    """A plan with the reader of what it computes; on the way back of the originals instead, where they are kept and fit.

    Raises:
        InputError: what is kept is not what was written.
    """
    if plan.exact and not FORMATS[plan.format].chunked:
        said = f"values are what they were before they were computed, bit for bit ({plan.computed})"
        back = replace(plan, computed=None, computed_kinds=(), remarks=(*plan.remarks, said))
        return back, computing(reader, plan.values)
    if FORMATS[plan.format].chunked or not plan.values.factors:
        kept = originals_of(plan)
        size, where = in_units(kept_bytes(plan)), f"kept in {ORIGINALS} for the way back"
        said = f"the originals of computed values are {where}: {len(kept)} tensors, {size}"
        plan = replace(plan, remarks=(*plan.remarks, said)) if kept else plan
        return plan, computing(reader, plan.values)
    originals, why = open_originals(reader), f"no originals are kept ({ORIGINALS})"
    if originals is not None:
        try:
            why = _unlike(reader, originals, plan.values.factors)
        except BaseException:
            originals.close()
            raise
        if not why:
            said = f"values are not computed back: of {ORIGINALS} the rule makes all that the tree has of them, so it is taken"
            back = replace(plan, computed=None, computed_kinds=(), values=NOTHING, remarks=(*plan.remarks, said))
            return back, OriginalsReader(inner=reader, kept=originals, names=frozenset(plan.values.factors))
        originals.close()
    said = f"values are computed back, and bits may not come back: {why}"
    return replace(plan, remarks=(*plan.remarks, said)), computing(reader, plan.values)


def _unlike(tree: Reader, kept: Reader, factors: Mapping[str, float]) -> str:
    """Why some tensor of the tree is not, to the bit, what the rule makes of its original; nothing if all are.

    `factors` are those by which the tree's values are multiplied on the way back. What is kept is compared with the manifest's
    digests, too: the rule makes one of some neighbours.

    Raises:
        InputError: what is kept is not what was written, or is more than that.
    """
    if odd := kept.tensors.keys() - factors.keys():
        raise InputError(
            f"{tree.path / ORIGINALS}: it holds {min(odd)}, which is not computed; restore the file, or remove it to have "
            f"values computed"
        )
    found = load(tree.path)
    digests = {name: entry.digest for name, entry in found.originals.items()} if found else {}
    again = computing(kept, Values(factors={name: 1 / factor for name, factor in factors.items()}))
    tree.hold(_READ, Windows())
    for name in factors:
        if name not in kept.tensors:
            return f"{ORIGINALS} has no original of {name}"
        digest, same = xxhash.xxh3_128(), True
        for part in strips(kept.tensors[name].shape, _STRIP):
            digest.update(np.ascontiguousarray(kept.read(name, part)).data)
            same = same and np.array_equal(again.read(name, part), tree.read(name, part))
        if name in digests and digest.hexdigest() != digests[name]:
            where = f"{tree.path / ORIGINALS}: {name}"
            raise InputError(f"{where} is not what was written; restore the file, or remove it to have values computed")
        if not same:
            return f"{name} is not what the rule makes of its original in {ORIGINALS}; it was changed since"
    return ""
