"""The MoE layers of a Hugging Face checkpoint and of a MaxText tree, side by side, each in whatever layout it is in.

In: two open checkpoints. Out: pairs of MoE layers. It never compares them.

A layer of the one is a place in a stack of the other, by the rows of both tables; what is read there is read as everywhere in
this package.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from convert.errors import PlanError
from convert.planning.across.pairs import Pair, Sides, names_of, pairs_of, there, trees_of
from convert.planning.across.plan import config_of, fused_in, stacked_along
from convert.planning.across.stacks import mtp_places
from convert.planning.across.which import tree_in, written_as
from convert.verifier.bits.counts import Counts, expert_words, layer_words, nbytes_of, skipped_words
from convert.verifier.bits.logical import Block, Scope, blocks, key_of
from convert.verifier.bits.logical import pair as pair_of
from convert.verifier.sides import Said, described_as
from layouts.language.layout import ROLES
from layouts.matching.candidates import record_of
from layouts.matching.checks import check_equal
from layouts.matching.describe import Description
from layouts.matching.group import Group
from layouts.matching.lookup import find_family
from layouts.matching.origin import hf_name, origin_of
from layouts.reader import Reader
from layouts.tables.families import families_of
from layouts.tables.maxtext import LAYERS, MTP
from layouts.tensors import TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Formats:
    """Two checkpoints, and the kinds of tensors that both have, from MaxText's side to that of Hugging Face.

    `left_out` is how names begin that the record of the tree says it was made without.
    """

    hf: Reader
    tree: Reader
    config: Mapping[str, Any]
    sides: Sides
    pairs: tuple[Pair, ...]
    described: Description
    left_out: tuple[str, ...] = ()

    def lacks(self, name: str) -> bool:
        """Whether the user has left a tensor of Hugging Face out."""
        return bool(self.left_out) and name.startswith(self.left_out)


def formats_of(hf: Reader, tree: Reader, said: tuple[Said, Said] = (Said(), Said()), scan_axis: int | None = None) -> Formats:
    """What the tables say of both, the record of either, and of what these leave open what was `said` of either.

    Raises:
        PlanError: no MaxText tree is known for the family, or nothing says in which layout fused experts are.
    """
    config, origin = config_of(hf), origin_of(tree, said[1].family)
    trees = {family.name for family in families_of("orbax")}  # said of both, such a name is about the tree alone
    named = None if said[0].family in trees else said[0].family
    named = named or record_of(hf).get("family") or origin.family
    found = find_family(config, list(hf.tensors), where=hf.path, format="hf", override=named)
    rows, scan = tree_in(tree, written_as(hf, trees_of(found, hf.path)))
    where = stacked_along(tree, _axis_said(tree, said[1].family) if scan_axis is None else scan_axis)
    stated = None if record_of(tree).get("layout") and not said[1].own else said[1].layout
    stored, real = fused_in(tree, where, stated)
    described = described_as(hf, found.name, said[0], [origin.layout])
    # Of the Hugging Face side only places are asked here, which are the same in all of its layouts.
    sides = Sides(family=found, tree=where, hf=found.native[0], maxtext=stored, scan=scan, to_maxtext=False, real=real)
    pairs = tuple(there(pairs_of(rows, sides, config), tree.tensors))
    left_out = mtp_places(rows, config) if origin.without and not any(pair.block.startswith(MTP) for pair in pairs) else ()
    return Formats(hf=hf, tree=tree, config=config, sides=sides, pairs=pairs, described=described, left_out=left_out)


def _axis_said(tree: Reader, family: str | None) -> int | None:
    """Where the layers of a tree are by the name of its own family, if that is what is said of it.

    Raises:
        PlanError: there is no such family.
    """
    if family is None or hf_name(family):
        return None
    return find_family({}, (), where=tree.path, format="orbax", override=family).scan_axis


def counts_of(both: Formats) -> Counts:
    """How much of both is compared by its bits, which is all that the tables know a place for."""
    hf, tree = both.hf, both.tree
    left, right = layers_of(both, Scope())
    compared = [block for block, _ in pair_of(left, right)]
    known = {name for pair in both.pairs for name in names_of(pair)}
    lonely = sum(name not in known for name in tree.tensors)
    return Counts(
        layers=layer_words(None, len(compared), both.config),
        experts=expert_words([block.experts for block in compared], both.config),
        nbytes=sum(map(nbytes_of, left.values())) + sum(hf.tensors[name].nbytes for name in both.described.verbatim),
        skipped=skipped_words(0, lonely),
        stacked=any(set(LAYERS) & set(stack[0].source.pattern.axes) for stack in _stacks(both.pairs)),
    )


def all_layers_of(both: Formats) -> dict[str, Block]:
    """The MoE layers of the Hugging Face side, whatever is compared of them."""
    found = blocks(both.hf, both.described)
    return {key: block for key, block in found.items() if not any(map(both.lacks, _names(block)))}


def _names(block: Block) -> list[str]:
    return [name for group in block.groups.values() for name in group.names]


def layers_of(both: Formats, scope: Scope) -> tuple[dict[str, Block], dict[str, Block]]:
    """The MoE layers of both under the same keys, as far as they are in the scope; also those that only one side has."""
    left = {key: block for key, block in all_layers_of(both).items() if scope.holds(block)}
    every = (item for stack in _stacks(both.pairs) for item in _blocks(both, stack))
    right = {key: block for key, block in every if key in left or scope.layers is None}
    return left, right


def _stacks(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    """The expert tensors that stand at one place in the tree."""
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair.role in ROLES:
            found.setdefault(pair.source.key.text.rpartition(".")[0], []).append(pair)
    yield from found.values()


def _blocks(both: Formats, pairs: list[Pair]) -> Iterator[tuple[str, Block]]:
    """Each layer of a stack, under the key of the same layer in Hugging Face."""
    family = both.sides.family
    place = family.native[0][pairs[0].role].template(family.experts)
    for at in _points(both.tree, pairs[0]):
        scan = {axis: i for axis, i in at.items() if axis in pairs[0].source.pattern.axes}
        index = {axis: i for axis, i in at.items() if axis not in scan}
        groups = {(pair.role, pair.part): group for pair in pairs if (group := _group(both, pair, index))}
        name = pairs[0].target.key.render({**at, "e": 0, "g": 0})
        if groups:
            yield key_of(place.parse(name) or {}, {}), Block(reader=both.tree, groups=groups, scan=scan, label=name)


def _points(tree: Reader, first: Pair) -> Iterator[dict[str, int]]:
    """The layers of a stack: as many as it has, whatever `config.json` says, or one too many would not be seen.

    The run of layers in each step is what names are made from; a longer one is a difference of level `others`.
    """
    axes = [axis for axis in LAYERS if axis in first.counts]
    spec = next((tree.tensors[name] for name in names_of(first) if name in tree.tensors), None)
    have = _sizes(tree, first, spec) if spec else {}
    counts = {axis: have.get(axis, first.counts[axis]) for axis in axes}
    counts |= {axis: min(counts[axis], first.counts[axis]) for axis in axes[1:]}
    for point in itertools.product(*(range(counts[axis]) for axis in axes)):
        yield dict(zip(axes, point, strict=True))


def _group(both: Formats, pair: Pair, index: Mapping[str, int]) -> Group | None:
    """What the tree has of a kind in a layer, if it has it."""
    halves = range(2) if "g" in pair.source.key.slots else range(1)
    names = tuple(pair.source.key.render({**index, "g": g}) for g in halves)
    if any(name not in both.tree.tensors for name in names):
        return None
    check_equal(both.tree, [both.tree.tensors[name] for name in names])
    spec = both.tree.tensors[names[0]]
    return group_of(both.sides, pair, index, names, spec.dtype, _sizes(both.tree, pair, spec))


def group_of(
    sides: Sides, pair: Pair, index: Mapping[str, int], names: tuple[str, ...], dtype: str, sizes: Mapping[str, int]
) -> Group:
    """One kind of expert tensors of a tree, as a description would have it."""
    layout = sides.maxtext[pair.role]
    return Group(
        role=pair.role,
        part=pair.part,
        dims="out" if pair.part == "bias" else "out in",
        placed=pair.source,
        index=index,
        sizes=sizes,
        dtype=dtype,
        names=names,
        layout=layout,
        native=layout,
        relaid=False,
    )


def _sizes(tree: Reader, pair: Pair, spec: TensorSpec) -> dict[str, int]:
    """By the shape, not by what `config.json` says that it should be: what differs is a difference.

    Raises:
        PlanError: the shape has other dimensions.
    """
    known = {axis: size for axis, size in pair.counts.items() if axis == "g" or axis in pair.source.key.slots}
    try:
        return {**known, **pair.source.pattern.sizes(spec.shape, {**known, **pair.real})}
    except ValueError as error:
        raise PlanError(f"{tree.path}: {spec.name} (in {tree.where(spec.name)}): {error}") from None
