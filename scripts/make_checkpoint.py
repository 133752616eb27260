"""Make a MoE checkpoint to try the tool on, so that nobody needs a download.

    python scripts/make_checkpoint.py OUT --family qwen3_moe --format hf --size tiny

Hugging Face ones are sharded as transformers shards them (down, gate and up of a layer lie together, so gate and up of one
expert are routinely in different files), with index, config and side files. Orbax ones are laid out as MaxText lays them out
and saved by Orbax itself (`pip install .[orbax]`). Values are never all zero; `identity` gives each element a hash of its
place, so that misplacement shows.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts._checkpoint_tables import (
    DENSE,
    EXPERTS,
    HF_MODELS,
    MAXTEXT_DENSE,
    MAXTEXT_MODELS,
    NORMS,
    Row,
)

DTYPES: Mapping[str, Any] = {
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "f32": np.float32,
    "fp8": ml_dtypes.float8_e4m3fn,
}
SAFETENSORS_NAMES: Mapping[str, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float8_e4m3fn": "F8_E4M3"}
BLOCK = 1 << 20
"""Elements made at a time: what a tensor costs beyond itself is a few MB."""
UNITS: Mapping[str, int] = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The dimensions of a model; `shard` is the size of an HF file in bytes."""

    experts: int = 12
    embed: int = 64
    mlp: int = 40
    layers: int = 3
    vocab: int = 160
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    shard: int = 200_000

    def shape(self, letters: str) -> tuple[int, ...]:
        """The sizes of a row's letters; see `scripts/_checkpoint_tables.py`."""
        h, j, d = self.heads, self.kv_heads, self.head_dim
        rank = max(8, self.embed // 4)
        sizes = {"E": self.experts, "K": self.embed, "N": self.mlp, "F": 2 * self.mlp, "V": self.vocab, "1": 1}
        sizes |= {"H": h, "J": j, "D": d, "Q": h * d, "G": j * d, "R": rank, "P": rank + d, "W": 2 * h * d, "M": 2 * d}
        return tuple(sizes[letter] for letter in letters)


SIZES: Mapping[str, Size] = {
    "tiny": Size(),
    "small": Size(experts=16, embed=256, mlp=192, layers=4, vocab=1024, head_dim=64, shard=5_000_000),
    # Qwen3-30B-A3B's experts: 1.2 GB a layer
    "bench": Size(experts=128, embed=2048, mlp=768, layers=4, vocab=8192, heads=32, kv_heads=4, head_dim=128, shard=10**9),
}


def make_checkpoint(
    out: Path,
    *,
    family: str,
    format: str = "hf",  # noqa: A002
    size: str = "tiny",
    dtype: str = "bf16",
    values: str = "random",
    seed: int = 0,
    scanned: bool = True,
    train_state: bool = False,
    jax_arrays: bool = False,
    **overrides: int,
) -> Path:
    """Write a checkpoint to `out`, which must not exist, and return its path; overrides are fields of `Size`.

    Raises:
        FileExistsError: `out` exists.
        KeyError: a format, family, size or type that the tables do not have.
        ValueError: values of an unknown kind.
    """
    models: Mapping[str, Any] = {"hf": HF_MODELS, "orbax": MAXTEXT_MODELS}[format]
    if family not in models:
        raise KeyError(f"no {format} checkpoint of {family!r}: there are {', '.join(models)}")
    if values not in VALUES or (values == HOLES and format != "hf"):
        raise ValueError(f"values {values!r}: there are {', '.join(VALUES)}")
    dims = replace(SIZES[size], **overrides)
    fill = _Values(values, DTYPES[dtype], seed)
    out.mkdir(parents=True)
    if format == "hf":
        _write_hf(out, family, dims, fill)
    else:
        _write_orbax(out, family, dims, fill, scanned=scanned, train_state=train_state, jax_arrays=jax_arrays)
    return out


@dataclass(frozen=True, slots=True)
class _Values:
    kind: str
    dtype: Any
    seed: int

    def __call__(self, name: str, shape: Sequence[int], dtype: Any = None) -> NDArray[Any]:
        """The tensor called `name`: the same for the same name, shape and seed, whatever else is written."""
        kind = np.dtype(dtype or self.dtype)
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        tensor = np.empty(int(np.prod(shape, dtype=np.int64)), kind)
        if self.kind == "normal":
            for block in _blocks(tensor):
                block[:] = (0.02 * rng.standard_normal(len(block), np.float32)).astype(kind)
            return tensor.reshape(shape)
        salt = int(rng.integers(1 << 62)) if self.kind == "identity" else 0
        for number, bits in enumerate(_blocks(tensor.view(f"u{kind.itemsize}"))):
            if self.kind == "identity":
                bits[:] = _identity(number * BLOCK, len(bits), salt, 8 * kind.itemsize)
            else:
                bits[:] = np.frombuffer(rng.bytes(bits.nbytes), bits.dtype)
                _make_finite(bits)
        return tensor.reshape(shape)


def _blocks(flat: NDArray[Any]) -> Iterator[NDArray[Any]]:
    return (flat[start : start + BLOCK] for start in range(0, len(flat), BLOCK))


def _make_finite(bits: NDArray[Any]) -> None:
    """Random bits without NaN, infinity and zero: the top bit of the exponent off, the lowest bit of the mantissa on."""
    bits &= bits.dtype.type(~(1 << (8 * bits.itemsize - 2)) & ((1 << (8 * bits.itemsize)) - 1))
    bits |= bits.dtype.type(1)


def _identity(start: int, count: int, salt: int, width: int) -> NDArray[Any]:
    """A finite bit pattern for each of the places start, start + 1, ... of a tensor.

    Each step is a bijection of the low 31 bits, so a 32-bit element tells its place among 2 ** 31. A narrower one takes the
    top of the hash: a mere product's low bits would repeat, making every row and expert alike for sizes such as 2048 x 768.
    """
    mask = np.uint64((1 << 31) - 1)
    place = (np.arange(start, start + count, dtype=np.uint64) + np.uint64(salt)) & mask
    for shift, odd in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 0x9E3779B1)):
        place ^= place >> np.uint64(shift)
        place *= np.uint64(odd)
        place &= mask
    place ^= place >> np.uint64(16)
    place >>= np.uint64(32 - width)
    # The exponent's top bit is what NaN and infinity need: it stays off, and what was there becomes the sign.
    exponent = np.uint64(1 << (width - 2))
    return (place & (exponent - np.uint64(1))) | ((place & exponent) << np.uint64(1))


