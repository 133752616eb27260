"""Run the probes over all MoE layers of two checkpoints, a few experts at a time, with every backend that was asked for.

In: the layers of two checkpoints. Out: the levels of the probes. It never holds more than a few experts.

Where memory allows, weights of the next call are read while those of this one are run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from convert.commit.processes import ALONE, Processes
from convert.progress import Progress, begin, ignore, say
from convert.verifier.bits.logical import Block, Scope, Sides, pair
from convert.verifier.bits.order import by_place, places_of
from convert.verifier.gemms.backends import BACKENDS, DEFAULT, Backend
from convert.verifier.gemms.calls import Fit, calls, fit, needed, values, weights_of
from convert.verifier.gemms.findings import Findings
from convert.verifier.gemms.operands import Weights, can_run, form_of
from convert.verifier.gemms.probes import Setting
from convert.verifier.gemms.routing import activation_of, routing_of
from convert.verifier.gemms.rows import ONE_HOT
from convert.verifier.gemms.whole import TOKENS, Routed, routed, tokens_for
from convert.verifier.share import joined
from convert.verifier.verdict import Level

if TYPE_CHECKING:
    from jax.sharding import Mesh

GRADIENTS = 8
"""Experts of the first and of the last layer that go through the gradients, which cost most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """How outputs are computed: backends, and why others are left out; a mesh; the model's `config.json`; bytes of memory.

    With `one_router` tokens go to the experts of the first checkpoint's router in both, where the other has its own elsewhere.
    """

    backends: Sequence[Backend] = (BACKENDS[DEFAULT],)
    missing: Sequence[str] = ()
    mesh: Mesh | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    memory: int = 2 << 30
    one_router: bool = False

    @property
    def ways(self) -> int:
        """Devices among which the experts of a call divide."""
        return int(self.mesh.shape["expert"]) if self.mesh else 1


def compare_outputs(
    a: Mapping[str, Block],
    b: Mapping[str, Block],
    scope: Scope,
    how: How,
    broken: Collection[str] = (),
    progress: Progress = ignore,
    processes: Processes = ALONE,
) -> tuple[Level, ...]:
    """All probes of every expert of every MoE layer that a GEMM takes; several processes run a part of the layers each.

    Layers that are `broken` cannot be read in logical axes, and are left to the level that said so.
    """
    activation = activation_of(how.config)
    found = [
        Findings(
            setting=Setting(backend=backend, activation=activation, tokens=scope.tokens, always=scope.always), mesh=how.mesh
        )
        for backend in how.backends
    ]
    pairs = list(pair(a, b))
    sound = [sides for sides in pairs if all(map(can_run, sides)) and sides[0].label not in broken]
    runnable = [(sides, allowed) for sides in sound if (allowed := fit(sides, how.memory, how.ways))]
    if not runnable:
        return tuple(_none_ran(pairs, how, broken))
    own = runnable[processes.stretch([sides[0].experts * values(sides[0]) for sides, _ in runnable])]
    ends = {sides[0].label: GRADIENTS for sides, _ in (*runnable[:1], *runnable[-1:])}
    numbers = {sides[0].label: at for at, (sides, _) in enumerate(runnable, start=1)}
    mine = sorted(_probe_all(own, ends, numbers, scope, how, found, progress))
    routers = frozenset(joined(processes, mine)[0])
    for each in found:
        each.join(processes)
    left = len(pairs) - len(runnable)
    levels: list[Level] = []
    for number, each in enumerate(found):
        texts = _covered([sides for sides, _ in runnable], how, routers, each.setting)
        texts["gemm"] += f"; not {left} other layers: {_why(pairs, how, broken)}" if left else ""
        texts["layer"] += "; only through the experts that are run with those asked for" if scope.experts else ""
        levels += each.levels(texts, f"/{each.setting.backend.name}" if number else "")
    return (*levels, *_missing(how))


def _missing(how: How) -> Iterator[Level]:
    """The backends of `all` that cannot run here: nobody asked for them by name."""
    names = [name for name in BACKENDS if name not in {backend.name for backend in how.backends}]
    for name, why in zip(names, how.missing, strict=False):
        yield Level(name=f"gemm/{name}", covered="", compared=0, not_run=why, asked=False)


def _none_ran(pairs: Sequence[Sides], how: How, broken: Collection[str]) -> Iterator[Level]:
    """The levels that the probes would have been."""
    names = ["identity", "gemm", *(["gradients"] if how.backends[0].traced else []), *(["mesh"] if how.mesh else []), "layer"]
    yield from (Level(name=name, covered="", compared=0, not_run=_why(pairs, how, broken)) for name in names)


