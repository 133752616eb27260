"""What an optimizer keeps for the weights of experts, and whether it can be fused along with them. Pure; names and shapes only.

In: names and shapes. Out: a reader, with or without the optimizer's state, or an error. It never reads data.

Moments of the Adam family, momentum, accumulated gradients: one number for each weight, so that they are cut and joined as the
weights are. What other optimizers keep belongs to a whole matrix, and the matrix is another one when gate and up are fused.

Muon's momentum has the shape of the weights, and MaxText 0.2.5 takes `wi` as one matrix [K, 2N] of muon's: each step turns gate
and up together, so that a fused run would go on otherwise than the one that was saved.

Source: optax 0.2 `_src/factorized.py` (v_row, v_col), `contrib/_muon.py` (a partition named muon), MaxText `optimizers.py`,
`utils/muon_utils.py` (`transform_logic`: the last two axes of routed experts, whatever their names).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from layouts.errors import PlanError
from layouts.orbax.beside import items_beside
from layouts.orbax.reader import OrbaxReader
from layouts.orbax.tree import Leaf
from layouts.reader import Reader

STATE = "opt_state"
_FUSED = ("wi_0", "wi_1", "wi")
_ROOTS = ("params", "base")
_MUON = "muon"


def with_optimizer(reader: Reader, *, drop: bool) -> Reader:
    """The checkpoint with the state of its optimizer, if that can be fused with the weights, or on demand without.

    Raises:
        PlanError: it has a state that cannot be fused.
    """
    if not isinstance(reader, OrbaxReader):
        return reader
    reader = drop_optimizer(reader) if drop else reader
    check_optimizer(reader)
    return reader


def check_items(reader: Reader) -> None:
    """Refuse a checkpoint whose step has arrays of experts in another item, which would stay as they are.

    Raises:
        PlanError: it has; the message names the item.
        InputError: another item is damaged.
    """
    if not isinstance(reader, OrbaxReader):
        return
    for name, array in items_beside(reader.path, reader.item):
        raise PlanError(
            f"{reader.path / name}: another item of this step, with {array}, which would not fit what becomes of "
            f"{reader.item.name}. Leave such items out with --drop-optimizer, take them as they are with --copy-all, or "
            f"convert each by its own path"
        )


def check_optimizer(reader: OrbaxReader) -> None:
    """Refuse a checkpoint whose optimizer state would not fit the fused weights.

    Raises:
        PlanError: it has such a state; the message says which and why.
    """
    problem = next(_problems(reader), None)
    if problem is not None:
        raise PlanError(
            f"{reader.path}: {problem}. A training run could not go on with it. Leave the optimizer's state out with "
            f"--drop-optimizer (the run then begins with a fresh one), or convert before the training"
        )


def _problems(reader: OrbaxReader) -> Iterator[str]:
    weights = {_tail(name): name for name in reader.tensors if not _is_state(name) and name.rsplit(".", 1)[-1] in _FUSED}
    for leaf in reader.leaves.values():
        name = leaf.name
        if not _is_state(name):
            continue
        owner = next((weight for tail, weight in weights.items() if f".{tail}." in f"{name}."), None)
        *places, last = name.split(".")
        if _MUON in places and (owner or last in _FUSED):  # the weights may be in another item
            yield f"{name} is muon's, which turns each matrix as a whole: gate and up together are another matrix"
        elif owner is None:
            continue
        elif not name.endswith(f".{_tail(owner)}"):
            yield f"{name} is a state of several parts for one weight, which cannot be joined as the weights are"
        elif name in reader.tensors and reader.tensors[name].shape != reader.tensors[owner].shape:
            one, other = reader.tensors[name].shape, reader.tensors[owner].shape
            yield f"{name} {one} is not of the shape of {owner} {other}: it stands for rows or columns, as adafactor's do"


def _tail(name: str) -> str:
    """A weight's name below the roots of its tree: the part that names of states end in."""
    parts = name.split(".")
    while parts[0] in _ROOTS:
        parts.pop(0)
    return ".".join(parts)


def _is_state(name: str) -> bool:
    return STATE in name.split(".")[:-1]


def drop_optimizer(reader: OrbaxReader) -> OrbaxReader:
    """The same checkpoint with an empty optimizer state, as MaxText's own parameter-only checkpoints have it."""
    leaves: dict[str, Leaf] = {}
    for name, leaf in reader.leaves.items():
        if STATE not in leaf.path:
            leaves[name] = leaf
            continue
        depth = leaf.path.index(STATE) + 1
        keys = leaf.entry["key_metadata"][:depth]
        entry = {"key_metadata": keys, "value_metadata": {"value_type": "Dict", "skip_deserialize": True}}
        empty = Leaf(path=leaf.path[:depth], kind="Dict", entry=entry)
        leaves.setdefault(empty.name, empty)
    tensors = {name: spec for name, spec in reader.tensors.items() if name in leaves}
    return replace(reader, leaves=leaves, tensors=tensors)
