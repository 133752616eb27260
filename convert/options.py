"""Every option of the tool, once: its name, type, default, unit and sentence.

In: what a caller gives. Out: frozen dataclasses in which every option has a value that was checked. It imports nothing heavy.
The command line (`convert.arguments`), the signatures and their help (`convert.keywords`) are made from the fields below.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from convert import values
from convert.errors import UsageError

Format = Literal["hf", "orbax"]
_Options = TypeVar("_Options")


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What is said of an option besides its name, type and default.

    `text` is its sentence, `read` takes a word or a value and raises `ValueError` if it is none. `choices` are all there are.
    `show` stands for the value in the help, and `default` for the default where that reads better. `instead` is what may have
    been meant where an action does not take it. `of` is for how many checkpoints it is, where it is not for any number.
    """

    text: str
    read: Callable[[object], Any] = values.word
    choices: tuple[str, ...] = ()
    show: str = ""
    default: str = ""
    instead: str = ""
    of: int | None = None
    either: bool = False
    """Of a switch that is off: whether it can be said that it is off, since a command may turn it on."""


_OF = {
    1: "{flag} is for one checkpoint: where two are compared, every chunk is decoded",
    2: "{name}: the digests of one checkpoint are compared as a whole; name a second one for this",
}
"""Why an option is for so many checkpoints: what is said to who gives it for another number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """An option with its name and its default."""

    name: str
    default: Any
    option: Option

    @property
    def is_switch(self) -> bool:
        """Whether it is on or off."""
        return self.option.read is values.switch

    @property
    def flag(self) -> str:
        """As it is called on the command line; a switch that is on is called by what turns it off."""
        return f"--{'no-' if self.is_switch and self.default else ''}{self.name.replace('_', '-')}"

    @property
    def sentence(self) -> str:
        """What the option is, and its default where there is something to say."""
        usual = None if self.is_switch else self.default
        shown = self.option.default or ("" if usual is None else str(usual))
        whose = {1: "of one checkpoint: ", 2: "of two: "}.get(self.option.of or 0, "")
        return f"{whose}{self.option.text}{f' (default: {shown})' if shown else ''}"

    def value(self, given: object) -> Any:
        """What a caller gives, as the tool takes it.

        Raises:
            ValueError: it is not what the option takes.
        """
        if given is None and self.default is None:
            return None
        if self.option.choices and given not in self.option.choices:
            raise ValueError(f"{given!r} is none of {', '.join(self.option.choices)}")
        return self.option.read(given)


_Memory = Annotated[
    int, Option(text="bound on resident memory, in bytes or as 2GiB", read=values.size, show="SIZE", default="2GiB")
]
_Jobs = Annotated[int | None, Option(text="workers", read=values.positive, show="N", default="one per CPU, at most 8")]
_Family = Annotated[str | None, Option(text="take this family instead of what config.json says", show="NAME")]
_ScanAxis = Annotated[
    int | None,
    Option(
        text="Orbax: where MaxText's layers are stacked, its param_scan_axis",
        read=values.axis,
        show="{0,1}",
        default="as the tree says, else 1",
    ),
]
_FromWriter = Annotated[
    str | None,
    Option(
        text="adapters: the program that wrote it, where the file does not say: peft-0.18, unsloth-2026.9.5, megatron-bridge",
        show="NAME",
    ),
]
_Base = Annotated[str | None, Option(text="adapters: the checkpoint that it is for, for its shapes and family", show="CKPT")]
_SourceLayout = Annotated[
    str | None,
    Option(text="the layout of a fused input that does not say so itself; per-shard:8 has 8 shards", show="NAME"),
]
_Content = Annotated[
    bool,
    Option(
        text="the digest of what is held, as --digest makes it: of the input into the manifest, of each side into the "
        "verdict (on with --json and --report)",
        read=values.switch,
        either=True,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What a user may choose of the tensors of an output; how they are written is not among it."""

    layout: Annotated[
        str, Option(text="target layout of wi and wo; convert --families lists them", show="NAME", instead="--source-layout")
    ] = "concat"
    shards: Annotated[
        int, Option(text="tensor-parallel shards of the layouts per-shard and lane", read=values.positive, show="S")
    ] = 1
    align: Annotated[
        int | str,
        Option(text="per-shard: columns to pad each shard to, or maxtext, or maxtext-pow2", read=values.align, show="A"),
    ] = 128
    family: _Family = None
    source_layout: _SourceLayout = None
    to: Annotated[Format | None, Option(text="format of the output, if another than the input's", choices=("hf", "orbax"))] = (
        None
    )
    scan: Annotated[
        bool, Option(text="to orbax: stack the layers of a MaxText tree; else a subtree for each layer", read=values.switch)
    ] = True
    scan_axis: _ScanAxis = None
    params_only: Annotated[bool, Option(text="to hf: leave out step and optimizer state", read=values.switch)] = False
    drop_optimizer: Annotated[
        bool, Option(text="Orbax: leave out the optimizer's state, which cannot always be fused (muon)", read=values.switch)
    ] = False
    keep_chunks: Annotated[
        bool,
        Option(text="Orbax: do not cut arrays that are one large chunk (fast; restores read them whole)", read=values.switch),
    ] = False
    copy_all: Annotated[
        bool,
        Option(
            text="copy what else lies beside the model, too: weights in other formats, adapters, foreign indexes "
            "(left out, and listed by --dry-run)",
            read=values.switch,
        ),
    ] = False
    dequantize: Annotated[
        Literal["bf16"] | None,
        Option(text="compute FP8 block and MXFP4 weights as bfloat16 (not lossless)", choices=("bf16",)),
    ] = None
    from_writer: _FromWriter = None
    base: _Base = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """How an output is written. Sizes are in bytes, or words such as `2GiB`."""

    jobs: _Jobs = None
    memory: _Memory = 2 << 30
    max_shard_size: Annotated[
        int, Option(text="data in one safetensors file, in bytes or as 5GB", read=values.size, show="SIZE", default="5GB")
    ] = 5_000_000_000
    resume: Annotated[bool, Option(text="go on with what an interrupted run has left", read=values.switch)] = True
    overwrite: Annotated[bool, Option(text="replace the output once the new one is complete", read=values.switch)] = False
    content: _Content = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What is compared, and how: all layers and experts if None."""

    gemm: Annotated[bool, Option(text="run grouped GEMMs, too; else compare the weights only", read=values.switch)] = True
    layers: Annotated[
        Collection[int] | None, Option(text="only these layers", read=values.numbers, show="0,3-5", default="all", of=2)
    ] = None
    experts: Annotated[
        Collection[int] | None, Option(text="only these experts", read=values.numbers, show="0,3-5", default="all", of=2)
    ] = None
    tokens: Annotated[int, Option(text="T times the tokens of each probe", read=values.positive, show="T", of=2)] = 1
    backend: Annotated[str, Option(text="which grouped GEMM; all for all that run here", show="NAME", of=2)] = "ragged_dot"
    mesh: Annotated[
        Mapping[str, int] | None,
        Option(text="run on so many devices, too", read=values.mesh, show="expert=4,model=2", default="one device", of=2),
    ] = None
    allow_not_run: Annotated[
        bool, Option(text="accept that a level cannot run (no GEMM here takes the type of the experts)", read=values.switch)
    ] = False
    jobs: _Jobs = None
    memory: _Memory = 2 << 30
    scan_axis: _ScanAxis = None
    family: _Family = None
    source_layout: _SourceLayout = None
    family_b: Annotated[
        str | None, Option(text="the second one's family, where it is another", show="NAME", default="as --family", of=2)
    ] = None
    source_layout_b: Annotated[
        str | None, Option(text="the second one's layout, where it is another", show="NAME", default="as --source-layout", of=2)
    ] = None
    decode: Annotated[
        bool,
        Option(text="decode chunks that are kept as they were stored, too", read=values.switch, of=1),
    ] = False
    content: _Content = False
    self_test: Annotated[
        bool,
        Option(
            text="flip one bit in memory, and see that each level sees it that must (on with --json and --report)",
            read=values.switch,
            either=True,
        ),
    ] = False
    from_writer: _FromWriter = None
    base: _Base = None


def workers(jobs: int | None) -> int:
    """How many workers that is: as many as asked for, else one per CPU that we may use, at most 8."""
    return jobs or min(8, len(os.sched_getaffinity(0)))


def named(kind: type[Any]) -> Iterator[Named]:
    """The options of one of these dataclasses, in their order."""
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        yield Named(name=field.name, default=field.default, option=hints[field.name].__metadata__[0])


def complete(kind: type[_Options], given: Mapping[str, Any], *, of: int | None = None) -> _Options:
    """The options of this kind that are given, checked, and the defaults of the others, for this many checkpoints.

    Raises:
        UsageError: a value is not what its option takes, or it is for another number of checkpoints; names the argument.
    """
    found = {}
    for each in named(kind):
        if each.name in given:
            if of and each.option.of not in (None, of) and given[each.name] not in (None, False):
                raise UsageError(_OF[each.option.of].format(flag=each.flag, name=each.name))
            try:
                found[each.name] = each.value(given[each.name])
            except ValueError as error:
                raise UsageError(f"{each.name}: {error}") from None
    return kind(**found)
