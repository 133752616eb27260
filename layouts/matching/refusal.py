"""What is refused because it may belong to the experts, though no table says how.

In: names that no table of the family knows. Out: an error with what to do, or nothing. It never looks at a shape.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

from layouts.errors import PlanError
from layouts.language.layout import Layouts
from layouts.language.template import Template
from layouts.matching.group import Block
from layouts.matching.lookup import fitting, knows, rows_fitting, told_by_names
from layouts.reader import Reader
from layouts.tables.families import Family
from layouts.tables.foreign import WORDS
from layouts.tables.maxtext import LORA_APART, LORA_DOWN, LORA_FUSED
from layouts.tables.natives import SOURCES
from layouts.tables.targets import TARGETS, target

_PROJECTIONS = ("wi_0", "wi_1", "wi", "wo")
"""What MaxText calls the projections of a MoE block."""
_BOXES = ("array", "qrhs", "qvalue")
"""What stands below the name of a projection whose weights qwix or AQT has quantised."""
_MODULES = ("moe", "routed_experts")
"""How MaxText's modules of experts begin, in small letters."""
_FROZEN = ("qrhs", "qlhs")
"""What AQT calls quantised weights; those of experts are below their module, numbered in the order of use: `AqtEinsum_1`.

Source: MaxText `layers/moe.py`, which takes gate, up and down from `aqt` by these numbers.
"""


def check_beside(reader: Reader, family: Family, blocks: Iterable[Block], verbatim: Sequence[str]) -> None:
    """See that nothing which belongs to a projection of a MaxText block is taken for some other tensor.

    Raises:
        PlanError: something is.
    """
    if not family.by_structure:
        return
    places = {str(dict(block).get("path")) for block in blocks}
    others = [Template(text) for text in family.others]
    for name in verbatim:
        parts = name.split(".")
        beside = any(".".join(parts[:depth]) in places and _of_projection(parts[depth]) for depth in range(1, len(parts)))
        if _is_boxed(parts):
            raise PlanError(
                f"{reader.path}: {name} is of weights of experts that qwix or AQT has quantised, and no table says how their "
                f"values and scales are fused. Convert the tree that was quantised, and quantise what comes out"
            )
        if beside and all(other.parse(name) is None for other in (*others, LORA_DOWN)):
            known = f"Known to stay apart: {', '.join(text.rpartition('.')[2] for text in family.others)}"
            raise PlanError(
                f"{reader.path}: {name} belongs to a projection of the experts beside it, and no table says how it is fused "
                f"with them. {known}"
            )


def _is_boxed(parts: Sequence[str]) -> bool:
    """Whether a leaf is of a projection, or of a module of experts, that qwix or AQT has quantised."""
    boxed = any(part in _PROJECTIONS and below in _BOXES for part, below in itertools.pairwise(parts))
    return boxed or (any(part in _FROZEN for part in parts) and any(part.lower().startswith(_MODULES) for part in parts))


def without_loras(family: Family, names: Sequence[str]) -> list[str]:
    """The names but those of A and B of gate and up in a MaxText tree, which go where these go."""
    keys = (LORA_APART, LORA_FUSED) if family.by_structure else ()
    return [name for name in names if all(key.parse(name) is None for key in keys)]


def _of_projection(part: str) -> bool:
    return any(part == name or part.startswith(f"{name}_") for name in _PROJECTIONS)


_SEPARATORS = re.compile(r"[.:]")
"""Between parts of names; torchao puts a colon before what it takes a tensor apart into."""


