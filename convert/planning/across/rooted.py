"""A MaxText tree whose weights lie below another root than `ROOT`, by the names that the tables have. Names only.

In: an open tree. Out: a reader of the same, in which the model is below `ROOT`. It never reads data itself.

What `model_params` of MaxText's training engine holds has no root, and other trainers have one of their own. States of random
numbers, which NNX keeps within the model, are no weights, and keep their names.

Source: MaxText 0.2.5 `training_engine/checkpointing.py` (`nnx.state`), `common/checkpointing.py` (`load_params_from_path`).
"""

from __future__ import annotations

from layouts.reader import Reader
from layouts.tables.maxtext import PLACES, ROOT
from layouts.through import RenamedReader

_EMBEDDING = "token_embedder.embedding"
"""What every tree has once, besides the moments of it."""
_STATES = ("opt_state", "rngs")


def rooted(reader: Reader) -> Reader:
    """A tree with its model below `ROOT`, if it has one model below one other root; else as it is."""
    if reader.format != "orbax" or any(name.startswith(ROOT) for name in reader.tensors):
        return reader
    found = [name for name in reader.tensors if f".{name}".endswith(f".{_EMBEDDING}") and not _is_state(name)]
    if len(found) != 1:
        return reader
    root = found[0].removesuffix(_EMBEDDING)
    return RenamedReader(inner=reader, names={_named(name, root): name for name in reader.tensors})


def _named(name: str, root: str) -> str:
    below = name.removeprefix(root) if name.startswith(root) else ""
    return f"{ROOT}{below}" if below.startswith(PLACES) and not _is_state(below) else name


def _is_state(name: str) -> bool:
    return any(part in _STATES for part in name.split("."))
