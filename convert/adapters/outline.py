"""What stands beside the numbers in an output: settings, record, header; the originals where they are remembered.

In: recipes of all blocks. Out: texts, a `File`. It never reads tensors, and believes no record that says another scale.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from convert.adapters.config import adapted
from convert.adapters.making import Making, Way
from convert.adapters.recipes import Recipe
from convert.commit import manifest
from convert.hf.shards import File, file_of, restore
from layouts.adapters.describe import Description, module_of
from layouts.adapters.forms import FORMS, Form
from layouts.adapters.opening import MODEL
from layouts.adapters.settings import CONFIG, Scale, Settings
from layouts.adapters.writers import STAMP
from layouts.disk.files import RECORD, parsed, read_object
from layouts.errors import ConvertError
from layouts.hf.header import metadata_of
from layouts.reader import Reader
from layouts.tensors import TensorSpec, itemsize

VERSION = 1
_STAMPS = {"packed": "peft-0.19.1", "packed-reversed": "peft-0.18"}
"""What AutoModel calls the forms that it reads."""


def _modules(makings: tuple[Making, ...], form: Form) -> Iterator[tuple[str, Scale, Recipe]]:
    """The modules of the output, as patterns see them, and their scales."""
    for making in makings:
        place = f"{making.path.removeprefix('base_model.model.')}.experts"
        for recipe in making.recipes:
            word = form.word(recipe.unit)
            for e in range(len(recipe.scales)) if form.per_expert else [0]:
                yield f"{place}.{e}.{word}" if form.per_expert else f"{place}.{word}", recipe.scales[e], recipe


def config_of_output(
    described: Description, way: Way, makings: tuple[Making, ...], copied: Mapping[str, str]
) -> dict[str, Any]:
    """The new `adapter_config.json`, as an object."""
    wanted = {module: scale for module, scale, _ in _modules(makings, way.target)}
    others = list(dict.fromkeys(module_of(name) for name in copied if ".lora_" in name))
    routers = {f"{making.path.removeprefix('base_model.model.')}.gate" for making in makings}
    return adapted(described.settings, way.target, wanted, others, [name for name in others if name in routers])


def stamp_text(reader: Reader, way: Way) -> dict[str, str]:
    """AutoModel's own file, which names the form."""
    if not (reader.path / STAMP).is_file():
        return {}
    stamp = read_object(reader.path / STAMP)
    stamp.pop("paramwrapper_layout", None)
    if way.target.name in _STAMPS:
        stamp["paramwrapper_layout"] = _STAMPS[way.target.name]
    return {STAMP: json.dumps(stamp, indent=2) + "\n"}


def record_of(described: Description, way: Way, makings: tuple[Making, ...], before: Mapping[str, Any]) -> dict[str, Any]:
    """What the output says of itself, and of how gate and up became one."""
    found: dict[str, Any] = {"layout": way.target.name, "version": VERSION}
    if described.known.family:
        found["family"] = described.known.family
    origin = FORMS.get(str(before.get("from")))
    found["from"] = origin.name if origin and not origin.fused and way.source.fused else way.source.name
    if any(making.path != making.block.path for making in makings) or before.get("place") == "block_sparse_moe":
        found["place"] = "block_sparse_moe"
    if way.source.fused != way.target.fused:
        found["turns"] = way.turns
    elif isinstance(before.get("turns"), bool):
        found["turns"] = before["turns"]
    hows = {
        making.path: {"how": recipe.how, "rank": making.block.units[recipe.sources[0]].rank}
        for making in makings
        for recipe in making.recipes
        if recipe.unit == "gate_up" and recipe.how != "as it is"
    }
    kept = before.get("gate_up") if way.target.fused else None
    if hows or kept:
        found["gate_up"] = hows or kept
    return found


def file_for(reader: Reader, found: Mapping[str, TensorSpec], record: Mapping[str, Any]) -> File:
    """The one file, in the order of safetensors' own writer: wide types first, then by name."""
    metadata = dict(metadata_of(next(iter(reader.headers.values()))))
    ordered = sorted(found.values(), key=lambda spec: (-itemsize(spec.dtype), spec.name))
    return file_of(MODEL, ordered, {**metadata, RECORD: json.dumps(record)})


def restored(reader: Reader, found: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> tuple[File, str] | None:
    """The original file and settings, where the input remembers them and they say the same as what would be made anew."""
    original = manifest.original_files(reader.path)
    if original is None or set(original.headers) != {MODEL} or CONFIG not in original.texts:
        return None
    files = restore(original.headers, found.values())
    if files is None:
        return None
    text = original.texts[CONFIG]
    try:
        old, new = Settings.of(parsed(text.encode()), CONFIG), Settings.of(config, CONFIG)
        names = {module_of(name) for name in found if ".lora_" in name}
        same = all(old.scale(name) == new.scale(name) for name in names)
    except (ConvertError, ValueError, AttributeError, RecursionError):
        return None
    return (files[0], text) if same else None


def kept_record(file: File) -> dict[str, Any] | None:
    """The record in a restored header: what was restored may have been made by this tool itself."""
    text = (json.loads(file.head[8:]).get("__metadata__") or {}).get(RECORD)
    return None if text is None else dict(json.loads(text))
