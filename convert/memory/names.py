"""What the names in a tree say before anything is planned: whether there are experts, and whether all of them are arrays. Pure.

In: names, a family. Out: nothing, or an error that says what was found instead. It never looks at a shape.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NoReturn

from convert.errors import PlanError, UsageError
from convert.memory.tree import Held
from layouts.language.layout import OPEN, Layouts
from layouts.language.template import Template
from layouts.matching.lookup import fitting
from layouts.tables.families import FAMILIES, Family, maxtext
from layouts.tables.targets import TARGETS, target

LORA = ("_lora_a", "_lora_b")
"""What qwix appends to the name of a weight that has LoRA."""
WORDS = ("wi_0", "wi_1", "wi", "wo")
"""What MaxText calls gate, up, both, and down."""


class Names:
    """How a tree calls what MaxText calls `wi_0`, `wi_1`, `wi` and `wo`: by the ends of names, such as `gate_proj.kernel`.

    Raises:
        UsageError: another word is to be called something, or two words the same.
    """

    def __init__(self, said: Mapping[str, str] | None, family: str | None) -> None:
        self._ends = dict(said or {})
        if said and family and not family_of(family).by_structure:
            raise UsageError(f"names: those of family {family} are in its table; give names or a family")
        if odd := [end for end in self._ends.values() if not isinstance(end, str) or not end]:
            raise UsageError(f"names: {odd[0]!r} is no end of a name, such as 'gate_proj.kernel'")
        if lost := [word for word in self._ends if word not in WORDS]:
            raise UsageError(f"names: {lost[0]!r} is none of {', '.join(WORDS)}")
        if len(set(self._ends.values())) < len(self._ends):
            raise UsageError(f"names: two words are called the same in {self._ends}")

    def read(self, name: str) -> str:
        """A name of the tree, in MaxText's words; a leaf that has one of these by chance is called otherwise."""
        found = self._changed(name, {end: word for word, end in self._ends.items()})
        return f"{name} (another)" if found == name and name.rpartition(".")[2] in self._other else found

    def write(self, name: str) -> str:
        """A name in MaxText's words, as the tree has it."""
        return self._changed(name, self._ends)

    @property
    def _other(self) -> set[str]:
        return {word for word, end in self._ends.items() if word != end}

    @staticmethod
    def _changed(name: str, ends: Mapping[str, str]) -> str:
        stem, tail = name, ""
        if name.endswith(LORA):
            stem, tail = name[: -len(LORA[0])], name[-len(LORA[0]) :]
        end = next((end for end in ends if stem.endswith(f".{end}")), None)
        return name if end is None else stem[: -len(end)] + ends[end] + tail


def family_of(said: object) -> Family:
    """The family of this name, or MaxText's if nobody has said one.

    Raises:
        PlanError: there is none.
    """
    if said is None:
        return maxtext()
    found = next((family for family in FAMILIES if said == family.name or said in family.model_types), None)
    if found is None:
        raise PlanError(f"no MoE family is called {said!r}; convert --families lists them")
    return found


def check_arrays(held: Mapping[str, Held], family: Family, tables: Iterable[Layouts]) -> None:
    """See that what has the name of an expert's weight in one of these layouts is an array.

    Raises:
        PlanError: it is not.
    """
    keys = [layout.template(family.experts) for table in tables for layout in table.values()]
    for name, each in held.items():
        whole, _, last = name.rpartition(".")
        if last.isdecimal() and any(key.parse(whole) is not None for key in keys):
            raise PlanError(
                f"{whole} has the name of an expert's weight and is several arrays; no layout says how they are fused"
            )
        if each.leaf is None and not each.is_empty and any(key.parse(name) is not None for key in keys):
            raise PlanError(
                f"{name} has the name of an expert's weight and is a {type(each.node).__qualname__}; known are arrays of "
                f"NumPy, JAX and PyTorch, jax.ShapeDtypeStruct, and Flax's boxes around these"
            )


def has_gates(names: Iterable[str], family: Family, tables: Collection[Layouts]) -> bool:
    """Whether some names are those of gate and up in one of these layouts, or in any if there are none."""
    tables = tables or (*family.native, *(target(each, family, shards=1, align=None) for each in TARGETS))
    keys = [table["wi"].template(family.experts) for table in tables]
    return any(key.parse(name) is not None for name in names for key in keys)


def absent(held: Mapping[str, Held], family: Family, tables: Sequence[Layouts], *, said: bool) -> NoReturn:
    """Say that no names are those of gate and up, and whose the names may be.

    Raises:
        PlanError: always.
    """
    names = [name for name, each in held.items() if each.leaf is not None]
    odd = next(((name, each) for name, each in held.items() if each.leaf is None and not each.is_empty), None)
    if not names and odd:
        kind = type(odd[1].node).__name__
        raise PlanError(f"there are no arrays: {odd[0]} is a {kind}, neither an array nor a container that JAX knows as a tree")
    near = [] if said else [other.name for other in fitting(names, "hf")][:6]
    keys = [table["wi"].template(family.experts) for table in tables if OPEN not in table["wi"].key]  # open: config.json tells
    wanted = " or ".join(dict.fromkeys(map(_example, keys))) or "*.wi"
    through = (
        ""
        if not family.is_open
        else "; for experts of two kinds, numbered through, pass sizes={'e': 64} if there are 64 of each"
    )
    hint = f"; there are names as in {', '.join(near)}: if it is one of these, say so with --family" if near else ""
    raise PlanError(
        f"no leaves are called as {wanted} is{hint or through}. First leaves: {', '.join(sorted(names)[:3]) or 'none'}"
    )


def _example(key: Template) -> str:
    """A name as a template has it: the first of layers, experts and words, at any place."""
    places = {"path": "*", "within": ""}
    return key.render({slot: places.get(slot, 0) for slot in key.slots})