class Refusal:
    """What must not pass as "some other tensor, copied as it is"."""

    def __init__(self, reader: Reader, family: Family) -> None:
        self.reader, self.family = reader, family
        tables = {name: target(name, family, shards=1, align=None) for name in TARGETS}
        self.fused = [(name, layout.template(family.experts)) for name, table in tables.items() for layout in table.values()]
        self.others = [Template(text) for text in family.others]
        keys = {layout.key for table in family.stored for layout in table.values() if "{part}" in layout.key}
        self.stems = [Template(key.replace("{experts}", family.experts).replace("{part}", "{rest}")) for key in sorted(keys)]

    def unknown_expert(self, name: str) -> None:
        """See that the name is not one of an expert weight that nobody has explained.

        Raises:
            PlanError: it is.
        """
        if self.family.by_structure and not any(key.parse(name) for _, key in self.fused):
            return
        if any(other.parse(name) is not None for other in self.others):
            return
        self._foreign(name)
        alike = [layout for layout, key in self.fused if key.parse(name) is not None]
        if alike:
            tables = {**TARGETS, **SOURCES}
            fit = rows_fitting(self.reader.tensors, self.family, tables)
            whole = [row for row in fit if _has(tables[row], self.family, name)]
            raise PlanError(
                f"{self.reader.path}: {name} looks like layout {' or '.join(map(repr, whole or alike))}, but neither the "
                f"checkpoint nor --source-layout says so. Shapes cannot tell layouts with the same names apart: name it with "
                f"--source-layout"
            )
        beside = any(stem.parse(name) is not None for stem in self.stems)
        if beside or _is_like_an_expert(name):
            expected = self.family.native[0]["wi"].key.replace("{experts}", self.family.experts)
            told = (
                "it is called as what stands beside a weight, and no table says how it is fused with it"
                if beside
                else f"expected names such as {expected}{hint(self.reader, self.family, name)}"
            )
            raise PlanError(
                f"{self.reader.path}: {name} (in {self.reader.where(name)}) is an expert tensor that family "
                f"{self.family.name} does not know; {told}"
            )

    def _foreign(self, name: str) -> None:
        """See that the name is not one of an expert in a form that belongs to another library, and none in its module is.

        Raises:
            PlanError: it is.
        """
        like = _is_like_an_expert(name)
        if not (like or any(part.endswith("_exps") for part in name.split("."))):
            return
        module = name.rpartition(".")[0] + "."
        every = self.reader.tensors if like else ()  # looked through once: such a name is refused in any case
        for each in (name, *(other for other in every if other.startswith(module))):
            if found := next((WORDS[part] for part in _SEPARATORS.split(each) if part in WORDS), None):
                raise PlanError(
                    f"{self.reader.path}: {each} (in {self.reader.where(each)}) belongs to {found[0]}, which no layout of "
                    f"plain weights can hold: {found[1]}"
                )


_MATRICES = re.compile(
    r"(^|[._])(gate|up|down|gate_up|up_gate|gate_and_up)_projs?\b|(^|\.)(w[123]|w13|fc[123])(_weight)?\b"
    r"|(^|[._])ffn_(gate|up|down)\b|(^|\.)(up|down|gate_up|wi|wi_[01]|wo)(\.|$)"
)
"""The words that projections of experts have; `gate` alone is a router."""


def _is_like_an_expert(name: str) -> bool:
    """Whether a name has a component that says expert, but is not a shared one, and one that says gate, up or down."""
    parts = name.split(".")
    if "experts" in parts or "switch_mlp" in parts:
        return True
    sisters = [part for part in parts if "expert" in part.lower() and not part.lower().startswith("share")]
    return bool(sisters) and _MATRICES.search(name) is not None


def lookalikes(names: Iterable[str]) -> tuple[str, ...]:
    """What the plan should say of names that may look like others: a letter of another alphabet is no letter of `experts`."""
    odd = sorted(name for name in names if not name.isascii())
    return (f"names of {len(odd)} tensors hold letters that may look like others, first {odd[0]!a}",) if odd else ()


def hint(reader: Reader, family: Family, odd: str | None = None) -> str:
    """What to try when none of the names is one of the family's, or this `odd` one is not."""
    told = told_by_names(reader.tensors, reader.format)
    others = [*fitting(reader.tensors, reader.format)[:6], *([told] if told else [])]
    said = ""
    if others and not knows(family, reader.tensors):
        said = f"; there are names as in {', '.join(f.name for f in others)}: if it is one of these, say so with --family"
    rows = [row for row in rows_fitting(reader.tensors, family) if odd is None or _has(SOURCES[row], family, odd)]
    if rows:
        said += f"; if they are stored so, say it with --source-layout: {', '.join(rows)}"
    return said


def _has(table: Layouts, family: Family, name: str) -> bool:
    return any(layout.template(family.experts).parse(name) is not None for layout in table.values())
