"""What comes along beside the tensors between formats, and which tensors the user does not want. Pure.

In: an open checkpoint, choices. Out: names, with sizes or reasons. It never reads data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.options import Choices
from convert.planning.across.stacks import mtp_places
from convert.planning.across.which import is_aside
from layouts.errors import PlanError
from layouts.orbax.tree import COMMITTED, STEP
from layouts.reader import Reader
from layouts.side_files import ORIGINALS
from layouts.tables.maxtext import MTP, ROOT, Tree


def beside(reader: Reader, choices: Choices, *, to_maxtext: bool) -> tuple[dict[str, int], dict[str, int]]:
    """The side files that come along, and those that do not.

    What Orbax keeps of a step is said anew for a tree, and says nothing of a Hugging Face checkpoint.

    Raises:
        PlanError: one has the place in which a tree keeps its own originals.
    """
    copied, left_out = reader.side_files.chosen(copy_all=choices.copy_all)
    found = {name: nbytes for name, nbytes in copied.items() if name.rpartition("/")[2] not in (STEP, COMMITTED)}
    own = ORIGINALS.partition("/")[0]
    if to_maxtext and (taken := next((name for name in found if name.partition("/")[0] == own), None)):
        raise PlanError(f"{reader.path / taken}: no place for it, because a tree keeps its own originals in {own}/; remove it")
    return {name: nbytes for name, nbytes in found.items() if name != ORIGINALS}, left_out


def left_out_of(reader: Reader, tree: Tree, config: Mapping[str, Any], choices: Choices, *, to_maxtext: bool) -> dict[str, str]:
    """The tensors that the user does not want, and the option that says so.

    Raises:
        PlanError: `--params-only`, and nothing tells the model from the rest.
    """
    found = dict[str, str]()
    if choices.params_only and not to_maxtext:
        if not any(name.startswith(ROOT) for name in reader.tensors):
            raise PlanError(
                f"{reader.path}: nothing of the model is below {ROOT.rstrip('.')}, nor below one other place, so that nothing "
                f"tells what --params-only should leave out; found {next(iter(reader.tensors), 'nothing')}"
            )
        state = (name for name in reader.tensors if not name.startswith(ROOT))
        found |= {name: "--params-only" for name in state if not is_aside(tree, name)}
    if choices.drop_mtp:
        places = mtp_places(tree, config) if to_maxtext else (f"{ROOT}{MTP}.",)
        found |= {name: "--drop-mtp" for name in reader.tensors if places and name.startswith(places)}
    return found
