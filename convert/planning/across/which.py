"""Which of MaxText's trees of a family a checkpoint has, and whether its layers are stacked. Pure.

In: an open tree, a family's trees. Out: one of them. It never reads data.

Its names tell it. Trees of two versions of MaxText may have the same names, and the layers of what is not trained along
different axes: then our record tells it. Where there is none, the router's kernel beside it does, which has its experts last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from layouts.errors import PlanError
from layouts.matching.candidates import ORIGIN, record_of
from layouts.matching.origin import FIRST, origin_of
from layouts.reader import Reader
from layouts.tables.families import maxtext
from layouts.tables.maxtext import ROOT, Tree


def tree_in(reader: Reader, trees: Sequence[Tree]) -> tuple[Tree, bool]:
    """The tree, and whether its layers are stacked.

    Raises:
        PlanError: nothing tells along which axis those of variables are that MaxText does not train.
    """
    places = [(tree, f"{ROOT}{stack.scanned}.") for tree in trees for stack in tree.stacks if stack.scanned]
    found = next((tree for tree, place in places if any(name.startswith(place) for name in reader.tensors)), None)
    alike = [tree for tree in trees if tree.stacks == (found or trees[0]).stacks]
    elsewhere = (tree for tree in alike if tree.aside != ROOT and any(is_aside(tree, name) for name in reader.tensors))
    return next(elsewhere, None) or _by_axis(reader, [tree for tree in alike if tree.aside == ROOT]), found is not None


def written_as(hf: Reader, trees: Sequence[Tree]) -> list[Tree]:
    """Those of a family by whose names a checkpoint of Hugging Face calls its embedding; all of them if none does."""
    return [tree for tree in trees if tree.outside[0].hf in hf.tensors] or list(trees)


def named_in(reader: Reader, trees: Sequence[Tree]) -> list[Tree]:
    """Those of a family by whose names a checkpoint was called of which this tree was made; the record says it.

    Where it does not, `config.json` does: who saves names of another kind has other words there.
    """
    names = origin_of(reader).names
    if names is None and record_of(reader).get(ORIGIN) is None:
        said = [tree for tree in trees if all(stack.when is None or stack.when[0] in reader.config for stack in tree.stacks)]
        return said or list(trees)
    return [tree for tree in trees if tree.names == (names or "")]


def is_aside(tree: Tree, name: str) -> bool:
    """Whether a tensor is a variable that MaxText does not train."""
    rows = (row for stack in tree.stacks if not stack.copies for row in stack.rows)
    own = (row for row in rows if row.aside and name.endswith(f".{row.maxtext}"))
    return any(name.startswith(tree.aside.format(row.aside)) for row in own)


def _by_axis(reader: Reader, trees: Sequence[Tree]) -> Tree:
    """The one whose variables that are not trained are stacked along the axis that they have here."""
    record = record_of(reader)
    if len(trees) == 1 or origin_of(reader).aside == FIRST or record.get("family") == maxtext(0).name:
        return trees[0]
    for name, experts in _stacked(reader, trees[0]):
        first, last = reader.tensors[name].shape
        if first == last:
            raise PlanError(
                f"{reader.path}: {name} (in {reader.where(name)}) has as many layers as experts, and nothing says which axis "
                f"is which: MaxText 0.2.5 has layers first, and before it had experts first"
            )
        return next(tree for tree in trees if tree.aside_along == (first == experts))
    return trees[0]


def _stacked(reader: Reader, tree: Tree) -> Iterator[tuple[str, int]]:
    """Variables of stacked layers, and how many experts there are by the kernel beside, which has them last."""
    for stack in (stack for stack in tree.stacks if stack.scanned):
        for row in (row for row in stack.rows if row.aside):
            name = f"{ROOT}{stack.scanned}.{row.maxtext}"
            kernel = reader.tensors.get(f"{name.rpartition('.')[0]}.kernel")
            if name in reader.tensors and kernel and kernel.shape and len(reader.tensors[name].shape) == 2:
                yield name, kernel.shape[-1]
