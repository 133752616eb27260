"""The plan of merging an adapter into a base checkpoint, and the reader that computes it.

In: two paths and choices. Out: an open reader and a plan, which are executed as any other conversion's. It never writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import xxhash

from convert.commit.inventory import read_in_pieces
from convert.errors import PlanError, UsageError, readable
from convert.options import Choices
from convert.options.evidence import known_of
from convert.planning.forms import Targets
from convert.planning.planner import Merging, Plan
from convert.planning.targets import verbatim
from layouts.adapters.describe import Description, describe
from layouts.adapters.merging.pairing import pair
from layouts.adapters.merging.plain import check_types, plain_ones
from layouts.adapters.merging.product import RULE
from layouts.adapters.merging.reader import MergingReader, held
from layouts.adapters.merging.sites import Site
from layouts.adapters.opening import MODEL, config_of, open_adapter
from layouts.adapters.settings import CONFIG, Settings
from layouts.adapters.writers import check_kinds, interleaved, unknown_turns
from layouts.checkpoint import FORMATS, is_adapter, open_checkpoint
from layouts.disk.places import place
from layouts.hf import HFReader
from layouts.matching.describe import Description as Model
from layouts.matching.describe import describe as describe_model
from layouts.reader import Reader
from layouts.tensors import TensorSpec, total_bytes

_USUAL = Choices()
_ALLOWED = frozenset({"base", "family", "source_layout", "from_writer", "copy_all"})


def open_and_merge(source: str | Path, out: Path, choices: Choices) -> tuple[MergingReader, Plan]:
    """Open an adapter and its base and plan their merging; the caller closes the reader.

    Raises:
        UsageError: the one is no adapter, there is no base, or a choice is none of these.
        InputError, PlanError: see `layouts.adapters.merging.pairing`.
    """
    for name in Choices.__dataclass_fields__.keys() - _ALLOWED:
        if getattr(choices, name) != getattr(_USUAL, name):
            raise UsageError(f"--{name.replace('_', '-')} is not for --merge, whose output is as the base")
    if choices.base is None:
        raise UsageError("merge needs the checkpoint that the adapter is for: base")
    if not is_adapter(place(source)):
        open_checkpoint(source).close()  # what is not there at all is said better
        raise UsageError(f"{source} is no LoRA adapter; --merge takes one, and --base the checkpoint that it is for")
    with readable(choices.base):
        base = open_checkpoint(choices.base)
    try:
        if base.format != "hf":
            raise PlanError(
                f"{choices.base} is the base, in the format {FORMATS[base.format].title}; adapters go into safetensors: "
                "make one of a tree with --to=hf, merge, and go back with --to=orbax"
            )
        model = describe_model(base, family=choices.family, source_layout=choices.source_layout)
        with readable(source):
            adapter = open_adapter(place(source))
            try:
                check_kinds(adapter.path, model.family.name)
                return _planned(base, model, adapter, out, choices)
            except BaseException:
                adapter.close()
                raise
    except BaseException:
        base.close()
        raise


def _planned(base: Reader, model: Model, adapter: HFReader, out: Path, choices: Choices) -> tuple[MergingReader, Plan]:
    config = config_of(adapter.path)
    known = known_of(adapter, config, adapter.record or {}, choices, model)
    described = describe(adapter, Settings.of(config, CONFIG), known, experts=False)
    turns = _turns(adapter, described)
    sites = pair(base, model, described, plain_ones(adapter, described), turns=turns)
    check_types(adapter, sites)
    reader = MergingReader(inner=base, adapter=adapter, sites=sites)
    beside, record = base.side_files, base.record
    copied, left_out = beside.chosen(copy_all=choices.copy_all)
    any_rate, each = held(sites)
    plan = Plan(
        source=base.path,
        out=out,
        action="merge",
        format=base.format,
        family=model.family.name,
        layout=str(record["layout"]) if record and "layout" in record else "native",
        record=record,
        targets=Targets(map(verbatim, base.tensors.values())),
        side_files=copied,
        left_out_files=left_out,
        never_copied=beside.never,
        remarks=(*model.remarks, *described.remarks),
        computed="; ".join((RULE, f"adapter xxh3_128 {_digest(adapter.path)}", *described.remarks)),
        merging=Merging(
            adapter=adapter.path,
            nbytes=total_bytes(adapter.tensors),
            names=frozenset(sites),
            lines=tuple(_lines(sites, base.tensors)),
            base=any_rate,
            each=each,
        ),
    )
    return reader, plan


def _turns(adapter: HFReader, described: Description) -> bool:
    """Whether gate and up take turns in the adapter's fused rows."""
    family = described.known.family
    turns = interleaved(family) if family else None
    if turns is None and described.form.fused and described.blocks:
        raise PlanError(f"{adapter.path}: {unknown_turns(family)}")
    return turns is True


def _digest(path: Path) -> str:
    """Of all that an adapter says: its settings, and its tensors with their names."""
    digest = xxhash.xxh3_128()
    for name in (CONFIG, MODEL):
        for piece in read_in_pieces(path / name):
            digest.update(piece)
    return digest.hexdigest()


def _lines(sites: Mapping[str, Site], tensors: Mapping[str, TensorSpec]) -> Iterator[str]:
    """What is computed, folded by kind."""
    kinds: Counter[tuple[str, str]] = Counter()
    for name, site in sites.items():
        folded = ".".join("*" if part.isdigit() else part for part in name.split("."))
        ranks = {(term.unit.rank, scale.factor) for term in site.terms.values() for scale in term.unit.scales}
        parts = ["the adapter's own tensor"] if site.instead else []
        parts += [f"+ {factor:g} * B A of rank {rank}" for rank, factor in sorted(ranks)[:3]]
        more = ", ..." if len(ranks) > 3 else ""
        kinds[f"{folded}  {tensors[name].dtype} {tensors[name].shape}", ", ".join(parts) + more] += 1
    yield from (f"{what}  x{count}  {how}" for (what, how), count in kinds.items())
