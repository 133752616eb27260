"""What a path is that holds no checkpoint, and what to give in its place: the answer to a first mistake.

In: a path. Out: the snapshot that was meant, or a sentence. It opens no file but the few bytes that name a snapshot.

Source of the cache's form: huggingface_hub, `models--OWNER--NAME/{refs/REF, snapshots/COMMIT}`.
"""

from __future__ import annotations

import os
import string
from collections.abc import Mapping
from pathlib import Path

from layouts.disk.names import part
from layouts.errors import InputError

_MODEL, _SNAPSHOTS, _MAIN = "models--", "snapshots", "refs/main"
_NAME = 200
"""Bytes that the name of a snapshot may have."""
_HUB = frozenset(string.ascii_letters + string.digits + "._-")
_GIVE = "give the directory that holds the checkpoint"
_ALMOST: Mapping[str, str] = {
    "~": "~ stands for your home only without quotes",
    **{f"{scheme}:/": f"an address begins with {scheme}://" for scheme in ("gs", "s3")},
}
"""How paths begin that were meant otherwise -> what to do."""
OTHERS: Mapping[tuple[str, ...], str] = {
    ("*.gguf",): "GGUF files, for llama.cpp: take the safetensors of the same model",
    ("pytorch_model*.bin", "*.pt", "*.pth"): "PyTorch pickles, which run code when they are read: save the model as "
    "safetensors with transformers' save_pretrained",
    ("*.distcp",): "a torch.distributed.checkpoint: save the model as safetensors, or convert it with "
    "torch.distributed.checkpoint.format_utils first",
    ("*.msgpack", "*.h5"): "Flax or TensorFlow weights: take the safetensors of the same model",
    ("*.onnx",): "an ONNX graph: take the safetensors that it was exported from",
    ("*.npz",): "NumPy archives, as MLX once wrote them: take the safetensors of the same model",
}
"""Names of files -> what they are, and what to do."""


def meant(path: Path) -> Path:
    """The directory that is there, or the snapshot in the hub's cache of the model whose id this is.

    Raises:
        InputError: there is no such directory, a file stands there, or there are several snapshots.
    """
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{path}: this is a file; give the directory that holds the checkpoint: {path.parent}")
    if path.is_symlink():
        raise InputError(
            f"{path}: a link to {os.readlink(path)}, which is not there; give the directory that holds the checkpoint"
        )
    if not _is_hub_id(str(path)):
        hint = next((words for begin, words in _ALMOST.items() if str(path).startswith(begin)), _GIVE)
        raise InputError(f"{path}: no such directory; {hint}")
    found = snapshot(_cache() / f"{_MODEL}{str(path).replace('/', '--')}")
    if found is None:
        raise InputError(
            f"{path}: no such directory. If it is a model of the Hugging Face hub, download it first: "
            f"hf download {path} --local-dir {path.name}"
        )
    return found


def of_the_hub(address: str) -> str | None:
    """The id of a model whose page, or whose address in the words of other tools, this is; None if it is none."""
    for begin in ("https://huggingface.co/", "https://hf.co/", "hf://"):
        found = "/".join(address.removeprefix(begin).split("/")[:2])
        if address.startswith(begin) and _is_hub_id(found):
            return found
    return None


def snapshot(path: Path) -> Path | None:
    """The one snapshot of a model in the hub's cache, or that which `main` names; of a cache, that of its only model.

    Raises:
        InputError: there are several.
    """
    if not (path / _SNAPSHOTS).is_dir():
        models = sorted(child for child in path.glob(f"{_MODEL}*") if (child / _SNAPSHOTS).is_dir())
        if len(models) > 1:
            raise InputError(f"{path}: a cache of several models; give one of {', '.join(map(str, models))}")
        return snapshot(models[0]) if models else None
    found = sorted(child for child in (path / _SNAPSHOTS).iterdir() if child.is_dir())
    main = path / _MAIN
    if len(found) > 1 and main.is_file() and main.stat().st_size < _NAME:
        named = path / _SNAPSHOTS / part(main.read_text(errors="replace").strip(), main)
        found = [named] if named in found else found
    if len(found) > 1:
        raise InputError(f"{path}: {len(found)} snapshots are here; give one of them: {', '.join(map(str, found))}")
    return found[0] if found else None


def explained(path: Path) -> str:
    """What is in a directory without a checkpoint, in one sentence."""
    for patterns, words in OTHERS.items():
        if found := next((file for pattern in patterns for file in sorted(path.glob(pattern))), None):
            return f"{path}: no safetensors and no Orbax checkpoint, but {found.name}: {words}"
    inner = sorted(child for child in path.iterdir() if child.is_dir() and _holds(child))
    if inner:
        places = ", ".join(map(str, inner))
        return f"{path}: the checkpoint is not here, but below; give {places if len(inner) == 1 else f'one of {places}'}"
    return f"{path}: neither *.safetensors files nor an Orbax checkpoint (_METADATA) found here"


def _holds(folder: Path) -> bool:
    return (folder / "_METADATA").is_file() or next(folder.glob("*.safetensors"), None) is not None


def _is_hub_id(text: str) -> bool:
    owner, _, name = text.partition("/")
    return bool(owner and name) and set(owner + name) <= _HUB and owner[0] != "." and name[0] != "."


def _cache() -> Path:
    """Where huggingface_hub keeps what it has downloaded."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
