"""What names of packed adapters do not say: which wrapper is which projection, the roles of A and B, the packing of B.

In: shapes, settings, what is known of the writer and of the base. Out: a form, and the projections. Shapes decide where they
can, and refute what was said; packing is in no byte of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from layouts.adapters.forms import DOWN, GATE_UP, Form, packed
from layouts.adapters.settings import Settings
from layouts.adapters.writers import Evidence
from layouts.errors import InputError, PlanError

_Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Word of the wrapper (0 inner, 1 outer) -> side -> shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known beside the tensors. `sizes` are `e`, `k`, `n` of the base; `said` goes before `told`, by the file."""

    family: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    said: Evidence = field(default_factory=Evidence)
    told: Evidence = field(default_factory=Evidence)


@dataclass(frozen=True, slots=True)
class _Reading:
    """One way to read the wrappers: what the outer one is, and whether A and B have changed places."""

    outer: str
    reversed: bool

    def sizes(self, wrapper: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
        """K and N, read from one wrapper; None if it cannot be so."""
        i, o = shapes["A"][-1], shapes["B"][0]
        if self.reversed:
            i, o = o, i
        is_down = (self.outer == DOWN) == (wrapper == "1")
        if is_down:
            return o, i
        return (i, o // 2) if o % 2 == 0 else None

    def fits(self, block: _Shapes, base: Mapping[str, int]) -> bool:
        found = {self.sizes(wrapper, shapes) for wrapper, shapes in block.items()}
        if len(found) > 1 or None in found:
            return False
        return all(base.get(axis, size) == size for axis, size in zip("kn", next(iter(found)) or (), strict=False))


def decide(
    where: Path, form: Form, blocks: Mapping[str, _Shapes], settings: Settings, known: Known
) -> tuple[Form, dict[int, str], tuple[str, ...]]:
    """The form, the projection of each wrapper, and what the plan should say of that.

    Raises:
        InputError: shapes that are those of no gate, up and down, or wrappers that are not the same in all layers.
        PlanError: nothing tells; or what was said is refuted.
    """
    wrappers = {tuple(sorted(block)) for block in blocks.values()}
    for path, block in blocks.items():
        if any(sides.keys() != {"A", "B"} for sides in block.values()):
            raise InputError(f"{where}: {path}.experts has a lora_A without a lora_B, or the other way round")
    if len(wrappers) > 1 or ("0",) in wrappers:
        raise InputError(f"{where}: some layers have experts.base_layer.lora_* and experts.lora_*, others one of them alone")
    readings = [
        reading
        for reading in (_Reading(*each) for each in product((DOWN, GATE_UP), (False, True)))
        if all(reading.fits(block, known.sizes) for block in blocks.values())
        and _targeted(settings, reading, single=("1",) in wrappers)
        and not (form.rank == 3 and reading.reversed)
    ]
    if not readings:
        shapes = {side: shape for block in blocks.values() for sides in block.values() for side, shape in sides.items()}
        raise InputError(f"{where}: shapes such as {shapes} are those of no gate, up and down projection (of this base)")
    reading, why = _chosen(where, readings, known)
    units = {0: GATE_UP if reading.outer == DOWN else DOWN, 1: reading.outer}
    if form.rank == 3:
        return form, units, ()
    grouped, because = _packing(where, blocks, settings, known)
    found = packed(reversed=reading.reversed, grouped=grouped)
    return found, units, (f"form {found.name}: roles by {why}; packing of B by {because}",)


def _targeted(settings: Settings, reading: _Reading, *, single: bool) -> bool:
    """Whether a lone wrapper can be this projection, by `target_parameters`."""
    targets = settings.raw.get("target_parameters")
    words = {str(each).rpartition(".")[2] for each in targets} if isinstance(targets, list) else set()
    ours = words & {"gate_up_proj", "down_proj"}
    return not single or len(ours) != 1 or f"{reading.outer}_proj" in ours


def _chosen(where: Path, readings: list[_Reading], known: Known) -> tuple[_Reading, str]:
    """The reading that is left, or the one that the writer says."""
    by_shapes = len(readings) == 1
    said = known.said if known.said.reversed is not None else known.told
    if known.said.reversed not in (None, *(reading.reversed for reading in readings)):
        raise PlanError(
            f"{where}: {known.said.why} means that A and B have {'' if known.said.reversed else 'not '}changed places, and the "
            "shapes say the contrary; name the writer that trained it"
        )
    left = readings if by_shapes else [each for each in readings if said.reversed in (None, each.reversed)]
    if len(left) == 1:
        return left[0], "shapes" if by_shapes else said.why
    raise PlanError(
        f"{where}: shapes do not tell {_open(left)}; say which program wrote it (--from-writer=peft-0.18, ...) and the model "
        "(--family, or --base)"
    )


def _open(left: list[_Reading]) -> str:
    what = {
        "whether this is gate_up_proj or down_proj": len({each.outer for each in left}) > 1,
        "lora_A from lora_B": len({each.reversed for each in left}) > 1,
    }
    return " and ".join(words for words, is_open in what.items() if is_open)


def _packing(where: Path, blocks: Mapping[str, _Shapes], settings: Settings, known: Known) -> tuple[bool, str]:
    """Whether the columns of B have the expert outermost."""
    said, told = known.said, known.told
    if told.marked and said.grouped not in (None, told.grouped):
        raise PlanError(f"{where}: {said.why} contradicts {told.why}")
    for each in (said, told):
        if each.grouped is not None:
            return each.grouped, each.why
    rows = [(path, sides["A"][0]) for path, block in blocks.items() for sides in block.values()]
    if all(_trivial(path, count, settings) for path, count in rows):
        return False, "nothing: with one expert, or rank 1, there is only one"
    raise PlanError(
        f"{where}: no byte of the file tells how B is packed (expert fastest, as PEFT does, or slowest), and its settings have "
        "neither peft_version nor lora_B_layout; say which program wrote it: --from-writer=peft-0.18, unsloth-2026.9.5, "
        "megatron-bridge, automodel-0.7"
    )


def _trivial(path: str, rows: int, settings: Settings) -> bool:
    """Whether there is one expert, or rank 1, in every projection."""
    module = f"{path.removeprefix('base_model.model.')}.experts"
    ranks = {settings.rank_of(f"{module}.{unit}_proj") for unit in (GATE_UP, DOWN)}
    return ranks == {1} or ranks == {rows}
