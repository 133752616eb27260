"""Tiny checkpoints, built from the logical weights with einops and plain string work: no code of the tool is in them."""

import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from einops import rearrange
from safetensors.numpy import load_file, save_file

from convert.engine.blocks import assembled
from convert.options import Choices
from convert.planning.planner import Plan, Target, make_plan
from layouts.checkpoint import open_checkpoint
from layouts.language.layout import Layouts
from layouts.reader import Reader
from layouts.side_files import SideFiles
from layouts.tables.families import FAMILIES, Family
from layouts.tensors import TensorSpec, bits

HF = [family for family in FAMILIES if family.format == "hf"]
E, K, N = 12, 6, 4
AXES = {"wi": "ekgn", "wo": "enk"}
LOOKALIKES = {
    "hf": (
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.block_sparse_moe.gate.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.shared_expert.gate_proj.weight",
        "model.layers.1.mlp.shared_expert_gate.weight",
        "model.layers.1.mlp.shared_experts.down_proj.weight",
        "model.layers.1.mlp.shared_experts.gate_proj.weight",
        "model.odd {e} {g:a,b} name",
    ),
    "orbax": (
        "params.params.decoder.dense_layers.mlp.wi_0.kernel",
        "params.params.decoder.layers_1.moe_block.gate.kernel",
        "params.params.decoder.layers_1.shared_experts.wi_1.kernel",
        "params.params.decoder.layers_1.shared_experts.wo.kernel",
        "params.params.decoder.layers_1.moe_block.wi_0_bias",
        "params.params.decoder.layers_1.moe_block.wi_1_bias",
        "params.params.decoder.layers_1.moe_block.wo_bias",
    ),
}
"""Names that look like expert weights, and are none."""


class MemoryReader:
    """A checkpoint that is a dictionary; arrays hold the bits."""

    def __init__(self, tensors: Mapping[str, np.ndarray], code="F32", *, config=None, record=None, format="hf"):  # noqa: A002
        self.path, self.format, self.config, self.record = Path("memory"), format, config or {}, record
        self.arrays = dict(tensors)
        codes = {np.dtype("i8"): "I64"}
        self.tensors = {n: TensorSpec(name=n, dtype=codes.get(a.dtype, code), shape=a.shape) for n, a in tensors.items()}
        self.records: dict[str, object] = {}
        self.side_files = SideFiles()

    def where(self, name: str) -> str:
        return f"home of {name}"

    def read(self, name: str, slices: tuple[slice, ...], empty: Any = np.empty) -> np.ndarray:
        return self.arrays[name][(*slices, ...)]

    def extents(self, names: Sequence[str]) -> None:
        pass

    def close(self) -> None:
        pass


