"""The way back: the plan by which a checkpoint is loaded, the other way round, and a tree as the checkpoint that it reads.

In: a plan, a tree. Out: a plan with the checkpoint's own tensors as targets, and a `Reader` of the tree. It never writes.

Each target of a plan holds both layouts and their sizes, so that turning it round is a matter of naming. What the checkpoint
says of itself, its config, side files and headers, is what the tree says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from convert.errors import PlanError, UsageError
from convert.memory import tree
from convert.memory.leaves import Leaf
from convert.pipeline.request import Request
from convert.planning.forms import Targets
from convert.planning.planner import Plan, verbatim
from convert.planning.targets import Target
from layouts.computing import NOTHING
from layouts.disk.pread import Empty
from layouts.language.layout import Placed
from layouts.language.sections import TENSOR
from layouts.reader import Reader, ReadLimits
from layouts.tensors import TensorSpec, bits, numpy_dtype
from layouts.through import Through
from layouts.windows import Windows


def reversed_plan(plan: Plan, like: Reader, out: Path) -> Plan:
    """The plan that makes the checkpoint `like` of what `plan` makes of it.

    What stands beside tensors is what `like` has: a plan between formats leaves out what the other one does not know, such as
    what MaxText keeps of a step.

    Raises:
        PlanError: some of its tensors are not in the plan.
    """
    made: dict[str, Target] = {}
    for target in plan.targets:
        for piece in target.pieces(target.target.pattern.whole(target.sizes)):
            if piece.source in like.tensors and piece.source not in made:
                made[piece.source] = _reversed(target, like.tensors[piece.source])
        if not target.spec.nbytes and target.role == "verbatim":
            made[target.spec.name] = target
    made |= {name: verbatim(spec) for name, spec in plan.values.ones.items() if name in like.tensors}
    made |= {twin: replace(made[other], spec=like.tensors[twin]) for twin, other in plan.twins}
    if lost := [name for name in like.tensors if name not in made]:
        raise PlanError(
            f"{like.path}: {lost[0]} ({len(lost)} such tensors) is not among what is given back; nothing is dropped"
        )
    return replace(
        plan,
        out=out,
        action="save",
        format=like.format,
        layout=str((like.record or {}).get("layout", "native")),
        record=like.record,
        targets=Targets(made[name] for name in like.tensors),
        side_files=dict(sorted({**like.side_files.plain, **plan.side_files}.items())),
        left_out={},
        twins=(),
        computed=None,
        computed_kinds=(),
        exact=False,
        values=NOTHING,
        scanned=None,
    )


def _reversed(target: Target, spec: TensorSpec) -> Target:
    index = {**target.index, **(target.source.key.parse(spec.name) or {})}
    way = target.way
    pattern, sizes = way.stored[int(index[TENSOR]) if len(way.stored) > 1 else 0]
    placed = Placed(way.source.key, pattern)
    back = replace(way, sizes=sizes, source_sizes=way.sizes, source=way.target, target=placed)
    return replace(target, spec=spec, index=index, way=back)


def checked(asked: Request, params: Any) -> dict[str, Leaf]:
    """The leaves of a tree by the names in the plan, each as the plan has it.

    Raises:
        PlanError: leaves are missing, are more than there should be, or are not alike.
    """
    found = {name.partition(".")[2]: each for name, each in tree.flatten(params).items()}
    leaves: dict[str, Leaf] = {}
    for target in asked.plan.targets:
        spec, name = target.spec, asked.names[target.spec.name]
        each = found.pop(name, None)
        if each is None or each.leaf is None:
            have = "is not there" if each is None else f"is a {type(each.node).__name__}"
            raise PlanError(f"{name} {have}; the tree should be as load gives it with the same layout and names")
        wanted, is_like = f"{numpy_dtype(spec.dtype)} {spec.shape}", f"{each.leaf.dtype} {tuple(each.leaf.array.shape)}"
        if wanted != is_like:
            raise PlanError(f"{name} is {is_like}, and {wanted} there; what is saved has the shapes and types of `like`")
        _check_here(name, each.leaf)
        leaves[spec.name] = each.leaf.taken_over(name)
    if found:
        raise PlanError(f"{next(iter(found))} ({len(found)} such leaves) has no place in the checkpoint; nothing is dropped")
    return leaves


def _check_here(name: str, leaf: Leaf) -> None:
    if leaf.kind == "abstract" or isinstance(leaf.array, jax.core.Tracer) or getattr(leaf.array, "is_meta", False):
        raise UsageError(f"{name} is a {type(leaf.array).__name__}: it holds no data; save outside of jit")
    if isinstance(leaf.array, jax.Array) and not leaf.array.is_fully_addressable:
        raise UsageError(f"{name} lies on devices of other processes, too; bring it together with multihost_utils first")


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeReader(Through):
    """Leaves as a checkpoint, with all that another one (`inner`) says besides its tensors; see `layouts.reader.Reader`."""

    leaves: Mapping[str, Leaf]
    tensors: Mapping[str, TensorSpec]
    """Those of the leaves, and of the other one's tensors those that are read there (`convert.pipeline.computed`)."""
    windows: Windows = field(default_factory=Windows)

    def where(self, name: str) -> str:  # noqa: ARG002
        """Memory."""
        return "memory"

    def unit(self, name: str) -> None:  # noqa: ARG002
        """Any part can be read alone."""
        return

    def hold(self, limits: ReadLimits, windows: Windows) -> None:
        """Nothing to do: nothing of the leaves is decoded."""

    def read(self, name: str, slices: tuple[slice, ...], empty: Empty = np.empty) -> NDArray[Any]:
        """A block as bits, from the devices that hold it; no more of these is brought to the host."""
        if name not in self.leaves:
            return self.inner.read(name, slices, empty)
        leaf, dtype = self.leaves[name], bits(self.tensors[name].dtype)
        spans = [range(*part.indices(size)) for part, size in zip(slices, self.tensors[name].shape, strict=True)]
        if leaf.kind == "numpy":
            return _as_bits(leaf.array[(*slices, ...)], dtype)
        if leaf.kind == "torch":
            return _of_torch(leaf.array[(*slices, ...)], dtype)
        out = empty([len(span) for span in spans], dtype)
        done: set[tuple[tuple[int, int], ...]] = set()
        for shard in leaf.array.addressable_shards:
            whole = [range(*part.indices(size)) for part, size in zip(shard.index, leaf.array.shape, strict=True)]
            both = [range(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(spans, whole, strict=True)]
            place = tuple((span.start, span.stop) for span in both)
            if place in done or not all(map(len, both)):
                continue
            done.add(place)
            inside = tuple(slice(b.start - a.start, b.stop - a.start) for a, b in zip(spans, both, strict=True))
            out[inside] = _as_bits(
                _part(shard.data, [range(b.start - w.start, b.stop - w.start) for b, w in zip(both, whole, strict=True)]), dtype
            )
        return out

    def close(self) -> None:
        """Nothing to do: the tree is the caller's."""


def _part(array: jax.Array, spans: Sequence[range]) -> NDArray[Any]:
    """A part of one device's array; it is cut there, where it does not lie in the host's memory."""
    if next(iter(array.devices())).platform == "cpu":
        inside: Any = (*(slice(span.start, span.stop) for span in spans), ...)
        block: NDArray[Any] = np.asarray(array)[inside]
        return block
    return np.asarray(jax.lax.dynamic_slice(array, [span.start for span in spans], [len(span) for span in spans]))


def _as_bits(block: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    return (
        block.view(dtype)
        if block.ndim and block.strides[-1] == block.itemsize
        else np.ascontiguousarray(block).view(dtype).reshape(block.shape)
    )


def _of_torch(block: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    import sys

    torch = sys.modules["torch"]
    flat = block.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    found: NDArray[Any] = flat.view(dtype).reshape(tuple(block.shape))
    return found
