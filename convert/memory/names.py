"""What the names in a tree say before anything is planned: whether there are experts, and whether all of them are arrays. Pure.

In: names, a family. Out: nothing, or an error that says what was found instead. It never looks at a shape.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NoReturn

from convert.errors import PlanError
from convert.memory.tree import Held
from layouts.language.layout import Layouts
from layouts.matching.lookup import fitting
from layouts.tables.families import FAMILIES, Family, maxtext
from layouts.tables.targets import TARGETS, target


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
        if each.leaf is None and not each.is_empty and any(key.parse(name) is not None for key in keys):
            raise PlanError(
                f"{name} has the name of an expert's weight and is a {type(each.node).__qualname__}; known are arrays of "
                f"NumPy, JAX and PyTorch, jax.ShapeDtypeStruct, and Flax's boxes around these"
            )


def has_gates(names: Iterable[str], family: Family) -> bool:
    """Whether some names are those of gate and up, in any layout."""
    tables = [*family.native, *(target(each, family, shards=1, align=128) for each in TARGETS)]
    keys = [table["wi"].template(family.experts) for table in tables]
    return any(key.parse(name) is not None for name in names for key in keys)


def absent(names: Collection[str], family: Family, *, said: bool) -> NoReturn:
    """Say that no names are those of gate and up, and whose the names may be.

    Raises:
        PlanError: always.
    """
    near = [] if said else [other.name for other in fitting(names, "hf")][:6]
    wanted = family.native[0]["wi"].key.replace("{experts}", family.experts) if said else "wi_0 and wi_1, nor wi"
    hint = f"; there are names as in {', '.join(near)}: if it is one of these, say so with --family" if near else ""
    raise PlanError(f"no leaves are called {wanted}{hint}. First leaves: {', '.join(sorted(names)[:3]) or 'none'}")
