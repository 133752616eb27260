"""Match every tensor of a checkpoint against its family's table; nothing is guessed and nothing is left over.

In: an open checkpoint. Out: a description. It never reads data, and never guesses.

The result is complete by construction: each source tensor is in exactly one `Group`, or it is verbatim, or there is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layouts.errors import InputError, PlanError
from layouts.language.layout import Placed
from layouts.language.parts import PARTS, forms
from layouts.language.pattern import Pattern
from layouts.matching.candidates import Candidates, at_home, candidates, record_of
from layouts.matching.checks import check_blocks, check_equal, check_grid, check_said, check_turned, check_type, ungridded
from layouts.matching.group import Group
from layouts.matching.kinds import check_kinds, filled
from layouts.matching.lookup import expert_counts, find_family
from layouts.matching.origin import hf_name, origin_of
from layouts.matching.packing import WEIGHTS, marked
from layouts.matching.refusal import check_beside, hint, lookalikes, without_loras
from layouts.matching.sorting import Key, Sorted, sort_names
from layouts.matching.witness import check_counts, check_layers, check_routers
from layouts.reader import Reader
from layouts.tables.families import Family, families_of, maxtext
from layouts.tensors import TensorSpec, columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A checkpoint in the words of the tables."""

    family: Family
    groups: tuple[Group, ...]
    verbatim: tuple[str, ...]
    loras: tuple[str, ...] = ()
    """A and B of gate and up in a tree of MaxText, which go where these go."""
    remarks: tuple[str, ...] = ()
    """What the plan should say of it."""


_Fitted = tuple[str, Pattern, dict[str, int]]


def describe(
    reader: Reader,
    *,
    family: str | None = None,
    source_layout: str | None = None,
    scan_axis: int | None = None,
    like: Mapping[str, Any] | None = None,
    whole: bool = True,
) -> Description:
    """Say what every tensor of an open checkpoint is. `scan_axis` is where a MaxText tree has its layers, if that is known.

    `like` is the record of something that was made from it, and says what the checkpoint does not say itself. What is not
    `whole` may be a part of one, such as a tree of gradients: MoE blocks without `wi`, or without `wo`.

    Raises:
        PlanError: unknown family, expert tensors that its table does not know, or a fused layout that nobody has named.
        InputError: experts are missing, or differ in shape or element type.
    """
    check_counts(reader)
    found = at_home(_family(reader, family, scan_axis, source_layout), source_layout, record_of(reader))
    known = candidates(reader, found, source_layout, like)
    matched, rest = sort_names(reader, found, known.known)
    verbatim = without_loras(found, rest)
    loras = sorted({*rest} - {*verbatim})
    check_beside(reader, found, (block for _, _, block in matched), verbatim)
    if not matched and not loras:
        raise PlanError(
            f"{reader.path}: no expert weights found where family {found.name} keeps them ({found.experts})"
            f"{hint(reader, found)}. First tensors: {', '.join(sorted(reader.tensors)[:3])}"
        )
    found_in = {each.known.layout for (role, *_), each in matched.items() if role == "wi"}
    if known.said and found_in and known.said not in found_in:
        raise PlanError(
            f"{reader.path}: none of its experts is in layout {source_layout!r}; they are as family {found.name} keeps them. "
            f"Do without --source-layout"
        )
    groups = _groups(reader, matched, known)
    check_blocks(reader, groups, whole=whole)
    check_kinds(reader, found, groups)
    counted = check_routers(reader, groups)
    fresh = not record_of(reader)
    told = (f"family told by names: {found.name}",) if found.by_names and not (family or source_layout) and fresh else ()
    unsure = check_said(reader, groups) if source_layout or told or (found.both_ways and fresh) else ()
    if fresh:
        check_turned(reader, groups)
    remarks = (
        *told,
        *(unsure if source_layout and fresh else ()),
        *counted,
        *check_layers(reader, groups, found.banks),
        *lookalikes(verbatim),
    )
    return Description(family=found, groups=groups, verbatim=tuple(verbatim), loras=tuple(loras), remarks=remarks)


def _family(reader: Reader, override: str | None, scan_axis: int | None, layout: str | None) -> Family:
    stated = record_of(reader).get("family")
    if reader.format == "orbax":
        if hf_name(override):  # the family of the model; that of the tree is its own
            origin_of(reader, override)
            override = None
        asked = None if scan_axis is None else maxtext(scan_axis).name
        wanted = override or asked or stated or maxtext().name
    else:
        wanted = override or stated
    names, where = list(reader.tensors), reader.path
    found = find_family(reader.config, names, where=where, format=reader.format, override=wanted, layout=layout)
    recorded = next((each for each in families_of(reader.format) if each.name == stated), found)
    if recorded.name != found.name and not recorded.by_names:  # names tell less than a user who knows the model
        said = f"--family={override}" if override else f"--scan-axis={scan_axis}"
        raise PlanError(f"{where}: its record says that it is of family {stated!r}; do without {said}")
    return filled(reader, found)


