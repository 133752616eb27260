"""What a path is that holds no checkpoint, and what to give in its place: the answer to a first mistake.

In: a path. Out: the snapshot that was meant, or a sentence. It opens no file but the few bytes that name a snapshot.

Source of the cache's form: huggingface_hub, `models--OWNER--NAME/{refs/REF, snapshots/COMMIT}`.
"""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from layouts.disk.addresses import is_hub_id, of_others, of_the_hub, otherwise
from layouts.disk.names import part
from layouts.errors import InputError

_MODEL, _SNAPSHOTS, _MAIN = "models--", "snapshots", "refs/main"
_NAME = 200
"""Bytes that the name of a snapshot may have."""
_GIVE = "give the directory that holds the checkpoint"
OTHERS: Mapping[tuple[str, ...], str] = {
    ("*.gguf",): "GGUF files, for llama.cpp: take the safetensors of the same model",
    ("blobs/sha256-*",): "a store of Ollama, which keeps GGUF: take the safetensors of the same model",
    ("zero_to_fp32.py", "global_step*", "*_model_states.pt"): "a checkpoint of DeepSpeed: join its parts with its "
    "zero_to_fp32.py, and save the model as safetensors",
    ("latest_checkpointed_iteration.txt", "iter_*", "mp_rank_*", "model_optim_rng.pt"): "a checkpoint of Megatron-LM: export "
    "it to Hugging Face's safetensors first",
    ("*.nemo",): "an archive of NeMo: export it to Hugging Face's safetensors first",
    ("pytorch_model*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt"): "PyTorch pickles, which run code when they are "
    "read: save the model as safetensors with transformers' save_pretrained",
    ("*.engine", "*.plan"): "an engine of TensorRT: take the safetensors that it was built from",
    ("*.distcp",): "a torch.distributed.checkpoint: save the model as safetensors, or convert it with "
    "torch.distributed.checkpoint.format_utils first",
    ("*.msgpack", "*.h5", "saved_model.pb", "*.ckpt.index", "*.tflite"): "Flax or TensorFlow weights: "
    "take the safetensors of the same model",
    ("*.onnx",): "an ONNX graph: take the safetensors that it was exported from",
    ("*.npz",): "NumPy archives, as MLX once wrote them: take the safetensors of the same model",
    ("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.7z", "*.zst", "*.gz", "*.xz", "*.bz2"): "an archive: unpack it, and give the "
    "directory",
    ("*.incomplete", "*.part", "*.crdownload", "*.aria2", ".cache/huggingface/download/*.incomplete"): "a download that has "
    "not finished: run it again",
}
"""Names of files -> what they are, and what to do."""
_HEADS: tuple[tuple[tuple[bytes, ...], str], ...] = (
    ((b"version https://git-lfs",), "It is a git-lfs pointer: run 'git lfs pull' where it came from"),
    ((b"PK\3\4", b"\x80\x02", b"\x80\x04"), "It is a PyTorch pickle: save the model as safetensors"),
    ((b"GGUF",), "It is a GGUF file, for llama.cpp: take the safetensors of the same model"),
    ((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"), "It is compressed: unpack it"),
    ((bytes(40),), "It begins with zeros, as what a download has not filled: download or copy it again"),
)
"""How files begin that are called *.safetensors and are none -> what they are, and what to do."""
_BESIDE = ("config.json", "tokenizer.json", "tokenizer_config.json")
"""What models have beside their weights."""
_DEEP, _MOST, _SHOWN = 4, 500, 8
"""Levels below a directory at which a checkpoint is looked for, folders of a level, and how many are shown."""


def meant(path: Path) -> Path:
    """The directory that is there, or the snapshot in the hub's cache of the model whose id this is.

    Raises:
        InputError: there is no such directory, a file stands there, or there are several snapshots.
        OSError: nobody may look there.
    """
    try:
        if path.is_dir():
            return path
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # the system refuses, or fails
            raise
        raise InputError(f"{path}: {error.strerror}; {_GIVE}") from None
    if path.exists():
        words = next((words for names, words in OTHERS.items() if any(fnmatchcase(path.name, name) for name in names)), None)
        raise InputError(f"{path}: {words or f'this is a file; {_GIVE}: {path.parent}'}")
    if path.is_symlink():
        raise InputError(f"{path}: {dangling(path)}; {_GIVE}")
    if not is_hub_id(str(path)):
        download = of_the_hub(str(path))
        hint = f"download it first: {download}" if download else mistyped(path) or of_others(str(path))
        hint = hint or f"{_GIVE}{_near(path)}"
        raise InputError(f"{path}: no such directory; {hint}")
    found = snapshot(_cache() / f"{_MODEL}{str(path).replace('/', '--')}")
    if found is None:
        download = f"If it is a model of the Hugging Face hub, download it first: {of_the_hub(str(path))}"
        raise InputError(f"{path}: no such directory{_near(path) or f'. {download}'}")
    return found


def mistyped(path: Path) -> str | None:
    """What to do about a path that is not there, if what is missing of it looks as if it was meant otherwise."""
    parts = path.parts
    there = next((at for at in range(len(parts)) if not os.path.lexists(Path(*parts[: at + 1]))), len(parts))
    return otherwise("/".join(parts[there:]), whole=not there)


def dangling(path: Path) -> str:
    """What a link is that leads nowhere."""
    return f"a link to {os.readlink(path)}, which is not there"


def cause(head: bytes) -> str:
    """Why a file that begins so is no safetensors file, where that is a common thing, and what to do."""
    cut = head[8:9] == b"{"  # a header behind its length, which may be any bytes
    words = "" if cut else next((words for begins, words in _HEADS if head.startswith(begins)), "")
    text = " ".join(head.decode(errors="replace").split())
    if not words and text.isascii() and text.isprintable() and text.startswith(("<", "{")):
        words = f"It is text, such as the answer of a server ({text!r}): download it again"
    return words or f"{'' if head else 'It is empty. '}Download or copy it again"


def _near(path: Path) -> str:
    """The directory beside whose name is nearest to one that is not there, as a question."""
    try:
        names = {child.name.lower(): child.name for child in path.parent.iterdir() if child.is_dir()}
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name.strip().lower(), names, n=1, cutoff=0.75)
    return f" (did you mean {path.parent / names[near[0]]}?)" if near else ""


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
    if inner := _below(path):
        places = ", ".join(map(str, inner[:_SHOWN])) + f", ... ({len(inner)})" * (len(inner) > _SHOWN)
        return f"{path}: the checkpoint is not here, but below; give {places if len(inner) == 1 else f'one of {places}'}"
    for patterns, words in OTHERS.items():
        if found := next((file for pattern in patterns for file in sorted(path.glob(pattern))), None):
            return f"{path}: no safetensors and no Orbax checkpoint, but {found.name}: {words}"
    here = sorted(child.name for child in path.iterdir())
    if capital := next((name for name in here if name.lower().endswith(".safetensors")), None):
        return f"{path}: {capital} would be read under a name that ends in .safetensors, in small letters; rename it"
    beside = next((name for name in _BESIDE if name in here), None)
    what = f": it has a {beside} and no weights; download them, too" if beside else "" if here else ": it is empty"
    return f"{path}: neither *.safetensors files nor an Orbax checkpoint (_METADATA) found here{what}"


def _below(path: Path) -> list[Path]:
    """The folders below that hold a checkpoint, of the first level that has any."""
    level = [path]
    for _ in range(_DEEP):
        level = [child for folder in level for child in _folders(folder)][:_MOST]
        if found := [folder for folder in level if _holds(folder)]:
            return found
    return []


def _folders(folder: Path) -> list[Path]:
    """Those that somebody may have put a checkpoint into; of a folder that cannot be listed, none."""
    try:
        return sorted(child for child in folder.iterdir() if child.name[0] != "." and child.is_dir() and not child.is_symlink())
    except OSError:
        return []


def _holds(folder: Path) -> bool:
    return os.path.isfile(folder / "_METADATA") or next(folder.glob("*.safetensors"), None) is not None


def _cache() -> Path:
    """Where huggingface_hub keeps what it has downloaded."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
