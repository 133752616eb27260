"""Prove that two LoRA adapters change every expert by the same delta W = scale * B @ A, in whatever forms they are stored.

In: two open adapters. Out: a verdict. It never writes, and takes A and B apart by its own code: per expert, with plain slices.

Level `delta` computes both delta W of each expert in float64. Level `exact` says more: A and scale * B are the same numbers
once ranks that are zeros are left out, so that no product has to be compared; where they are others, `delta` alone decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from convert.commit.processes import ALONE, Processes
from convert.errors import PlanError, UsageError, readable, too_little
from convert.options import Verification
from convert.options.evidence import known_of
from convert.progress import Progress, begin, ignore
from convert.verifier.adapters.beside import compare_others, compare_settings
from convert.verifier.adapters.factors import Side, Stored, difference, held, places_of, same
from convert.verifier.files.beside import compare_adapter_files
from convert.verifier.verdict import Level, Verdict
from layouts.adapters.describe import describe
from layouts.adapters.opening import config_of, open_adapter
from layouts.adapters.settings import CONFIG, Settings
from layouts.adapters.units import Block
from layouts.adapters.writers import interleaved, unknown_turns
from layouts.checkpoint import is_adapter
from layouts.reader import Reader

BASE, _LEAST = 96 << 20, 8 << 20
"""Bytes that the process needs besides what it compares, and for products, at least."""
_NOT = (
    *("layers", "experts", "mesh", "trust_digests", "content", "self_test"),
    *("scan_axis", "source_layout", "source_layout_b", "family_b"),
)
"""Options that have nothing to say of adapters."""


def verify_adapters(
    a: Path, b: Path, progress: Progress | None, options: Verification, processes: Processes = ALONE
) -> Verdict:
    """Compare two adapters.

    Raises:
        InputError, PlanError: one of them cannot be read, or nobody says in which form it is.
        UsageError: one of them is a checkpoint, an option is for these, or `memory` is too little.
    """
    for path in (a, b):
        if not is_adapter(path):
            raise UsageError(f"{path} is no LoRA adapter, and the other one is; compare two of a kind")
    if processes.count > 1:
        raise UsageError("one process compares two adapters; leave out what is said of several")
    for name in _NOT:
        if getattr(options, name) is not None and getattr(options, name) is not False:
            raise UsageError(f"--{name.replace('_', '-')} is for checkpoints; adapters are compared as a whole")
    with readable(f"{a} against {b}"), closing(open_adapter(a)) as one, closing(open_adapter(b)) as other:
        left, right = _sides(one, other, options)
        levels = (
            *_compare_experts(left, right, progress or ignore, options.memory),
            compare_others(left, right),
            compare_settings(left, right),
            compare_adapter_files(one, other, (CONFIG,)),
        )
        return Verdict(subject=f"{a} against {b}", levels=levels, allow_not_run=options.allow_not_run)


def _sides(one: Reader, other: Reader, options: Verification) -> tuple[Side, Side]:
    found = []
    for reader in (one, other):
        config = config_of(reader.path)
        known = known_of(reader, config, reader.record or {}, options)
        found.append((reader, describe(reader, Settings.of(config, str(reader.path / CONFIG)), known)))
    families = {described.known.family for _, described in found} - {None}
    if len(families) > 1:
        raise PlanError(f"{one.path} is of {', of '.join(map(str, sorted(map(str, families))))}: these are not of one model")
    family = families.pop() if families else None
    stated = [(reader.record or {}).get("turns") for reader, _ in found]
    turns = interleaved(family) if family else next((each for each in stated if isinstance(each, bool)), None)
    if turns is None and len({described.form.fused for _, described in found}) > 1:
        raise PlanError(f"{one.path} against {other.path}: {unknown_turns(family)}")
    left, right = (Side(reader=reader, described=described, turns=bool(turns)) for reader, described in found)
    return left, right


def _room(left: Side, right: Side, memory: int) -> int:
    """Bytes for products, besides what is read of both adapters and the program itself.

    Raises:
        UsageError: there is too little.
    """
    most = sum(max((held(side, block) for block in side.described.blocks), default=0) for side in (left, right))
    if (room := memory - BASE - most) < _LEAST:
        least = BASE + most + _LEAST >> 20
        raise too_little(memory, f"to compare these adapters takes {least + 1} MiB")
    return room


def _compare_experts(left: Side, right: Side, progress: Progress, memory: int) -> tuple[Level, Level]:
    """Every projection of every expert, one at a time."""
    room = _room(left, right, memory)
    mine, others = ({_place(block.path): block for block in side.described.blocks} for side in (left, right))
    differ, moved, compared, trained = [], 0, 0, False
    nbytes = {place: sum(left.reader.tensors[name].nbytes for name in _names(block)) for place, block in mine.items()}
    begin(progress, "delta W of experts", sum(nbytes.values()))
    for place in dict.fromkeys((*mine, *others)):
        pair = [(Stored(side), places_of(at[place]) if place in at else {}) for side, at in ((left, mine), (right, others))]
        for key in dict.fromkeys((*pair[0][1], *pair[1][1])):
            one, other = (stored.factors(found[key]) if key in found else None for stored, found in pair)
            trained = trained or any(each is not None and each.b.size > 0 for each in (one, other))
            compared += 1
            if same(one, other):
                continue
            moved += 1
            if why := difference(one, other, room):
                projection, expert = key
                differ.append(f"{place}.experts, expert {expert}, {projection}: {why}")
        progress(nbytes.get(place, 0))
    covered = f"{compared} projections of experts in {len({*mine, *others})} blocks"
    nothing = "" if trained else "all B are zeros, so that every reading gives the same: nothing to tell apart"
    delta = Level(
        name="delta",
        covered=f"{covered}, scale * B @ A in float64",
        compared=compared,
        differences=tuple(differ),
        not_run=nothing,
    )
    others_than = f"{moved} projections have other factors; delta compares their products" if moved else nothing
    exact = Level(
        name="exact", covered=f"{covered}, A and scale * B to the bit", compared=compared, not_run=others_than, asked=False
    )
    return exact, delta


def _place(path: str) -> str:
    """Transformers 5 calls Mixtral's `block_sparse_moe` `mlp`."""
    return f"{path.removesuffix('block_sparse_moe')}mlp" if path.endswith(".block_sparse_moe") else path


def _names(block: Block | None) -> Iterator[str]:
    for unit in block.units.values() if block else ():
        yield from (*unit.names[0], *unit.names[1])
