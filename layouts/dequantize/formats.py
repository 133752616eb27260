"""The table of quantised formats: under which names and types values and scales are stored, and how fine the scales are.

In: nothing. Out: `FORMATS`. It never looks at a checkpoint.

Sources: DeepSeek-V3 `fp8_cast_bf16.py`, DeepSeek-V4 `convert.py`; OCP Microscaling Formats v1.0; transformers
`convert_moe_packed_tensors` and `finegrained_fp8.py`; compressed-tensors `compressors/`; ModelOpt `qtensor/nvfp4_tensor.py`;
Mistral `qscale_weight`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

RULE = "bf16: value times its scale in float32, rounded once to nearest even"
"""What the manifest says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A way in which a matrix [out, in] is stored.

    `data` and `scale` are how names end, `codes` and `scales` the types behind them. `values` is what bytes stand for (see
    `values`). `grain` is what one scale is for: a number of columns of a row, `group` (config.json says how many), `block` (it
    says how many rows and columns), `channel` (a row) or `tensor`. `second` is one number for the tensor, by which scales are
    multiplied, or divided if it `divides`. `shape` is where the sizes are told that packing hides. `zeros` is the type of zero
    points, if there may be some: one for each scale, taken from values; those of I32 are packed as the values are, along rows.
    What is `folded` has its bytes in two dimensions, and is published with rows as columns.
    """

    name: str
    data: str
    codes: tuple[str, ...]
    values: str
    scale: tuple[str, ...]
    scales: tuple[str, ...]
    grain: tuple[int | str, ...]
    second: str = ""
    divides: bool = False
    shape: str = ""
    zeros: str = ""
    folded: bool = False


FLOATS = ("F32", "BF16", "F16")
"""Types of scales that are numbers, and of what they are multiplied by."""
_FP8, _POWERS = ("F8_E4M3",), ("U8", "F8_E8M0")
_ANY = (".weight_scale_inv", ".weight_scale", ".scale")
_ONE = (".weight_scale", ".qscale_weight")
_WS = (".weight_scale",)


_W = tuple[str, ...]


def _row(name: str, data: str, codes: _W, values: str, scale: _W, scales: _W, *grain: int | str, **more: Any) -> Format:
    return Format(name=name, data=data, codes=codes, values=values, scale=scale, scales=scales, grain=grain, **more)


FORMATS: tuple[Format, ...] = (
    _row("FP8 blocks", ".weight", _FP8, "e4m3", _ANY, (*FLOATS, *_POWERS), "block"),
    _row("MXFP8", ".weight", _FP8, "e4m3", _ANY, _POWERS, 32),
    _row("FP8", ".weight", _FP8, "e4m3", _ONE, FLOATS, "channel", "tensor"),
    _row("FP8", ".weight", _FP8, "e4m3", (".weight_scale_inv",), FLOATS, "tensor"),  # transformers, where no block is stated
    _row("INT8", ".weight", ("I8",), "int8", _WS, FLOATS, "channel", "tensor", "group", zeros="I8"),
    _row("NVFP4", ".weight", ("U8",), "e2m1", _WS, _FP8, 16, second=".weight_scale_2"),
    _row("NVFP4", ".weight_packed", ("U8",), "e2m1", _WS, _FP8, 16, second=".weight_global_scale", divides=True),
    _row("MXFP4", ".weight", ("U8",), "e2m1", _WS, _POWERS, 32),
    _row("MXFP4", ".weight_packed", ("U8",), "e2m1", _WS, _POWERS, 32),
    _row("FP4 of DeepSeek-V4", ".weight", ("I8",), "e2m1", (".scale",), _POWERS, 32),
    _row("INT4", ".weight_packed", ("I32",), "int4", _WS, FLOATS, "group", "channel", shape=".weight_shape", zeros="I32"),
    _row("INT8", ".weight_packed", ("I32",), "int8+128", _WS, FLOATS, "group", "channel", shape=".weight_shape", zeros="I32"),
    _row("MXFP4 of gpt-oss", "_blocks", ("U8",), "e2m1", ("_scales",), ("U8",), 32, folded=True),
)
ZERO = ".weight_zero_point"
"""How the names of zero points end."""
BESIDE = (".input_scale", ".input_global_scale", ".activation_scale", ".qscale_act", ".weight_g_idx", ".input_zero_point")
"""What goes with the quantisation of a matrix, and has no meaning without it."""
LEFT = (
    "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "weight_packed", "weight_zero_point",
    "weight_g_idx", "weight_shape", "qweight", "qzeros", "qscale_weight", "pre_quant_scale", "absmax", "trellis", "q_weight",
    ".scales", "weight_offset", "deq_scale", "quant_bias", "weight_scale_second", "weight_offset_second",
)  # fmt: skip
"""How the names of what is still quantised end: such a tensor is refused, for the output says that nothing is."""
