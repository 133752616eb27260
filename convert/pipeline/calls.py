"""The library calls between checkpoints and pipelines; `import convert` has them.

In: paths, trees and options (`convert.options`). Out: trees, reports, functions. Nothing here prints or exits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

from convert.errors import PlanError, UsageError
from convert.options import Choices, Running
from convert.options.calls import documented
from convert.options.keywords import Loading, Saving, Syncing
from convert.options.option import complete

if TYPE_CHECKING:
    from convert.pipeline.request import Names
    from convert.pipeline.sync import Sync
    from convert.progress import Progress
    from convert.report import Report


@documented(Loading)
def load(
    path: str | Path,
    *,
    layout: str | None = None,
    names: Names = None,
    sharding: Any = None,
    dtype: Any = None,
    lazy: bool = False,
    progress: Progress | None = None,
    **options: Unpack[Loading],
) -> dict[str, Any]:
    """Read any checkpoint straight into JAX's arrays, in any layout; each device reads its own bytes only.

    `layout` is a target layout, `native` for experts as they were published, or None for all as it is stored. `names` are those
    of Hugging Face ("hf", one flat dictionary), of MaxText ("maxtext", a nested one), or what a function makes of each, flat:
    of the names of the checkpoint or, as in `("hf", function)`, of theirs; those of the checkpoint if None. `sharding` is one
    for all, a tree of them by the names in the result, or a function of name and shape. `dtype` is one for all floats of 16
    bits and more, or a function of name and stored type; values are rounded to it.
    With `lazy`, leaves have a shape, a type and `load()`, which reads. Otherwise the host holds no more than `memory` besides
    what is on its own devices.

    Raises:
        InputError: the checkpoint is missing or corrupt, or changes while it is read.
        PlanError: no lossless plan exists.
        UsageError: a layout, a name, a sharding or a type that does not exist or does not fit; `memory` is too little.
        OSError: the disk or the store is failing.
    """
    from convert.pipeline.read import read
    from convert.progress import ignore

    choices, running = complete(Choices, options), complete(Running, options)
    return read(path, layout, names, sharding, dtype, choices, running, progress or ignore, lazy=lazy)


@documented(Saving)
def save(
    params: Any,
    path: str | Path,
    *,
    like: str | Path,
    layout: str | None = None,
    names: Names = None,
    progress: Progress | None = None,
    **options: Unpack[Saving],
) -> Report:
    """Write a tree that `load(like, layout=..., names=...)` gave, with other values: the way back, with the same arguments.

    The output is as `like` is: its layout, names, files, config and side files, with a manifest. Leaves come from the devices
    block by block. Values that have not changed give the same files, byte for byte. Computed ones (`compute`) are computed back
    if one of them has changed, and become what `like` has if none has.

    Raises:
        PlanError: a leaf is missing, is one too many, or has another shape or type than it had; or `like` is a tree below
            a root of its own, and names are those of Hugging Face.
        InputError: `like` is missing or corrupt, or what should be padding holds something else than zeros.
        OutputError, StorageError: see `convert.errors`; the output is absent or complete in any case.
        UsageError: as `load`; or leaves lie on devices of other processes.
    """
    from contextlib import closing

    from convert.commit.publish import destination
    from convert.pipeline.request import named_for, opened, request
    from convert.pipeline.save import write
    from convert.progress import ignore
    from layouts.tables.maxtext import ROOT

    choices, running = complete(Choices, options), complete(Running, options)
    with closing(opened(like, choices)) as reader:
        if named_for(names, reader) is not reader:
            raise PlanError(
                f"{like}: its model is below another root than {ROOT.rstrip('.')}, and names of Hugging Face do not lead back "
                f"there; save like a checkpoint of Hugging Face that was made of it (--to=hf)"
            )
        asked = request(reader, layout, names, choices)
        return write(params, asked, reader, destination(path), running, progress or ignore)


@documented(Syncing)
def sync_plan(
    source: Any,
    target: Any,
    *,
    layout: str | None = None,
    names: Names = None,
    source_names: Literal["hf", "maxtext"] = "maxtext",
    config: Mapping[str, Any] | None = None,
    cast: bool = False,
    **options: Unpack[Syncing],
) -> Sync:
    """The pure function that turns a trainer's tree into a server's, planned once; for weight sync in RL.

    `source` and `target` are trees of arrays or of `jax.ShapeDtypeStruct`. `layout` and `names` say what they say in `load`.
    `source_names` is whose names the source has; for the other ones' names, `config` has to be what `config.json` says.
    The result is in the containers and shardings of `target`, and in its element types: these may differ only with `cast`.
    Call it within your own jit, or take `jitted(donate=True)`, which is compiled with the target's shardings.

    Copies of embedding and head that Hugging Face has once more (DeepSeek's MTP blocks) are not compared, unlike in
    `load`: nobody looks at values.

    Raises:
        PlanError: a leaf of the target is not made, a leaf of the source has no place, or shapes or types differ.
        InputError, UsageError: as `load`.
    """
    from convert.pipeline.sync import plan_sync

    if source_names not in ("hf", "maxtext"):
        raise UsageError(f"source_names: {source_names!r} is neither of hf, maxtext")
    return plan_sync(
        source,
        target,
        layout=layout,
        names=names,
        config=config or {},
        hf=source_names == "hf",
        cast_types=cast,
        choices=complete(Choices, options),
    )
