"""Every option of the tool, once: its name, type, default, unit and sentence.

In: what a caller gives. Out: frozen dataclasses in which every option has a value that was checked. It imports nothing heavy.
The command line (`convert.arguments`), and signatures with their help (`keywords`, `calls`), are made from the fields below.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from convert.options import values
from convert.options.option import Option

Format = Literal["hf", "orbax"]
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
_Base = Annotated[
    str | None,
    Option(
        text="adapters: the checkpoint that it is for: its shapes and family, and what --merge adds to",
        read=values.location,
        show="CKPT",
    ),
]
_SourceLayout = Annotated[
    str | None,
    Option(
        text="the layout of a fused input that does not say so itself; per-shard:8: 8 shards, glu:48: blocks of 48",
        show="NAME",
    ),
]
_Mesh = Annotated[
    Mapping[str, int] | None,
    Option(
        text="devices by the axes of their mesh: --verify runs on so many, too; to orbax: chunks end where their parts do",
        read=values.mesh,
        show="fsdp=16,tensor=4",
        default="one device",
        of=2,
    ),
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
        str, Option(text="target layout of wi and wo; convert --layouts lists them", show="NAME", instead="--source-layout")
    ] = "concat"
    shards: Annotated[
        int, Option(text="tensor-parallel shards of the layouts per-shard and lane", read=values.positive, show="S")
    ] = 1
    align: Annotated[
        int | str | None,
        Option(
            text="per-shard, lane: columns to pad each shard to a multiple of, or maxtext, or maxtext-pow2 (per-shard without "
            "it: 128; lane: no padding)",
            read=values.align,
            show="A",
        ),
    ] = None
    glu_block: Annotated[
        int,
        Option(text="glu, cutedsl: columns of gate that stand together before as many of up", read=values.positive, show="N"),
    ] = 64
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
    drop_mtp: Annotated[
        bool,
        Option(text="between formats: leave out blocks that predict further tokens (MTP)", read=values.switch),
    ] = False
    keep_chunks: Annotated[
        bool,
        Option(text="Orbax: do not cut arrays that are one large chunk (fast; restores read them whole)", read=values.switch),
    ] = False
    mesh: _Mesh = None
    sharding: Annotated[
        str | None,
        Option(
            text="in the place of --mesh: a checkpoint that these devices saved, or its _sharding file",
            read=values.location,
            show="FILE",
        ),
    ] = None
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
        Option(text="compute FP8, NVFP4, MXFP4, MXFP8 and INT4 weights as bfloat16 (not lossless)", choices=("bf16",)),
    ] = None
    compute: Annotated[
        Literal["query-scale", "embedding-scale", "exact-values"] | None,
        Option(
            text="between formats: make what MaxText has of Mixtral's queries (over the root of the head width), of Gemma 4's "
            "embedding (times the root of the embed width; both not lossless), or of DeepSeek-V4's table of experts (float32) "
            "and scales that are ones; or what these were",
            choices=("query-scale", "embedding-scale", "exact-values"),
        ),
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
    mesh: _Mesh = None
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
    trust_digests: Annotated[
        bool,
        Option(
            text="take digests that manifests recorded for the bits, where they cover all tensors and nothing speaks against "
            "them; such tensors are not read",
            read=values.switch,
            of=2,
        ),
    ] = False
    from_writer: _FromWriter = None
    base: _Base = None