HOLES = "holes"
"""Sparse files of zeros: a terabyte takes no space, to try plans on."""
VALUES = ("random", "normal", "identity", HOLES)


def _write_hf(out: Path, family: str, dims: Size, fill: _Values) -> None:
    rows = list(_hf_tensors(family, dims))
    item = np.dtype(fill.dtype).itemsize
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in rows:
        nbytes = int(np.prod(shape)) * item
        if shards[-1] and filled + nbytes > dims.shard:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += nbytes
    total, parameters = 0, 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        total += _write_safetensors(out / file, shard, fill)
        weight_map |= dict.fromkeys((name for name, _ in shard), file)
        # transformers counts parameters, and the router's correction is a buffer
        parameters += sum(int(np.prod(shape)) for name, shape in shard if "e_score" not in name)
    if len(shards) > 1:
        metadata = {"total_parameters": parameters, "total_size": total}
        _write_json(out / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})
    _write_side_files(out, family, dims, fill)


def _write_safetensors(path: Path, shard: Sequence[tuple[str, tuple[int, ...]]], fill: _Values) -> int:
    """Write the bytes that `safetensors.numpy.save` would return, holding one tensor at a time; the size of the tensors."""
    kinds = {name: np.dtype(np.float32 if "e_score" in name else fill.dtype) for name, _ in shard}
    rows = sorted(shard, key=lambda row: (-kinds[row[0]].itemsize, row[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in rows:
        start, end = end, end + int(np.prod(shape)) * kinds[name].itemsize
        header[name] = {"dtype": SAFETENSORS_NAMES[kinds[name].name], "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if fill.kind == HOLES:
            file.truncate(file.tell() + end)
        else:
            for name, shape in rows:
                file.write(fill(name, shape, kinds[name]).view(np.uint8).data)
    return end


def _hf_tensors(family: str, dims: Size) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order of transformers' files: of a layer's experts first all down, then all gate, then all up."""
    model = HF_MODELS[family]
    for layer in range(dims.layers):
        dense = layer < model.dense_layers
        if not dense:
            for word in model.experts:
                shape = dims.shape("KN" if word == model.experts[0] else "NK")
                for e in sorted(range(dims.experts), key=str):
                    yield f"model.layers.{layer}.{model.module}.experts.{e}.{word}.weight", shape
        rows = (*model.attention, *NORMS, *(DENSE if dense else (*model.router, *model.others)))
        for name, letters in rows:
            yield f"model.layers.{layer}.{name}", dims.shape(letters)
    for name, letters in (("model.embed_tokens.weight", "VK"), ("model.norm.weight", "K"), ("lm_head.weight", "VK")):
        yield name, dims.shape(letters)


def _write_side_files(out: Path, family: str, dims: Size, fill: _Values) -> None:
    model = HF_MODELS[family]
    config = {
        "architectures": [model.architecture],
        "model_type": family,
        model.count_key: dims.experts,
        "dtype": np.dtype(fill.dtype).name,
        "hidden_size": dims.embed,
        "intermediate_size": dims.mlp if family in ("mixtral", "olmoe") else 2 * dims.mlp,
        "moe_intermediate_size": dims.mlp,
        "num_hidden_layers": dims.layers,
        "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_heads,
        "head_dim": dims.head_dim,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": model.dense_layers,
        "vocab_size": dims.vocab,
        # the published ones are beyond a small vocabulary
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **model.config,
        **{key: dims.shape(letter)[0] for key, letter in model.widths.items()},
    }
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", {"eos_token_id": 2})
    _write_json(out / "tokenizer.json", {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}})
    _write_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    _write_json(out / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    _write_json(out / "docs" / "params.json", {"dim": dims.embed})
    (out / "README.md").write_text(f"A random {family} checkpoint made by scripts/make_checkpoint.py\n")


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _write_orbax(
    out: Path, family: str, dims: Size, fill: _Values, *, scanned: bool, train_state: bool, jax_arrays: bool
) -> None:
    """One step as MaxText saves it: OUT/0/items with the tree params.params, step and, on wish, Adam's moments."""
    import jax
    import orbax.checkpoint as ocp

    flat = dict(_maxtext_tensors(family, dims, fill, scanned=scanned))
    weights = _nest(flat)
    state: dict[str, Any] = {"params": {"params": weights}, "step": np.int32(7), "opt_state": {}}
    if train_state:
        moments = {m: {"params": _nest({n: fill(f"{m}.{n}", a.shape) for n, a in flat.items()})} for m in ("mu", "nu")}
        state["opt_state"] = [{"count": np.int32(7), **moments}, None, {"count": np.int32(7)}]
    if jax_arrays:
        state = jax.tree.map(jax.device_put, state)
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(out.absolute(), options=options) as manager:
        items = ocp.args.Composite(items=ocp.args.PyTreeSave(state))
        manager.save(0, args=items, custom_metadata={"scan_layers": scanned})


def _maxtext_tensors(family: str, dims: Size, fill: _Values, *, scanned: bool) -> Iterator[tuple[str, NDArray[Any]]]:
    model = MAXTEXT_MODELS[family]
    dense_layers = 1 if model.dense else 0
    experts = tuple((f"{model.block}.{name}", letters) for name, letters in EXPERTS)
    stacks: list[tuple[str, int, Sequence[Row]]] = [
        (model.moe, dims.layers - dense_layers, (*model.attention, *experts, *model.others))
    ]
    if model.dense:
        stacks.append((model.dense, dense_layers, (*model.attention, *MAXTEXT_DENSE)))
    for stack, count, rows in stacks:
        for name, letters in rows:
            shape = dims.shape(letters)
            if scanned:  # param_scan_axis = 1
                yield f"decoder.{stack}.{name}", fill(f"{stack}.{name}", (shape[0], count, *shape[1:]))
            else:
                for i in range(count):
                    yield f"decoder.{stack}_{i}.{name}", fill(f"{stack}_{i}.{name}", shape)
    yield "decoder.decoder_norm.scale", fill("decoder_norm", dims.shape("K"))
    yield "decoder.logits_dense.kernel", fill("logits_dense", dims.shape("KV"))
    yield "token_embedder.embedding", fill("token_embedder", dims.shape("VK"))


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _bytes(text: str) -> int:
    """`200KB`, or a plain number of bytes, as transformers' max_shard_size."""
    return int(text[:-2]) * UNITS[text[-2:].upper()] if text[-2:].upper() in UNITS else int(text)


def main() -> None:
    """Read the command line and write one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", required=True, choices=sorted(HF_MODELS))
    parser.add_argument("--format", default="hf", choices=["hf", "orbax"])
    parser.add_argument("--size", default="tiny", choices=list(SIZES))
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--values", default="random", choices=list(VALUES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unscanned", action="store_true", help="orbax: one subtree per layer instead of stacked layers")
    parser.add_argument("--train-state", action="store_true", help="orbax: with Adam's moments")
    parser.add_argument("--jax-arrays", action="store_true", help="orbax: leaves saved as jax.Array instead of np.ndarray")
    parser.add_argument("--max-shard-size", "--shard", dest="shard", type=_bytes, help="hf: bytes of a file, such as 200KB")
    for field in ("experts", "embed", "mlp", "layers", "vocab", "heads", "kv_heads", "head_dim"):
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, help=f"instead of the size's own {field}")
    arguments = vars(parser.parse_args())
    overrides = {field: value for field in Size.__slots__ if (value := arguments.pop(field)) is not None}
    if arguments["format"] == "orbax" and arguments["family"] not in MAXTEXT_MODELS:
        parser.error(f"--format orbax knows {', '.join(MAXTEXT_MODELS)}")
    if arguments["out"].exists():
        parser.error(f"{arguments['out']} exists already")
    scanned = not arguments.pop("unscanned")
    print(f"wrote {make_checkpoint(**arguments, scanned=scanned, **overrides)}")


if __name__ == "__main__":
    main()
