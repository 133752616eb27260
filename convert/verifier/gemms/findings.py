"""What the probes of one backend have met so far, and the levels of the verdict that come of it.

In: weights of some experts. Out: differences, errors, levels. It never reads a checkpoint.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from convert.commit.processes import Processes
from convert.verifier.bits.logical import Block, Sides
from convert.verifier.gemms import probes
from convert.verifier.gemms.backends import keeps_apart
from convert.verifier.gemms.calls import Call
from convert.verifier.gemms.operands import Weights
from convert.verifier.gemms.probes import Distance, Setting, distance, stored
from convert.verifier.gemms.rows import ask, most_of, room_for, rows_of
from convert.verifier.gemms.whole import Routed, add_experts, pieces
from convert.verifier.share import by_key, chained, merged
from convert.verifier.verdict import Level

if TYPE_CHECKING:
    from jax.sharding import Mesh

NOT_FINITE = "no output is a finite number, as with weights of random bits; so only the bits can be compared"
"""Why a GEMM that ran proves nothing: the checkpoint does not let it, and nobody can ask for more."""
Loaded = tuple[Weights, Weights]


TOO_LARGE = "--memory does not hold an expert of both sides for that"
"""Why a level that needs both sides in memory is left out, without having been asked for by name."""


_JOINED: Mapping[str, Callable[[list[Any]], Any]] = {
    "differences": by_key(chained),
    "errors": by_key(chained),
    "worst": by_key(lambda found: tuple(map(max, *found)) if len(found) > 1 else tuple(found[0])),
    "bounds": by_key(max),
    "compared": by_key(sum),
    "slopes": max,
    "unread": sum,
    "skipped": any,
    "large": any,
    "apart": lambda found: set(chained(found)),
}
"""What becomes of the findings of several processes, each with layers of its own."""


@dataclass(slots=True, kw_only=True)
class Findings:
    """Differences in words and largest errors, level by level; `mesh` is where the layer is run on many devices, too."""

    setting: Setting
    mesh: Mesh | None = None
    differences: dict[str, list[str]] = field(default_factory=dict)
    errors: dict[str, list[float]] = field(default_factory=dict)
    worst: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    apart: set[str] = field(default_factory=set)
    compared: Counter[str] = field(default_factory=Counter)
    slopes: float = 0.0
    """The largest difference of gradients."""
    unread: int = 0
    skipped: bool = False
    large: bool = False
    call: Call = field(default_factory=Call)
    routed: Counter[str] = field(default_factory=Counter)
    outputs: dict[str, list[NDArray[Any]]] = field(default_factory=dict)

    def enter(self, one: Block, experts: range) -> None:
        """A call begins: these experts of this layer, by its name on the first side."""
        self.call = Call(label=one.label, experts=experts)

    def ask(self, block: Block, side: int, weights: Weights, to: Routed) -> None:
        """Run all rows through one side's weights: those that read them back, random ones, and routed ones."""
        call, tokens = self.call, self.setting.tokens
        out, setting = self.outputs[call.label][side], self.setting
        first, *rest = pieces(to, call.experts, room_for(len(call.experts), tokens))
        rows = ask(block, call.experts, tokens, (first.x, first.sizes))
        most = most_of(block, len(call.experts), tokens)
        running = weights.read(rows.x, rows.hot, rows.sizes, setting.backend, setting.activation, most)
        call.wanted = call.wanted or stored(weights, rows_of(block, tokens))  # while that runs
        answers = probes.answered(running, rows)
        apart = keeps_apart(setting.backend.gmm, most if max(rows.sizes) <= most else 0)
        back = probes.identity(call.wanted, answers, weights, block, call.experts, call.unread, apart=apart)
        self._add("identity", back)
        first.add(out, answers.routed)
        add_experts(out, rest, weights, setting, (len(rows.x), most))
        call.answers.append(answers)

    def compare(self, one: Block, to: Sequence[Routed]) -> None:
        """Compare what both sides gave."""
        call = self.call
        self.unread += len(call.unread)
        self.compared["identity"] += len(call.experts) - len(call.unread)
        self.routed[one.label] += int(to[0].sizes[call.experts.start : call.experts.stop].sum())
        worst, problems = probes.outputs((call.answers[0], call.answers[1]), one, call.experts)
        self._add("gemm", problems, worst, one.groups["wi", ""].total("k"))
        self.errors.setdefault(one.label, []).extend(worst.relative.tolist())
        call.differ = bool(problems)

    def compare_together(self, sides: Sides, loaded: Sequence[Weights], end: bool) -> None:
        """What is only done at the `end`s, or on a mesh, with both sides in memory, if they are `loaded`."""
        if self.setting.backend.traced:
            self._add("gradients", ())
        if self.mesh is not None:
            self._add("mesh", ())
        if not loaded:
            self.large |= end or self.mesh is not None
            return
        both = loaded[0], loaded[1]
        if end and not self.call.differ:
            worst, problems = probes.skewed(*both, sides[0], self.call.experts, self.setting)
            self._add("gemm", problems, worst)
            self.call.differ = bool(problems)
        if end and self.setting.backend.traced:
            self._gradients(sides[0], both)
        if self.mesh is not None:
            self._on_mesh(self.mesh, sides, both)

    def _gradients(self, one: Block, loaded: Loaded) -> None:
        """Those of experts whose outputs differ anyway would say nothing new."""
        differ = self.call.differ and not self.setting.always
        self.skipped |= differ
        if not differ:
            rows: list[int] = []
            worst: list[float] = []
            self._add("gradients", probes.gradients(*loaded, one, self.call.experts, self.setting, rows, worst))
            self.slopes = max(self.slopes, *worst)
            self._allow("gradients", sum(one.groups["wi", ""].total(axis) for axis in "kn"))
            self.compared["gradients"] += sum(rows)

    def _on_mesh(self, devices: Mesh, sides: Sides, loaded: Loaded) -> None:
        from convert.verifier.gemms import mesh

        experts = self.call.experts
        if not self.setting.backend.traced:
            self.apart.add(f"JAX does not run {self.setting.backend.name}")
            return
        k, n = (sides[0].groups["wi", ""].total(axis) for axis in "kn")
        if why := mesh.why_not(devices, len(experts), n):
            self.apart.add(why)
            return
        x, groups = probes.tokens(experts, k, self.setting.tokens, (1, 2, 5))  # no expert goes without, unlooked at
        alone = loaded[0].run(x, groups, self.setting.backend, self.setting.activation)
        for block, weights in zip(sides, loaded, strict=True):
            out = mesh.run(x, weights, groups, devices, self.setting.backend, self.setting.activation)
            found = distance(alone, out, terms=k + n)
            bad = np.unique(np.repeat(experts, groups)[found.unequal])
            which = f"{block.label}, experts {', '.join(map(str, bad))}"
            self._add("mesh", [f"{which}: many devices and one differ"] if len(bad) else [], found, k + n)

    def begin(self, block: Block, to: Sequence[Routed]) -> None:
        """The outputs of a whole layer are summed up from here on."""
        self.outputs[block.label] = [np.zeros_like(each.x) for each in to]

    def end(self, block: Block) -> None:
        """Compare the outputs of a whole layer."""
        sums = sum(block.groups["wi", ""].total(axis) for axis in "kn")
        found = distance(*self.outputs.pop(block.label), terms=sums)
        most = found.relative.max(initial=0)
        bad = f"{block.label}: outputs of the whole MoE layer differ, by {most:.1e} of their norm"
        sent = self.routed.pop(block.label, 0)
        self._add("layer", [bad] if found.unequal.any() else [], found if sent else None, sums)

    def _allow(self, level: str, terms: int) -> None:
        self.bounds[level] = max(self.bounds.get(level, 0.0), probes.bound(terms))

    def _add(
        self, level: str, problems: Iterator[str] | Sequence[str], found: Distance | None = None, terms: int | None = None
    ) -> None:
        self.differences.setdefault(level, []).extend(problems)
        if terms is not None:
            self._allow(level, terms)
        if found is not None:
            now = (float(values.max(initial=0)) for values in (found.relative, found.delta, found.ulp))
            self.worst[level] = tuple(map(max, self.worst.get(level, (0.0, 0.0, 0.0)), now))  # type: ignore[assignment]
            self.compared[level] += int(found.finite.sum())

    def join(self, processes: Processes) -> None:
        """Add what other processes have met in their layers; afterwards all of them have the same."""
        if processes.count == 1:
            return
        own = {name: getattr(self, name) for name in _JOINED} | {"apart": sorted(self.apart)}
        for name, found in merged(processes, own, _JOINED).items():
            setattr(self, name, found)
        self.compared = Counter(self.compared)

    def levels(self, covered: Mapping[str, str], suffix: str) -> Iterator[Level]:
        """The levels that this backend ran, with what each covered."""
        for name, differences in self.differences.items():
            errors = (
                {layer: tuple(self.errors[layer]) for layer in sorted(self.errors, key=_numbered)} if name == "gemm" else {}
            )
            text = f"{covered[name]}{self._largest(name)}"
            if name == "mesh" and self.apart:
                text += f"; not some experts, as {' and '.join(sorted(self.apart))}"
            if name == "identity" and self.unread:
                text += f"; not {self.unread} experts whose weights hold infinities, or are run beside such"
            why = self._why_not(name)
            yield Level(
                name=name + suffix,
                covered=text,
                compared=self.compared[name],
                differences=tuple(sorted(dict.fromkeys(differences), key=_numbered)),
                errors=errors,
                not_run=why,
                asked=why not in (NOT_FINITE, TOO_LARGE) and not (name == "mesh" and suffix),
                worst=self._worst(name),
                bound=self.bounds.get(name),
            )

    def _worst(self, level: str) -> float | None:
        """The largest difference relative to the norm of a row, of levels that measure one."""
        return self.slopes if level == "gradients" and self.compared[level] else self.worst.get(level, (None,))[0]

    def _why_not(self, level: str) -> str:
        """Why a level has nothing to say, or not what it is there for; empty if it has."""
        if level == "gradients" and self.skipped:
            return "gemm differs"
        if self.compared[level]:
            return ""
        if self.large and level in ("gradients", "mesh"):
            return TOO_LARGE if level == "gradients" else TOO_LARGE.replace("that", "a mesh")
        if level == "mesh" and self.apart:
            return " and ".join(sorted(self.apart))
        if level == "layer" and level not in self.worst:
            return "the router sends none of the tokens to these experts; --tokens takes more"
        return NOT_FINITE

    def _largest(self, level: str) -> str:
        if level not in self.worst:
            return ""
        relative, delta, ulp = self.worst[level]
        return f"; largest difference {relative:.1e} of a row's norm, |delta| {delta:.1e}, {ulp:.0f} ulp"


def _numbered(text: str) -> list[str | int]:
    """For an order that does not depend on who ran what, nor when: layer 2 before layer 10."""
    return [int(word) if word.isdecimal() else word for word in re.split("([0-9]+)", text)]
