"""Run a verification again with bits flipped in memory: of an expert, of LoRA, of another tensor; and say who saw them.

In: what was compared, and how. Out: `Trial`s. It never writes.

It is the very same verification, narrowed down to one layer and one expert; only the reader is another one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from convert.options import Verification
from convert.verifier.bits.logical import Block, blocks
from convert.verifier.content.lora_blocks import lora_blocks
from convert.verifier.content.sides import lines_of
from convert.verifier.control.altered import AlteredReader, Flip
from convert.verifier.control.choice import of_expert, of_lora, of_other, told
from convert.verifier.sides import described, said_alone
from convert.verifier.verdict import DIFFERENT, EQUAL, NOT_RUN, Trial, Verdict
from layouts.matching.candidates import record_of
from layouts.matching.describe import Description
from layouts.reader import Reader, is_chunked

COMPUTED = ("identity", "gemm", "gradients", "layer", "mesh")
"""The levels that run experts."""
Compare = Callable[[Reader, Reader, Verification], Verdict]
Sides = tuple[Reader, Reader]
_Asked = tuple[Flip, list[str], dict[str, str]]
"""A bit, the levels that must see it, and those that need not, each with the reason."""


_UNEQUAL = "it is not equal, and nothing can be told beside a difference"


def _untried(level: str, why: str) -> Trial:
    return Trial(flipped="nothing", seen=(), untried={level: why})


def tried(verdict: Verdict, sides: Sides, options: Verification, compare: Compare) -> Verdict:
    """Flip a bit of an expert, one of LoRA and one of another tensor of one side, `compare` again, and look who sees it.

    Asked are the levels that found the two equal, since others are able to find a difference as it is. It is the
    side that is not decoded in chunks, if there is one, else the second.
    """
    states = {level.name: level.state for level in verdict.levels}
    equal = [name for name, state in states.items() if state == EQUAL]
    if states.get("exact", EQUAL) != EQUAL:
        return replace(verdict, self_test=(_untried("exact", _UNEQUAL),))
    which = 0 if is_chunked(sides[1]) and not is_chunked(sides[0]) else 1
    reader = sides[which]
    said, beside = said_alone(options, which), [record_of(sides[1 - which])]
    description = described(reader, said, beside)
    asked, scope = _asked(reader, description, beside, equal, options)
    lacking = []
    if "delta" in states and not any("delta" in must for _, must, _ in asked):
        lacking = [_untried("delta", "B @ A is zero everywhere" if "delta" in equal else _UNEQUAL)]
    if not asked:
        return replace(verdict, self_test=tuple(lacking))
    altered, narrow = AlteredReader(inner=reader, flips=tuple(flip for flip, *_ in asked)), replace(scope, content=False)
    again = compare(altered, sides[1], narrow) if which == 0 else compare(sides[0], altered, narrow)
    trials = [_trial(told(reader, flip), must, again, idle) for flip, must, idle in asked]
    if "content" in equal:
        trials = [
            trial if must == ["others"] else _with_content(trial, sides, which, flip, said)
            for trial, (flip, must, _) in zip(trials, asked, strict=True)
        ]
    return replace(verdict, self_test=(*trials, *lacking))


def _asked(
    reader: Reader, description: Description, beside: list[Mapping[str, Any]], equal: list[str], options: Verification
) -> tuple[list[_Asked], Verification]:
    """The bits to flip, and the options narrowed down to the layer of one of them, to its expert and to one beside.

    Small experts that follow one another are compared together: an expert alone would show nothing of that.
    """
    asked, near = list[_Asked](), ""
    if "exact" in equal:
        chosen = _chosen(reader, description, options)
        asked.append(_of_expert(chosen, equal))
        near = asked[0][0].name
        options = replace(options, layers=frozenset({chosen.block.number}), experts=frozenset({chosen.e, *chosen.beside}))
    if "delta" in equal and (flip := of_lora(lora_blocks(reader, description, beside).values())):
        asked.append((flip, ["delta"], {}))
    names = list(description.verbatim)
    apart = {name: _shared(name, near) for name in names}  # not the layer's own router, which is closest
    other = of_other(reader, [name for name in names if apart[name] == min(apart.values())])
    if other and "others" in equal:
        asked.append((other, ["others"], {}))
    return asked, options


def _of_expert(chosen: _Chosen, equal: list[str]) -> _Asked:
    flip, matters = of_expert(chosen.block, chosen.e, chosen.rows)
    must = [name for name in equal if name == "exact" or (matters and name.partition("/")[0] in COMPUTED)]
    idle = {} if matters else {name: "no output depends on it" for name in equal if name.partition("/")[0] in COMPUTED}
    return flip, must, idle


def _shared(name: str, other: str) -> int:
    """How many steps of the way to two tensors are the same."""
    pairs = zip(name.split("."), other.split("."), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda steps: steps[0] == steps[1], pairs))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chosen:
    """An expert of a MoE layer, one `beside` it, if there is one, and the rows of `wo` that one-hot tokens read of it.

    These are None where no GEMM runs.
    """

    block: Block
    e: int
    beside: frozenset[int]
    rows: NDArray[Any] | None


def _chosen(reader: Reader, description: Description, options: Verification) -> _Chosen:
    """The first layer in the scope whose experts run, and the expert to which its router sends most tokens."""
    wanted = options.layers
    layers = [b for b in blocks(reader, description).values() if wanted is None or b.number in wanted]
    every = {b.label: [e for e in range(b.experts) if options.experts is None or e in options.experts] for b in layers}
    layers = [block for block in layers if every[block.label]]

    def choose(block: Block, e: int, rows: NDArray[Any] | None) -> _Chosen:
        near = [other for other in (e + 1, e - 1) if other in every[block.label]]
        return _Chosen(block=block, e=e, beside=frozenset(near[:1]), rows=rows)

    plain = choose(layers[0], every[layers[0].label][0], None)
    if not options.gemm:
        return plain
    from convert.verifier.gemms.operands import can_run
    from convert.verifier.gemms.routing import routing_of
    from convert.verifier.gemms.rows import rows_of
    from convert.verifier.gemms.whole import routed, tokens_for

    runs = next(filter(can_run, layers), None)
    if runs is None:
        return plain
    routing = routing_of(reader.config, runs.experts)
    sizes = routed(runs, routing, tokens_for(runs, options.tokens)).sizes
    e = max(every[runs.label], key=lambda e: int(sizes[e]))
    return choose(runs, e, rows_of(runs, options.tokens)["wo"])


def _trial(flipped: str, must: Iterable[str], again: Verdict, untried: dict[str, str]) -> Trial:
    levels = {level.name: level for level in again.levels}
    states = {name: levels[name].state if name in levels else EQUAL for name in must}
    return Trial(
        flipped=flipped,
        seen=tuple(name for name, state in states.items() if state == DIFFERENT),
        unseen=tuple(name for name, state in states.items() if state == EQUAL),
        untried=untried | {name: levels[name].why for name, state in states.items() if state == NOT_RUN},
    )


def _with_content(trial: Trial, sides: Sides, which: int, flip: Flip, options: Verification) -> Trial:
    """Whether the line of the list that this bit is part of becomes another one."""
    altered = AlteredReader(inner=sides[which], flips=(flip,))
    found = [
        lines_of(reader, sides[1 - which], lambda unit: flip.name in unit.arrays and flip.within(unit.slices), options)
        for reader in (sides[which], altered)
    ]
    seen = bool(found[0]) and found[0] != found[1]
    where = {"seen": (*trial.seen, "content")} if seen else {"unseen": (*trial.unseen, "content")}
    return replace(trial, **where)  # type: ignore[arg-type]
