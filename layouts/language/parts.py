"""The tensors that make up one projection: the weight, and its companions such as biases, scales and packed forms.

In: a weight's pattern. Out: the pattern of a companion. It knows no model.

A layout states where a projection's weight is. Its companions lie beside it and have fewer or coarser axes: a bias has no
contracted axis, a block scale has one element for a block of the weight. So they need no layout of their own, only this table.

Sources: DeepSeek-V3 `weight_scale_inv`; compressed-tensors `weight_packed`, `weight_shape`, ...; ModelOpt `weight_scale_2`;
transformers `finegrained_fp8.py` (`activation_scale`) and `fbgemm_fp8.py` (scales of rows beside [in, out] weights);
Inkling2-Loop `weight_amax`; AutoGPTQ / AutoAWQ `qweight`, `qzeros`, `scales`, `g_idx`; gpt-oss `_blocks`, `_scales`;
ModelOpt `unified_export_hf` (block scales of four dimensions, one number for a stacked tensor); MLX `QuantizedSwitchLinear`;
vllm-ascend `quantization/methods/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from layouts.language.pattern import Pattern

AXES: Mapping[str, tuple[str, str]] = {"wi": ("k", "n"), "wo": ("n", "k")}
"""Role -> the axis that its GEMM contracts ("in") and the one that it gives ("out")."""
CHUNKS = ("s", "c", "n")
"""The axes into which `n` may be cut, outermost first."""
EXTRA = ("d", "u")
"""The axes of dimensions that are no axis of the weight: of size 1, or of any size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A tensor of a projection.

    `word` is its name behind a dot (`gate_proj.weight_scale`) and `name` the one behind an underscore (`gate_up_proj_scale`).
    `dims` are the dimensions it may have, tried in order: `out` and `in`, `one` (a dimension of size 1, behind the word before
    it), `rest` (one of any size), or none; `both` is one number for gate and up together, `all` one for all experts, too.
    `turned` parts are stored with in and out exchanged against the family's weights. Those that are `packed` hold several
    values in an element whatever their type, so that in and out keep their order. Where `types` are given it has one of these:
    what is called so in another type is packed otherwise.
    """

    name: str
    word: str
    dims: tuple[str, ...] = ("out in",)
    turned: bool = False
    packed: bool = False
    types: tuple[str, ...] = ()


_SCALAR = ("one", "", "both", "both one", "all", "all one")
_BLOCKS = ("out one in one", "out in", "out one", "out")
_SCALE = (*_SCALAR, *_BLOCKS)
"""From few numbers to many: one for gate and one for up is not taken for a row of outputs."""

PARTS: Sequence[Part] = (
    Part(name="", word="weight"),
    Part(name="bias", word="bias", dims=("out",)),
    Part(name="scale_inv", word="weight_scale_inv", dims=_SCALE),
    Part(name="scale", word="weight_scale", dims=_SCALE),
    Part(name="scale_2", word="weight_scale_2", dims=_SCALAR),
    Part(name="global_scale", word="weight_global_scale", dims=_SCALAR),
    Part(name="input_scale", word="input_scale", dims=_SCALAR),
    Part(name="activation_scale", word="activation_scale", dims=_SCALAR),
    Part(name="input_global_scale", word="input_global_scale", dims=_SCALAR),
    Part(name="amax", word="weight_amax", dims=_SCALAR),
    Part(name="outer_scale_denominator", word="weight_outer_scale_denominator", dims=_SCALAR),
    Part(name="packed", word="weight_packed", packed=True),
    Part(name="shape", word="weight_shape", dims=("rest",)),
    Part(name="zero_point", word="weight_zero_point", dims=_SCALE, packed=True),
    Part(name="group_index", word="weight_g_idx", dims=("in",)),
    Part(name="block_scale", word="scale", dims=_SCALE),  # DeepSeek-V4
    Part(name="qscale", word="qscale_weight", dims=_SCALE),
    Part(name="qscale_act", word="qscale_act", dims=_SCALAR),
    Part(name="pre_quant_scale", word="pre_quant_scale", dims=("in",)),
    Part(name="input_zero_point", word="input_zero_point", dims=_SCALAR),
    Part(name="qweight", word="qweight", turned=True, packed=True, types=("I32", "U32")),
    Part(name="qzeros", word="qzeros", turned=True, packed=True, types=("I32", "U32")),
    Part(name="g_idx", word="g_idx", dims=("in",)),
    Part(name="scales", word="scales", turned=True),
    Part(name="blocks", word="blocks", dims=("out in rest",), turned=True, packed=True),
    Part(name="group_scales", word="group_scales"),
    Part(name="group_biases", word="group_biases"),
    Part(name="offset", word="weight_offset", dims=_SCALE),  # Ascend, as these behind it
    Part(name="scale_second", word="weight_scale_second"),
    Part(name="offset_second", word="weight_offset_second"),
    Part(name="input_offset", word="input_offset", dims=_SCALAR),
    Part(name="deq_scale", word="deq_scale", dims=("out",)),
    Part(name="quant_bias", word="quant_bias", dims=("out",)),
)
VOCABULARIES: Mapping[str, Mapping[str, str]] = {
    "scale": {"scale": "weight_scale"},
    "mlx": {"bias": "bias", "group_scales": "scales", "group_biases": "biases"},
    "beside": {part.name: part.word for part in PARTS if part.name},
}
"""What stands behind `{part:`, and the companions that such a key has: name -> word. MLX calls other things `scales`.

