"""Open an adapter; `layouts.checkpoint` tells which directory is one.

In: a directory. Out: a reader of `adapter_model.safetensors` whose `format` is `adapter`. It never reads data.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from layouts.disk.files import ADAPTER_FILES, RECORD, manifest_record, read_object
from layouts.errors import InputError
from layouts.hf import HFReader
from layouts.hf.header import read_shard

ADAPTER = "adapter"
"""The format of its reader."""
CONFIG, MODEL = ADAPTER_FILES
OLD = "adapter_model.bin"
_NAMED = re.compile(r"(?P<stem>.*\.lora_(?:[AB]|embedding_[AB]))\.(?P<name>[^.]+)(?P<end>\.weight|\.bias|)", re.DOTALL)
_OTHERS: Mapping[str, str] = {
    "*adapters.safetensors": "an adapter of mlx-lm, which has a scale where PEFT has alpha, and names of its own; make a model "
    "of it with mlx_lm.fuse, and convert that",
    "adapter_model-*.safetensors": f"a part of an adapter, which PEFT has in one file; join the parts as {MODEL} (safetensors' "
    "load_file of each, one save_file)",
    "*.distcp": "a torch.distributed.checkpoint, as NeMo AutoModel has of optimizers; load it there and save the adapter as "
    "safetensors",
}
"""Names of files of other adapters -> what they are, and what to do. Source: mlx-lm `tuner/trainer.py`, `fuse.py`."""
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def open_adapter(path: Path) -> HFReader:
    """Open an adapter.

    Raises:
        InputError: its tensors are missing, corrupt, or a pickle.
    """
    if not (path / MODEL).is_file():
        if (path / OLD).exists():
            raise InputError(f"{path / OLD}: a pickle, which is not opened; load it with PEFT and save it as safetensors")
        check_files(path, sorted(each.name for each in path.iterdir()))
        raise InputError(f"{path}: {CONFIG} is here, but no {MODEL}")
    shard = read_shard(path / MODEL)
    record = _record(shard.metadata.get(RECORD), path)
    return HFReader(
        path=path,
        shards=(shard,),
        config={RECORD: record} if record else {},
        records=manifest_record(path),
        tensors=shard.tensors,
        format=ADAPTER,
    )


def check_files(path: Path, files: Iterable[str]) -> None:
    """See that files beside an `adapter_config.json` are none that hold an adapter in another way.

    Raises:
        InputError: they do.
    """
    if not (path / CONFIG).is_file() or (path / MODEL).is_file():
        return
    for name in files:
        for pattern, words in _OTHERS.items():
            if fnmatchcase(name, pattern):
                raise InputError(f"{path / name}: {words}")


def config_of(path: Path) -> dict[str, Any]:
    """The parsed `adapter_config.json`.

    Raises:
        InputError: it is missing or unreadable.
    """
    if not (path / CONFIG).is_file():
        raise InputError(f"{path}: no {CONFIG} here, so that nothing tells the scale; put the one that belongs to it there")
    return read_object(path / CONFIG)


def _record(text: object, path: Path) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{path / MODEL}: {RECORD} in its metadata should be an object; remove it to go without")
    return found


def plain_names(names: Iterable[str], path: Path) -> Mapping[str, str]:
    """Names as PEFT saves them -> names as they are stored: without a wrapper, and without an adapter's own (`.default.`).

    Raises:
        InputError: two names are the same then.
    """
    stored = {name: name for name in names}
    found: dict[str, str] = {name: _unwrapped(name) for name in stored}
    named = {name: match for name, plain in found.items() if (match := _NAMED.fullmatch(plain))}
    inner = {match["name"] for match in named.values() if match["end"] or match["name"] not in ("weight", "bias")}
    loras = [name for name, plain in found.items() if ".lora_" in plain]
    if len(inner) > 1:
        raise InputError(f"{path / MODEL}: it holds several adapters: {', '.join(sorted(inner))}; save each by itself")
    if len(inner) == 1 and len(named) == len(loras):
        found |= {name: match["stem"] + match["end"] for name, match in named.items() if match["name"] in inner}
    if twice := [plain for plain, count in Counter(found.values()).items() if count > 1]:
        raise InputError(f"{path / MODEL}: {twice[0]} stands there twice, but for the name of a wrapper or an adapter")
    return {plain: name for name, plain in found.items()}


def _unwrapped(name: str) -> str:
    for word in _WRAPPERS:
        name = name.replace(word, "")
    return name
