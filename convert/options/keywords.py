"""Which options each function of the library takes, for editors, type checkers and `help()`.

In: nothing. Out: a `TypedDict` for each function, and `documented`. What the options are stands in `convert.options`.
A test compares names and types of the two.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal, TypedDict, TypeVar, cast

from convert.options import Choices, Format, Running, Verification
from convert.options.option import Named, named

_Function = TypeVar("_Function", bound=Callable[..., object])


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
    copy_all: bool


class _Moved(_Tree, total=False):
    to: Format | None
    keep_chunks: bool
    from_writer: str | None
    base: str | None


class Planning(_Moved, total=False):
    """What `plan` takes."""

    layout: str
    shards: int
    align: int | str
    dequantize: Literal["bf16"] | None


class Prefusing(Planning, _Running, total=False):
    """What `prefuse` takes."""


class Splitting(_Moved, _Running, total=False):
    """What `split` takes."""


class Reformatting(_Tree, _Running, total=False):
    """What `reformat` takes, besides the format."""

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

    base: str | None


class Unfusing(TypedDict, total=False):
    """What `split_params` takes, besides the layout."""

    shards: int
    align: int | str
    family: str | None


class Fusing(Unfusing, total=False):
    """What `prefuse_params` takes."""

    layout: str
    source_layout: str | None


class Syncing(TypedDict, total=False):
    """What `sync_plan` takes, besides the layout."""

    shards: int
    align: int | str
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
    base: str | None


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


def documented(keywords: type) -> Callable[[_Function], _Function]:
    """Show the options in a function's signature and docstring, where `help()` and notebooks look."""

    def with_options(function: _Function) -> _Function:
        found = list(options_of(keywords))
        signature = inspect.signature(function)
        plain = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        shown = [
            inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=_type(keywords, each))
            for each in found
        ]
        whole = signature.replace(parameters=[*plain, *shown])
        lines = [f"    {each.name}: {each.sentence}." for each in found]
        function.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Options:", *lines])

        @functools.wraps(function)
        def checked(*arguments: Any, **keywords: Any) -> object:
            whole.bind(*arguments, **keywords)  # an unknown keyword is a `TypeError`, as of any function
            return function(*arguments, **keywords)

        checked.__signature__ = whole  # type: ignore[attr-defined]
        return cast(_Function, checked)

    return with_options


def _type(keywords: type, each: Named) -> object:
    """The type as it is written above."""
    hint = keywords.__annotations__[each.name]
    return getattr(hint, "__forward_arg__", hint)