A key with `{part:beside}` has no weight."""


_SLOT = re.compile(r"\{part(?::([a-z_0-9]+))?\}")
_ABSENT = "\0"
"""Begins words that no name has: they keep the places of companions that a key leaves out."""


def words(key: str) -> str:
    """A key with `{part}` as a choice of the words that fit: `.{part}` and `_{part}` have the word, else `_name` or nothing.

    `{part:scale}` leaves out all companions but those of this vocabulary.
    """
    if not (found := _SLOT.search(key)):
        return key
    dotted = key[: found.start()].endswith((".", "_"))
    own = VOCABULARIES.get(found[1] or "", {})
    choice = [own.get(part.name, part.word) if dotted else part.name and f"_{part.name}" for part in PARTS]
    kept = [word if _has(found[1], part.name) else _ABSENT + word for part, word in zip(PARTS, choice, strict=True)]
    return _SLOT.sub(f"{{part:{','.join(kept)}}}", key)


def takes(key: str, name: str) -> bool:
    """Whether a key has a place for a companion, or for the weight."""
    found = _SLOT.search(key)
    return _has(found[1], name) if found else not name


def _has(vocabulary: str | None, name: str) -> bool:
    if not name:
        return vocabulary != "beside"
    return vocabulary is None or name in VOCABULARIES.get(vocabulary, ())


def only(key: str, name: str) -> str:
    """A key that takes no companions but those of this vocabulary."""
    return _SLOT.sub(f"{{part:{name}}}", key)


def worded(key: str) -> str | None:
    """A key whose companions have their words behind an underscore (`gate_up_proj_weight_scale`); None if it has them so.

    ModelOpt hangs them on a parameter that is no module. The weight itself keeps its name, for which this key has no place.
    """
    found = key.removesuffix("{part}")
    return f"{found}_{{part:beside}}" if found != key and not found.endswith((".", "_")) else None


@lru_cache(maxsize=1 << 10)  # layers are alike
def forms(weight: Pattern, role: str, part: Part) -> tuple[tuple[str, Pattern], ...]:
    """The dims that a stored companion may have, each with its pattern."""
    order = is_in_first(weight, role) != part.turned
    return tuple((dims, companion(weight, role, dims, in_first=order)) for dims in part.dims)


def is_in_first(pattern: Pattern, role: str) -> bool:
    """Whether the contracted dimension is stored before the other."""
    contracted, given = (_dimension(pattern, axis) for axis in AXES[role])
    return contracted < given


def companion(weight: Pattern, role: str, dims: str, *, in_first: bool, bare: bool = False) -> Pattern:
    """The pattern of a companion with these dims, from that of its weight, with the contracted dimension first or not.

    A `bare` one has no dimensions of size 1: they say nothing, and `dims` brings them back.
    """
    tokens: list[str | None] = list(weight.tokens)
    axis_in, axis_out = AXES[role]
    at_in, at_out = _dimension(weight, axis_in), _dimension(weight, axis_out)
    if at_in != at_out and (at_in < at_out) != in_first:
        tokens[at_in], tokens[at_out] = tokens[at_out], tokens[at_in]
        at_in, at_out = at_out, at_in
    wanted = dims.split()
    if "in" not in wanted:
        tokens[at_in] = _without(tokens[at_in], axis_in)
    if "out" not in wanted:
        tokens[at_out] = _without(tokens[at_out], axis_out)
    for axis in _LACKS.get(wanted[0] if wanted else "", ""):
        tokens = [_without(token, axis) for token in tokens]
    place = {"out one": at_out, "in one": at_in}
    names, tokens = iter(EXTRA), [*tokens, None]
    for before, word in zip(["", *wanted], wanted, strict=False):
        if word in _SIZES and not (bare and word == "one"):
            at = place.get(f"{before} {word}", -1)
            tokens[at] = f"{tokens[at] or ''} {next(names)}{_SIZES[word]}"
    return Pattern(" ".join(" ".join(filter(None, tokens)).split()))


_SIZES: Mapping[str, str] = {"one": "=1", "rest": ""}
"""What the words for other dimensions say of their sizes."""
_LACKS: Mapping[str, str] = {"both": "g", "all": "ge"}
"""The axes that a companion lacks besides those of its GEMM."""


def _dimension(pattern: Pattern, axis: str) -> int:
    return next(i for i, group in enumerate(pattern.groups) if axis in group)


def _without(token: str | None, axis: str) -> str | None:
    """A dimension without an axis and, if that is `n`, without the axes into which it is cut."""
    dropped = CHUNKS if axis == "n" else (axis,)
    kept = [word for word in (token or "").strip("()").split() if word.lstrip("-")[0] not in dropped]
    return f"({' '.join(kept)})" if len(kept) > 1 else "".join(kept) or None
