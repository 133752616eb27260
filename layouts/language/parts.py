"""The tensors that make up one projection: the weight, and its companions such as biases, scales and packed forms.

In: a weight's pattern. Out: the pattern of a companion. It knows no model.

A layout states where a projection's weight is. Its companions lie beside it and have fewer or coarser axes: a bias has no
contracted axis, a block scale has one element for a block of the weight. So they need no layout of their own, only this table.

Sources: DeepSeek-V3 `weight_scale_inv`; compressed-tensors `weight_packed`, `weight_shape`, ...; ModelOpt `weight_scale_2`;
Inkling2-Loop `weight_amax`; AutoGPTQ / AutoAWQ `qweight`, `qzeros`, `scales`, `g_idx`; gpt-oss `_blocks`, `_scales`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layouts.language.pattern import Pattern

AXES: Mapping[str, tuple[str, str]] = {"wi": ("k", "n"), "wo": ("n", "k")}
"""Role -> the axis that its GEMM contracts ("in") and the one that it gives ("out")."""
CHUNKS = ("s", "c", "n")
"""The axes into which `n` may be cut, outermost first."""
PACKED_TYPES = frozenset({"U8"})
"""Element types of a weight that hold several values in one element."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A tensor of a projection.

    `word` is its name behind a dot (`gate_proj.weight_scale`) and `name` the one behind an underscore (`gate_up_proj_scale`).
    `dims` are the dimensions it may have, tried in order: `out` and `in`, `one` (a dimension of size 1), `rest` (one of any
    size), or none; `both` is one number for gate and up together. `turned` parts are stored with in and out exchanged against
    the family's weights. Those that are `packed` hold several values in an element, so that in and out keep their order.
    """

    name: str
    word: str
    dims: tuple[str, ...] = ("out in",)
    turned: bool = False
    packed: bool = False


_SCALE = ("out in", "one", "out", "")
_SCALAR = ("one", "", "both")

PARTS: Sequence[Part] = (
    Part(name="", word="weight"),
    Part(name="bias", word="bias", dims=("out",)),
    Part(name="scale_inv", word="weight_scale_inv", dims=_SCALE),
    Part(name="scale", word="weight_scale", dims=_SCALE),
    Part(name="scale_2", word="weight_scale_2", dims=_SCALAR),
    Part(name="global_scale", word="weight_global_scale", dims=_SCALAR),
    Part(name="input_scale", word="input_scale", dims=_SCALAR),
    Part(name="input_global_scale", word="input_global_scale", dims=_SCALAR),
    Part(name="amax", word="weight_amax", dims=_SCALAR),
    Part(name="outer_scale_denominator", word="weight_outer_scale_denominator", dims=_SCALAR),
    Part(name="packed", word="weight_packed", packed=True),
    Part(name="shape", word="weight_shape", dims=("rest",)),
    Part(name="zero_point", word="weight_zero_point", packed=True),
    Part(name="group_index", word="weight_g_idx", dims=("in",)),
    Part(name="block_scale", word="scale", packed=True),  # DeepSeek-V4: two FP4 values to an I8 element
    Part(name="qscale", word="qscale_weight", dims=_SCALE),
    Part(name="qweight", word="qweight", turned=True, packed=True),
    Part(name="qzeros", word="qzeros", turned=True, packed=True),
    Part(name="g_idx", word="g_idx", dims=("in",)),
    Part(name="scales", word="scales", turned=True),
    Part(name="blocks", word="blocks", dims=("out in rest",), turned=True, packed=True),
)


_SLOT = re.compile(r"\{part(?::([a-z_0-9]+))?\}")
_ABSENT = "\0"
"""Begins words that no name has: they keep the places of companions that a key leaves out."""


def words(key: str) -> str:
    """A key with `{part}` as a choice of the words that fit: `.{part}` and `_{part}` have the word, else `_name` or nothing.

    `{part:scale}` leaves out all companions but this one.
    """
    if not (found := _SLOT.search(key)):
        return key
    dotted = key[: found.start()].endswith((".", "_"))
    choice = [part.word if dotted else part.name and f"_{part.name}" for part in PARTS]
    kept = [word if takes(key, part.name) else _ABSENT + word for part, word in zip(PARTS, choice, strict=True)]
    return _SLOT.sub(f"{{part:{','.join(kept)}}}", key)


def takes(key: str, name: str) -> bool:
    """Whether a key has a place for a companion (all have for the weight)."""
    found = _SLOT.search(key)
    return not name or bool(found and found[1] in (None, name))


def only(key: str, name: str) -> str:
    """A key that takes no companions but this one."""
    return _SLOT.sub(f"{{part:{name}}}", key)


def forms(weight: Pattern, role: str, part: Part) -> list[tuple[str, Pattern]]:
    """The dims that a stored companion may have, each with its pattern."""
    order = is_in_first(weight, role) != part.turned
    return [(dims, companion(weight, role, dims, in_first=order)) for dims in part.dims]


def is_in_first(pattern: Pattern, role: str) -> bool:
    """Whether the contracted dimension is stored before the other."""
    contracted, given = (_dimension(pattern, axis) for axis in AXES[role])
    return contracted < given


def companion(weight: Pattern, role: str, dims: str, *, in_first: bool) -> Pattern:
    """The pattern of a companion with these dims, from that of its weight, with the contracted dimension first or not."""
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
    if "both" in wanted:
        tokens = [_without(token, "g") for token in tokens]
    extra = {"one": "d=1", "rest": "d"}
    return Pattern(" ".join(filter(None, [*tokens, *(extra[word] for word in wanted if word in extra)])))


def _dimension(pattern: Pattern, axis: str) -> int:
    return next(i for i, group in enumerate(pattern.groups) if axis in group)


def _without(token: str | None, axis: str) -> str | None:
    """A dimension without an axis and, if that is `n`, without the axes into which it is cut."""
    dropped = CHUNKS if axis == "n" else (axis,)
    kept = [word for word in (token or "").strip("()").split() if word.lstrip("-")[0] not in dropped]
    return f"({' '.join(kept)})" if len(kept) > 1 else "".join(kept) or None
