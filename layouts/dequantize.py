"""A checkpoint with FP8 or MXFP4 weights, read as if it were bfloat16: values are computed here, and where adapters are merged.

In: an open quantised checkpoint. Out: a reader of its bfloat16 form. It never writes.

`X.weight` (F8_E4M3) with `X.weight_scale_inv` (a grid of blocks) is read as `X.weight` in BF16; gpt-oss' `X_blocks` and
`X_scales` as the `X` of the published bfloat16 model, whose rows are columns. The product is taken in float32 and rounded once,
to nearest even. Everything else is as it was. Block sizes come from `config.json` alone: a grid of 2 for 192 rows are blocks of
128 and 64, not two of 96.

Sources: DeepSeek-V3 `fp8_cast_bf16.py`; OCP Microscaling Formats v1.0; transformers `convert_moe_packed_tensors`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layouts.disk.pread import Empty
from layouts.errors import InputError, PlanError
from layouts.reader import Reader, ReadUnit
from layouts.tensors import TensorSpec, bits, numpy_dtype
from layouts.through import Through

FP8, SCALE, BLOCKS, SCALES = "F8_E4M3", "_scale_inv", "_blocks", "_scales"
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""E2M1 by its four bits; the lower nibble of a byte comes first."""
RULE = "bf16: FP8 or FP4 value times its block's scale in float32, rounded once to nearest even"
"""What the manifest says."""
_PART = 1 << 16
"""Elements computed at a time: they stay in the cache (1.1 GB/s of results a core; 4 M elements gave 0.4)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DequantizingReader(Through):
    """See `layouts.reader.Reader`; `quantized` is what the values of a tensor are made from: data and scales."""

    tensors: Mapping[str, TensorSpec]
    quantized: Mapping[str, tuple[str, str]]
    block: tuple[int, int]

    @property
    def config(self) -> Mapping[str, Any]:
        """`config.json` of a model that is not quantised."""
        return {key: value for key, value in self.inner.config.items() if key != "quantization_config"}

    @property
    def record(self) -> None:
        """None: what we made ourselves is not read through this."""
        return

    @property
    def records(self) -> Mapping[str, Any]:
        """None."""
        return {}

    @property
    def headers(self) -> Mapping[str, str]:
        """None: the files of what is computed are others."""
        return {}

    def unit(self, name: str) -> ReadUnit | None:
        """As the quantised data is read."""
        return self.inner.unit(self._sources(name)[0])

    def where(self, name: str) -> str:
        """The place of the quantised data."""
        return self.inner.where(self._sources(name)[0])

    def _sources(self, name: str) -> tuple[str, ...]:
        return self.quantized.get(name, (name,))

    def read(self, name: str, slices: tuple[slice, ...], empty: Empty = np.empty) -> NDArray[Any]:
        """A block as bits of bfloat16, computed; other tensors as they are stored."""
        if name not in self.quantized:
            return self.inner.read(name, slices, empty)
        shape = self.tensors[name].shape
        spans = [range(*cut.indices(size)) for cut, size in zip(slices, shape, strict=True)]
        out = empty([len(span) for span in spans], bits("BF16"))
        data, scales = self.quantized[name]
        compute = self._fp4 if data.endswith(BLOCKS) else self._fp8
        width = max(1, out[:1].size)
        for start in range(0, len(spans[0]), max(1, _PART // width)):
            part = spans[0][start : start + max(1, _PART // width)]
            out[start : start + len(part)] = compute(data, scales, [part, *spans[1:]])
        return out

    def _fp8(self, data: str, scales: str, spans: Sequence[range]) -> NDArray[Any]:
        """(N, K) from bytes and a grid of (ceil(N / b0), ceil(K / b1)) scales."""
        values = _fp8_values()[self.inner.read(data, tuple(slice(span.start, span.stop) for span in spans))]
        grid = [range(s.start // b, -(-s.stop // b)) for s, b in zip(spans, self.block, strict=True)]
        found = self._scales(scales, tuple(slice(span.start, span.stop) for span in grid))
        for axis, (span, cells, size) in enumerate(zip(spans, grid, self.block, strict=True)):
            first = span.start - cells.start * size
            found = np.repeat(found, size, axis)[(slice(None),) * axis + (slice(first, first + len(span)),)]
        values *= found
        product: NDArray[Any] = values.astype(numpy_dtype("BF16")).view(bits("BF16"))
        return product

    def _fp4(self, data: str, scales: str, spans: Sequence[range]) -> NDArray[Any]:
        """(E, 32 G, R) from blocks (E, R, G, 16) of pairs and scales (E, R, G)."""
        experts, columns, rows = spans
        groups = range(columns.start // 32, -(-columns.stop // 32))
        cut = tuple(slice(span.start, span.stop) for span in (experts, rows, groups))
        pairs = self.inner.read(data, (*cut, slice(None)))
        values = _fp4_values()[pairs].reshape(*pairs.shape[:3], 32) * self._scales(scales, cut)[..., None]
        first = columns.start - groups.start * 32
        whole = values.reshape(*pairs.shape[:2], -1)[..., first : first + len(columns)]
        found: NDArray[Any] = whole.astype(numpy_dtype("BF16")).view(bits("BF16")).swapaxes(1, 2)
        return found

    def _scales(self, name: str, slices: tuple[slice, ...]) -> NDArray[Any]:
        """Scales as float32; bytes are exponents (E8M0)."""
        stored = np.ascontiguousarray(self.inner.read(name, slices))
        code = self.inner.tensors[name].dtype
        exponents = code in ("U8", "F8_E8M0")
        found: NDArray[Any] = _exponents()[stored] if exponents else stored.view(numpy_dtype(code)).astype(np.float32)
        return found


@cache
def _fp8_values() -> NDArray[Any]:
    return np.arange(256, dtype=np.uint8).view(numpy_dtype(FP8)).astype(np.float32)


@cache
def _fp4_values() -> NDArray[Any]:
    return np.array([(FP4[byte & 15], FP4[byte >> 4]) for byte in range(256)], np.float32)


@cache
def _exponents() -> NDArray[Any]:
    with np.errstate(over="ignore"):
        return np.ldexp(np.float32(1), np.arange(256) - 127).astype(np.float32)


def dequantized(reader: Reader) -> DequantizingReader:
    """The checkpoint in bfloat16.

    Raises:
        PlanError: it is not quantised, not in a way that is known here, or it is one that this tool has fused already.
        InputError: data without scales, scales without data, or a grid that does not fit.
    """
    if reader.record:
        raise PlanError(f"{reader.path}: its experts are fused already; split it first, then dequantise")
    block = _block(reader)
    pairs = {**_pairs(reader, SCALE, FP8), **_packed(reader)}
    if not pairs:
        raise PlanError(f"{reader.path}: no FP8 weights with block scales and no MXFP4 blocks here; nothing to dequantise")
    hidden = {name for pair in pairs.values() for name in pair}
    tensors = {}
    first = {pair[0]: name for name, pair in pairs.items()}
    for name, spec in reader.tensors.items():
        if name in first:
            tensors[first[name]] = TensorSpec(name=first[name], dtype="BF16", shape=_shape(reader, *pairs[first[name]], block))
        elif name not in hidden:
            tensors[name] = spec
    return DequantizingReader(inner=reader, tensors=tensors, quantized=pairs, block=block)


def _block(reader: Reader) -> tuple[int, int]:
    stated = reader.config.get("quantization_config") or {}
    size = stated.get("weight_block_size")
    if isinstance(size, list) and len(size) == 2 and all(type(each) is int and each > 0 for each in size):
        return size[0], size[1]
    if any(name.endswith(SCALE) for name in reader.tensors):
        raise PlanError(f"{reader.path}: config.json states no quantization_config.weight_block_size, and a grid does not tell")
    return 1, 32


def _pairs(reader: Reader, end: str, code: str) -> dict[str, tuple[str, str]]:
    found = {name.removesuffix(end): (name.removesuffix(end), name) for name in reader.tensors if name.endswith(end)}
    for name, (data, scales) in found.items():
        if data not in reader.tensors:
            raise InputError(f"{reader.path}: {scales} (in {reader.where(scales)}) is for {data}, which is not there")
        if reader.tensors[data].dtype != code:
            raise PlanError(f"{reader.path}: {name} is {reader.tensors[data].dtype}; only {code} with block scales is computed")
    for name, spec in reader.tensors.items():
        if spec.dtype == code and name not in found:
            raise InputError(f"{reader.path}: {name} (in {reader.where(name)}) is {code} and has no {name}{end} beside it")
    return found


def _packed(reader: Reader) -> dict[str, tuple[str, str]]:
    found = {}
    for name in reader.tensors:
        if name.endswith((BLOCKS, SCALES)):
            stem = name.removesuffix(BLOCKS).removesuffix(SCALES)
            found[stem] = (stem + BLOCKS, stem + SCALES)
            if lost := next((each for each in found[stem] if each not in reader.tensors), None):
                raise InputError(f"{reader.path}: {name} (in {reader.where(name)}) has no {lost} beside it")
    return found


def _shape(reader: Reader, data: str, scales: str, block: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the values, once the grid of scales is found to fit.

    Raises:
        InputError: it does not.
    """
    values: tuple[int, ...]
    shape, grid = reader.tensors[data].shape, reader.tensors[scales].shape
    if data.endswith(BLOCKS):
        fits = len(shape) == 4 and shape[3] == 16 and grid == shape[:3]
        values = (shape[0], 32 * shape[2], shape[1]) if fits else ()
    else:
        fits = len(shape) == 2 and grid == tuple(-(-size // b) for size, b in zip(shape, block, strict=True))
        values = shape
    if not fits:
        raise InputError(f"{reader.path}: {scales} {grid} is no grid of blocks {block} for {data} {shape}")
    return values
