"""The one place that opens a checkpoint.

In: a path. Out: a `Reader` of whichever format lies there. It never reads tensor data.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from layouts.disk.files import ADAPTER_FILES, CONFIG
from layouts.disk.mistaken import explained, meant, snapshot
from layouts.disk.places import is_remote, place
from layouts.errors import InputError
from layouts.orbax.tree import find_item
from layouts.reader import Reader
from layouts.shards import all_files, is_named, unindexed


class Format(NamedTuple):
    """What people call a format, and what differs between formats that is not the business of a reader or writer."""

    title: str
    record: str
    """Where our record of the layout stands."""
    names: str
    """What names all tensors that should be there."""
    loaders: str
    """Who loads a model that is in its own layout."""
    chunked: bool = False
    """Whether tensors are written in compressed chunks, cut for who restores them: nobody knows their size before."""


FORMATS: Mapping[str, Format] = {
    "hf": Format("Hugging Face safetensors", CONFIG, names="the index", loaders="all that load {original}"),
    "orbax": Format("Orbax (MaxText tree)", "the tree", names="the metadata", loaders="MaxText, as a tree", chunked=True),
    "adapter": Format("LoRA adapter (safetensors)", ADAPTER_FILES[1], names="the index", loaders="all that load {original}"),
}
"""Each format by a reader's word for it."""


def is_adapter(path: Path) -> bool:
    """Whether a LoRA adapter lies there, and no checkpoint: the one place that tells them apart.

    Raises:
        InputError: it holds several Orbax checkpoints.
    """
    if is_remote(path) or not os.path.isdir(path) or not any((path / name).is_file() for name in ADAPTER_FILES):
        return False
    names = unindexed(all_files(path))
    return not is_named(path) and set(names) <= {*ADAPTER_FILES} and find_item(path) is None


def open_checkpoint(path: str | Path) -> Reader:
    """Open a checkpoint directory, whichever format it is in; it may lie in a store (`gs://`, `s3://`).

    Raises:
        InputError: there is none, or it is corrupt.
    """
    from layouts.hf import HFReader, is_checkpoint

    path = place(path)
    if not is_remote(path):
        path = meant(path)
    elif not path.is_dir():
        raise InputError(f"{path}: no such directory; give the directory that holds the checkpoint")
    # One that is called as no model is may lie beside an Orbax item.
    if not is_named(path) and (item := find_item(path)) is not None:
        from layouts.orbax.reader import OrbaxReader

        return OrbaxReader.open(path, item)
    if is_adapter(path):
        from layouts.adapters.opening import open_adapter

        return open_adapter(path)
    if is_checkpoint(path):
        from layouts.adapters.opening import check_files

        check_files(path, unindexed(all_files(path)) if not is_remote(path) else ())
        return HFReader.open(path)
    if is_remote(path):
        raise InputError(f"{path}: neither *.safetensors files nor an Orbax checkpoint (_METADATA) found here")
    if (inner := snapshot(path)) is not None:
        return open_checkpoint(inner)
    raise InputError(explained(path))


@contextmanager
def growing() -> Iterator[None]:
    """Make many objects that all stay: the collector would look through them again and again, a quarter of the time."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