def _groups(reader: Reader, matched: Sorted, known: Candidates) -> tuple[Group, ...]:
    """The groups; those of `wo` first, because it says how much of a padded `wi` is real, and weights before companions."""
    made: dict[Key, Group] = {}
    first: dict[tuple[str, Any], Group] = {}
    tensors, stated = columns(reader.tensors), expert_counts(reader.config)
    for key in sorted(matched, key=lambda key: (key[0] == "wi", PARTS[key[1]].name not in WEIGHTS)):
        role, part, block = key
        each, placed = matched[key].known, matched[key].placed
        names = tensors.picked(np.sort(np.concatenate(matched[key].rows)))
        entry = known.stored.get(names[0]) or known.stored.get(f"{role}.{PARTS[part].name}")
        if entry is None:
            found = forms(placed.pattern, role, PARTS[part]) if part else (("out in", placed.pattern),)
            sizes = _beside(placed.pattern, made.get(("wo", 0, block)))
        else:
            found, sizes = ((entry.dims, Pattern(entry.pattern)),), dict(entry.unpadded)
        check_equal(reader, tensors.of_each_kind(names), PARTS[part].name)
        place = placed.key.bind("part", part)
        seen = matched[key].experts
        grid = check_grid(reader, role, place, dict(block), names, min((n for n in stated if n >= seen), default=seen))
        weight = matched.get((role, 0, block))
        scan = _scan_axes(reader, weight.placed.pattern, weight.first) if weight else None
        spec, beside = reader.tensors[names[0]], first.get((role, block))
        check_type(reader, spec, PARTS[part])
        dims, pattern, all_sizes = _fit(reader, spec, found, sizes | grid, scan, beside, stated)
        made[key] = Group(
            role=role,
            part=PARTS[part].name,
            dims=dims,
            placed=Placed(place, pattern),
            index=dict(block),
            sizes=grid | all_sizes,
            dtype=spec.dtype,
            names=names,
            layout=each.layout,
            native=each.natives[each.native_of.get(names[0], 0)] if each.natives else each.layout,
            relaid=bool(each.natives),
        )
        first.setdefault((role, block), made[key])
    return marked(reader, [made[key] for key in matched])


def _beside(pattern: Pattern, wo: Group | None) -> dict[str, int]:
    """How much of a padded `n` is real, from a `wo` beside it that is not padded."""
    if wo is None or "n" not in pattern.padding or "n" in wo.placed.pattern.padding:
        return {}
    return {"n": wo.total("n") // pattern.fixed.get("s", 1)}


def _fit(
    reader: Reader,
    spec: TensorSpec,
    found: Sequence[tuple[str, Pattern]],
    known: Mapping[str, int],
    scan: int | None,
    weight: Group | None,
    stated: frozenset[int],
) -> _Fitted:
    """The first form that a tensor of this shape can have, with its sizes; its weight is stacked along `scan` axes.

    `stated` are the numbers of experts in `config.json`. A form for as many experts as the weight has goes first: `[1]` is one
    number for all of them, not for one expert.
    """
    flat = {"e": min(stated)} if len(stated) == 1 and any("e" in g and len(g) > 1 for g in found[0][1].groups) else {}
    problems: list[ValueError] = []
    fits: list[_Fitted] = []
    for dims, form in found:
        try:
            if scan is not None and "..." in form.axes and _extra(form, len(spec.shape)) != scan:
                raise ValueError(f"shape {spec.shape} is not of the form '{form.text}' behind {scan} scan axes")
            pattern = form.expand(len(spec.shape))
            sizes = pattern.sizes(spec.shape, {"g": 2, **flat, **known})
            if weight and len(found) > 1 and "out" in dims.split() and (why := ungridded(weight, sizes)):
                problems.insert(0, ValueError(why))
                continue
        except ValueError as error:
            problems.append(error)
            continue
        if weight is None or sizes.get("e") in (None, weight.sizes.get("e")):
            fits.insert(0, (dims, pattern, sizes))
            break
        fits.append((dims, pattern, sizes))
    for dims, pattern, sizes in fits[:1]:
        have = {**known, **sizes}.get("e")
        if stated and have is not None and have not in stated:
            said = " or ".join(map(str, sorted(stated)))
            raise InputError(f"{reader.path}: {spec.name} is of {have} experts, but config.json says {said}")
        return dims, pattern, sizes
    raise PlanError(f"{reader.path}: {spec.name} (in {reader.where(spec.name)}): {problems[0]}")


def _scan_axes(reader: Reader, pattern: Pattern, name: str) -> int | None:
    """How many axes `...` stands for in a weight, by its rank."""
    return _extra(pattern, len(reader.tensors[name].shape)) if "..." in pattern.axes else None


def _extra(pattern: Pattern, rank: int) -> int:
    return rank - len(pattern.groups) + 1
