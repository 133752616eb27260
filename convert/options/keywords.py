"""Which options each function of the library takes, for editors, type checkers and `help()`.

In: nothing. Out: a `TypedDict` for each function. What the options are stands in `convert.options`; a test compares names and
types of the two. `convert.options.calls` puts them into signatures.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Literal, TypedDict

from convert.options import Choices, Format, Running, Verification
from convert.options.option import Named, named


class _Running(TypedDict, total=False):
    jobs: int | None
    memory: int | str
    max_shard_size: int | str
    resume: bool
    overwrite: bool
    content: bool


class _Tree(TypedDict, total=False):
    family: str | None
    source_layout: str | None
    scan: bool
    scan_axis: int | None
    params_only: bool
    drop_optimizer: bool
    drop_mtp: bool
    mesh: Mapping[str, int] | str | None
    sharding: str | Path | None
    copy_all: bool


class _Moved(_Tree, total=False):
    to: Format | None
    keep_chunks: bool
    compute: Literal["query-scale", "embedding-scale", "exact-values"] | None
    from_writer: str | None
    base: str | Path | None


class Planning(_Moved, total=False):
    """What `plan` takes."""

    layout: str
    shards: int
    align: int | str | None
    glu_block: int
    dequantize: Literal["bf16"] | None


class Prefusing(Planning, _Running, total=False):
    """What `prefuse` takes."""


class Splitting(_Moved, _Running, total=False):
    """What `split` takes."""


class Reformatting(_Tree, _Running, total=False):
    """What `reformat` takes, besides the format."""

    compute: Literal["query-scale", "embedding-scale", "exact-values"] | None
    dequantize: Literal["bf16"] | None


class Merging(TypedDict, total=False):
    """What `merge` takes, besides the base."""

    jobs: int | None
    memory: int | str
    resume: bool
    overwrite: bool
    family: str | None
    source_layout: str | None
    copy_all: bool
    from_writer: str | None


class MergingInto(Merging, total=False):
    """The same with the base, as the command takes it."""

    base: str | Path | None


class Unfusing(TypedDict, total=False):
    """What `split_params` takes, besides the layout."""

    shards: int
    align: int | str | None
    glu_block: int
    family: str | None


class Fusing(Unfusing, total=False):
    """What `prefuse_params` takes."""

    layout: str
    source_layout: str | None


class Syncing(TypedDict, total=False):
    """What `sync_plan` takes, besides the layout."""

    compute: Literal["query-scale", "embedding-scale", "exact-values"] | None
    shards: int
    align: int | str | None
    glu_block: int
    family: str | None
    source_layout: str | None
    scan: bool
    scan_axis: int | None


class _Held(Syncing, total=False):
    params_only: bool
    drop_optimizer: bool
    memory: int | str
    jobs: int | None


class Loading(_Held, total=False):
    """What `load` takes, besides the layout."""

    dequantize: Literal["bf16"] | None


class Saving(_Held, total=False):
    """What `save` takes, besides the layout."""

    overwrite: bool
    copy_all: bool


class Verifying(TypedDict, total=False):
    """What `verify` takes."""

    gemm: bool
    layers: Collection[int] | str | None
    experts: Collection[int] | str | None
    tokens: int
    backend: str
    mesh: Mapping[str, int] | str | None
    allow_not_run: bool
    jobs: int | None
    memory: int | str
    scan_axis: int | None
    family: str | None
    source_layout: str | None
    family_b: str | None
    source_layout_b: str | None
    decode: bool
    content: bool
    self_test: bool
    trust_digests: bool
    from_writer: str | None
    base: str | Path | None


class Digesting(TypedDict, total=False):
    """What `digest` takes."""

    memory: int | str
    scan_axis: int | None
    family: str | None
    source_layout: str | None


class Inspecting(TypedDict, total=False):
    """What `inspect` takes."""

    family: str | None
    source_layout: str | None
    scan_axis: int | None


def options_of(keywords: type) -> Iterator[Named]:
    """The options that are among these keywords, in the order of their definitions."""
    kinds = (Verification,) if keywords in (Verifying, Digesting) else (Choices, Running)
    yield from (each for kind in kinds for each in named(kind) if each.name in keywords.__annotations__)