def _why(pairs: Sequence[Sides], how: How, broken: Collection[str]) -> str:
    """Why layers go through no GEMM."""
    reasons = []
    if any(sides[0].label in broken for sides in pairs):
        reasons.append("there is more than zeros in the padding")
    if any(not all(map(can_run, sides)) for sides in pairs):
        reasons.append("no GEMM here takes the type of these experts, whose bits alone were compared")
    large = [needed(sides, how.ways) for sides in pairs if all(map(can_run, sides)) and not fit(sides, how.memory, how.ways)]
    if large:
        reasons.append(f"an expert takes {-(-max(large) >> 20):,} MiB, and --memory is {how.memory >> 20:,} MiB")
    return " and ".join(reasons) or "no MoE layer is there on both sides with the same sizes"


def _routed(sides: Sides, scope: Scope, how: How) -> list[Routed]:
    asked = sides[:1] if how.one_router else sides
    to = [routed(block, routing_of(how.config, block.experts), tokens_for(block, scope.tokens)) for block in asked]
    return to * (len(sides) // len(to))


def _probe_all(
    runnable: Sequence[tuple[Sides, Fit]],
    ends: dict[str, int],
    number: Mapping[str, int],
    scope: Scope,
    how: How,
    found: Sequence[Findings],
    progress: Progress,
) -> frozenset[str]:
    """Run the probes, and give what routers there were. A layer is begun and ended as its experts come up.

    `ends` are the layers in which so many experts go through what is only done there; `number` says which layer of
    all each one is.
    """
    every = [
        (sides, experts, allowed)
        for sides, allowed in runnable
        for experts in calls(sides, allowed.experts, how.ways)
        if scope.of(experts)
    ]
    every = by_place(every, lambda call: places_of(call[0], call[1].start))
    left = Counter(sides[0].label for sides, *_ in every)
    begin(progress, "GEMMs", sum(len(experts) * values(sides[0]) * 2 for sides, experts, _ in every))
    routers: set[str] = set()
    begun: dict[str, list[Routed]] = {}
    weights = weights_of((call[:2] for call in every), ahead=all(allowed.ahead for _, allowed in runnable))
    for sides, experts, allowed in every:
        one, label = sides[0], sides[0].label
        say(progress, f"layer {number[label]}/{len(number)}")
        if label not in begun:
            begun[label] = _routed(sides, scope, how)
            routers |= {to.router for to in begun[label]}
            for each in found:
                each.begin(one, begun[label])
        end = ends.get(label, 0) > 0
        _probe(sides, begun[label], experts, weights, found, allowed, end)
        ends[label] = ends.get(label, 0) - len(experts)
        progress(len(experts) * values(one) * 2)
        left[label] -= 1
        if not left[label]:
            del begun[label]
            for each in found:
                each.end(one)
    return frozenset(routers)


def _probe(
    sides: Sides,
    to: Sequence[Routed],
    experts: range,
    weights: Iterator[Weights],
    found: Sequence[Findings],
    allowed: Fit,
    end: bool,
) -> None:
    """One call: each side in its turn, and what needs both only where memory holds them."""
    together: list[Weights] = []
    for each in found:
        each.enter(sides[0], experts)
    for side, block in enumerate(sides):
        loaded = next(weights)
        for each in found:
            each.ask(block, side, loaded, to[side])
        together += [loaded] if allowed.together and (end or found[0].mesh) else []
        del loaded
    for each in found:
        each.compare(sides[0], to)
        each.compare_together(sides, together, end)


def _covered(runnable: Sequence[Sides], how: How, routers: Collection[str], setting: Setting) -> dict[str, str]:
    """What each level looks at, in words."""
    forms = sorted({f"'{form_of(one)}' against '{form_of(other)}'" for one, other in runnable})
    routings = sorted({str(routing_of(how.config, one.experts)) for one, _ in runnable})
    drawn = " and ".join(sorted(routers))
    shape = dict(how.mesh.shape) if how.mesh else {}
    return {
        "identity": f"{ONE_HOT * setting.tokens} one-hot tokens for each expert and projection read its weights back exactly",
        "gemm": f"grouped GEMM ({setting.backend.name}): {' and '.join(forms)}",
        "gradients": f"of gate, up, down and the input, in {GRADIENTS} experts of the first and the last MoE layer",
        "layer": f"{TOKENS * setting.tokens} tokens through route ({' and '.join(routings)}; {drawn}), gate and up, "
        f"{setting.activation}, down, unpermute",
        "mesh": "the experts on a mesh of " + " x ".join(f"{size} ({axis})" for axis, size in shape.items()) + " devices",
    }
