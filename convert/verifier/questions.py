"""What each level of a verification asks, how it goes about it, and what it allows.

In: nothing. Out: `QUESTIONS`. README says the same in fewer words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_BITS = "no bit may differ"
_ROUNDING = "rows of outputs may differ by 16 x 2^-23 x sqrt({terms}) of their norm, as sums of so many float32 terms do"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A level in words."""

    asks: str
    method: str
    bound: str


QUESTIONS: Mapping[str, Question] = {
    "exact": Question(
        asks="Is every weight of every expert, with its biases and scales, the same bits in both, and is all padding zeros?",
        method="each slice is read in logical axes, by code that does not fuse, and compared as unsigned integers",
        bound=_BITS,
    ),
    "others": Question(
        asks="Is every other tensor the same in both?",
        method="by name, element type and shape, then as unsigned integers",
        bound=_BITS,
    ),
    "recorded": Question(
        asks="Do recorded digests say that one was made of the other's tensors, or that both hold the same?",
        method="xxh3-128 from manifests, against one another or against the tensors of the one side that is read",
        bound="no digest may differ, or all bytes are compared",
    ),
    "identity": Question(
        asks="Does the grouped GEMM find every expert's weights where its layout says that they are?",
        method="one-hot tokens read rows of gate, up and down back; a sum of one term is exact in any order",
        bound="no value may differ",
    ),
    "gemm": Question(
        asks="Do the experts compute the same, fused and unfused?",
        method="random tokens, each side in its own form; in the experts that gradients are of also in skewed, empty and "
        "one-token groups. On a CPU ragged_dot is one product for each expert, as on devices, and jax.lax.ragged_dot itself in "
        "the skewed groups",
        bound=_ROUNDING.format(terms="K"),
    ),
    "gradients": Question(
        asks="Do they learn the same?",
        method="gradients of gate, up, down and the input, of the first experts of the first and the last layer",
        bound=_ROUNDING.format(terms="K + N"),
    ),
    "layer": Question(
        asks="Does the whole MoE layer compute the same?",
        method="router, top-k, permute, gate and up, activation, down, unpermute",
        bound=_ROUNDING.format(terms="K + N"),
    ),
    "mesh": Question(
        asks="Do many devices compute what one does?",
        method="the experts on a mesh, against the first side on one device",
        bound=_ROUNDING.format(terms="K + N"),
    ),
    "content": Question(
        asks="Does it hold the tensors of the other side, or of its input, by a digest that anybody can make of each alone?",
        method="a digest (sha256, or xxh3-128 where a manifest has no other) over the sorted list of those of every "
        "logical tensor",
        bound="the digests are the same, or they are not",
    ),
    "files": Question(
        asks="Is what stands beside the tensors the same, or as it was written?",
        method="config.json key by key; side files by xxh3-128; metadata of shards, steps and leaves",
        bound="nothing may differ but what a conversion changes by rule",
    ),
    "digests": Question(
        asks="Is every tensor still what was written?",
        method="each is hashed again (xxh3-128) and compared with the manifest",
        bound=_BITS,
    ),
    "manifest": Question(
        asks="Are the manifest, the headers of shards and the records of the layout what was written together?",
        method="the manifest by its own digest, headers by theirs, records with one another",
        bound="nothing may differ",
    ),
    "delta": Question(
        asks="Does every expert get the same delta W from both sides?",
        method="B @ A (times its scale, where a file has one) of each projection, in float64, where the factors are not "
        "the same numbers",
        bound="what rounding in float64 makes of products of these factors",
    ),
    "settings": Question(
        asks="Do both adapters say the same of themselves?",
        method="adapter_config.json key by key, but for how factors are stored; scales are compared with the factors",
        bound="nothing may differ",
    ),
    "decoded": Question(
        asks="Can every array be read whole?",
        method="all chunks are decoded",
        bound="each has to be",
    ),
}
"""By the name of a level without its backend's."""


def question_of(level: str) -> Question:
    """That of a level; of other backends it is the same."""
    return QUESTIONS[level.partition("/")[0]]