def logical(layer: int, e: int, k: int, n: int, scan: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    """`wi` (e, scan, k, g, n) and `wo` (e, scan, n, k) in which every element is unique, by layer too."""
    shapes = {"wi": (e, *scan, k, 2, n), "wo": (e, *scan, n, k)}
    return {
        role: (1_000_000 * layer + 500_000 * (role == "wo") + np.arange(np.prod(shape), dtype="u4")).reshape(shape)
        for role, shape in shapes.items()
    }


def store(layouts: Layouts, place: str, index: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a layout makes of the logical weights of one MoE block: name -> array."""
    found = {}
    for role, array in weights.items():
        scan = " ".join(f"s{i}" for i in range(array.ndim - len(AXES[role])))
        key = layouts[role].key.replace("{experts}", place)
        key = re.sub(r"(?<=[._])\{part(:mlx)?\}", "weight", key).replace("{part}", "").replace("{part:scale}", "")
        named = [axis for axis in AXES[role] if re.search(rf"{{{axis}[:}}]", key)]
        axes = [scan if axis == "" else axis for axis in ("e", "", *AXES[role][1:])]
        rest = " ".join(axis for axis in axes if axis not in named)
        sizes = dict(zip(AXES[role], (array.shape[0], *array.shape[1 + len(scan.split()) :]), strict=True))
        for point in itertools.product(*(range(sizes[axis]) for axis in named)):
            at = dict(zip(named, point, strict=True))
            part = array[tuple(at.get(axis, slice(None)) for axis in (["e", *scan.split(), *AXES[role][1:]]))]
            pattern = layouts[role].pattern.replace("...", scan)
            found[name(key, {**index, **at})] = np.ascontiguousarray(rearrange(part, f"{rest} -> {pattern}"))
    return found


def name(key: str, index: Mapping[str, Any]) -> str:
    """A key with its slots filled in."""

    def fill(slot: re.Match[str]) -> str:
        return slot[2].split(",")[index[slot[1]]] if slot[2] not in (None, "?") else str(index[slot[1]])

    return re.sub(r"\{(\w+)(?::([^}]*))?\}", fill, key)


def place(family: Family, layer: int) -> dict[str, Any]:
    if family.format == "orbax":
        return {"path": f"params.params.decoder.layers_{layer}.moe_block"}
    return {"l": layer, "path": "model.layers", "moe": 0, "within": "mlp."}


def tensors(
    family: Family, layouts: Layouts | None = None, *, layers=(1, 2), e: int = E, k: int = K, n: int = N, others: bool = True
) -> dict[str, np.ndarray]:
    """All tensors of a small model of the family, as uint32 whose values are all different."""
    found: dict[str, np.ndarray] = {}
    for name in LOOKALIKES[family.format] if others else ():
        found[name] = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 2**32, (3, 5), dtype="u4")
    for layer in layers:
        found |= store(layouts or family.native[0], family.experts, place(family, layer), logical(layer, e, k, n))
    return found


def config(family: Family, e: int = E) -> dict[str, Any]:
    return {"model_type": family.model_types[0], "num_experts": e, "hidden_act": "silu"} if family.model_types else {}


def memory(family: Family, layouts: Layouts | None = None, **sizes: Any) -> MemoryReader:
    stated = config(family, sizes.get("e", E))
    return MemoryReader(tensors(family, layouts, **sizes), config=stated, format=family.format)


def fill(target: Target, reader: Reader, limit: int = 1 << 20) -> np.ndarray:
    """A target tensor, put together strip by strip as the writer does it."""
    strips = []
    for box in target.target.pattern.strips(target.sizes, limit):
        strips.append(assembled(target, box, reader).reshape(-1).copy())
    flat = np.concatenate(strips) if strips else np.empty(0, bits(target.spec.dtype))
    return flat.reshape(target.spec.shape)


def run(reader: MemoryReader, action: str, **choices: Any) -> MemoryReader:
    """Convert in memory."""
    plan: Plan = make_plan(reader, Path("out"), action, Choices(**choices))  # type: ignore[arg-type]
    arrays = {target.spec.name: fill(target, reader) for target in plan.targets}
    return MemoryReader(arrays, config=reader.config, record=plan.record, format=reader.format)


def same(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(x.shape == b[name].shape and np.array_equal(x, b[name]) for name, x in a.items())


def checkpoint(
    path: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] | None, *, shards: int = 3, extra: bool = True
) -> Path:
    """A Hugging Face directory as float32; neighbouring names lie in different shards."""
    path.mkdir(parents=True)
    names = ["model.safetensors"] if shards == 1 else [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    homes = dict(zip(sorted(tensors), itertools.cycle(names)))
    for shard in names:
        part = {name: array.view("f4") for name, array in tensors.items() if homes[name] == shard}
        save_file(part, path / shard, {"format": "pt"})
    if shards > 1:
        index = {"metadata": {"total_size": sum(a.nbytes for a in tensors.values())}, "weight_map": homes}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    if config is not None:
        (path / "config.json").write_text(json.dumps(config, indent=1))
    if extra:
        (path / "tokenizer.json").write_bytes(b"\x00\xffnot text")
        (path / "assets" / "deep").mkdir(parents=True)
        (path / "assets" / "deep" / "chat_template.jinja").write_text("{{ messages }}\r\n")
        (path / ".hidden").write_text("kept")
    return path


def load(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a float32 directory as bits, read by safetensors itself."""
    return {name: array.view("u4") for file in path.glob("*.safetensors") for name, array in load_file(file).items()}


def tree(path: Path) -> dict[str, str]:
    """Digest of every file below a directory."""
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in _files(path)}


def times(path: Path) -> dict[str, int]:
    return {str(file): file.lstat().st_mtime_ns for file in path.rglob("*")}


def _files(path: Path) -> Iterator[Path]:
    return (file for file in sorted(path.rglob("*")) if file.is_file())


def save(
    path: Path, tree: Any, *, ocdbt: bool = True, zarr3: bool = True, chunk: int | None = None, custom: Any = None
) -> Path:
    """An Orbax checkpoint, saved by Orbax; chunks have about `chunk` bytes."""
    every = ocp.tree.from_flat_dict({key: ocp.SaveArgs(chunk_byte_size=chunk) for key in ocp.tree.to_flat_dict(tree)})
    args = ocp.args.PyTreeSave(tree, save_args=every if chunk else None, custom_metadata=custom)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)) as checkpointer:
        checkpointer.save(path, args=args)
    return path


def restore(path: Path) -> Any:
    """What Orbax reads back."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(path)


def store_again(item, chunk_of):
    """An item with other chunks, as a run on many devices saves it."""
    with closing(open_checkpoint(item)) as reader:
        for name, spec in reader.tensors.items():
            stored = f"{reader.leaves[name].stored}/"
            where = {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": f"file://{item}/", "path": stored}}
            values = ts.open(where).result().read().result()
            chunk = chunk_of(spec.shape)
            layout = ts.ChunkLayout(read_chunk_shape=chunk, write_chunk_shape=chunk)
            zstd = {"codecs": ["bytes", {"name": "zstd", "configuration": {"level": 1}}]}
            again = ts.open(
                where | {"metadata": zstd, "store_data_equal_to_fill_value": True},
                create=True,
                delete_existing=True,
                dtype=values.dtype.name,
                shape=spec.shape,
                chunk_layout=layout,
            ).result()
            again.write(values).result()


def cut(axis, parts):
    """The chunks of an array whose dimension `axis` (or its last one) is cut."""

    def chunk(shape):
        at = min(axis, len(shape) - 1)
        return tuple(max(1, -(-size // parts)) if i == at else size for i, size in enumerate(shape))

    return chunk
