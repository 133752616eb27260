"""What a user may choose of the tensors of an output; how they are written is not among it (`convert.run.Options`)."""

from __future__ import annotations

from dataclasses import dataclass

from convert.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """The choices of one conversion.

    `layout` is the target, and `shards` and `align` (columns, or `maxtext`) are for those that are cut for tensor parallelism.
    `family` and `source_layout` say what the input does not. `to` is the format of the output, `hf` or `orbax`, if not the
    input's; `scan` whether layers are stacked in a MaxText tree that is written, `scan_axis` along which axis they are in one
    that is read or written. `params_only` leaves out the training state of one that is read on the way to Hugging Face,
    `drop_optimizer` the state of an Orbax checkpoint's optimizer. `keep_chunks` keeps the chunks of one even where an array is
    one large chunk. `dequantize` computes values as `bf16`.
    """

    layout: str = "concat"
    shards: int = 1
    align: int | str = 128
    family: str | None = None
    source_layout: str | None = None
    to: str | None = None
    scan: bool = True
    scan_axis: int | None = None
    params_only: bool = False
    drop_optimizer: bool = False
    keep_chunks: bool = False
    dequantize: str | None = None

    def check(self) -> None:
        """See that each choice is one.

        Raises:
            UsageError: it is not; the message lists what there is.
        """
        from layouts.tables.natives import SOURCES  # not for `convert --help`
        from layouts.tables.targets import TARGETS

        source = (self.source_layout or self.layout).partition(":")[0]
        for name, known in ((self.layout, TARGETS), (source, {**TARGETS, **SOURCES})):
            if name not in known:
                raise UsageError(f"no layout is called {name!r}; known: {', '.join(known)}")
        if self.shards < 1 or (self.align != "maxtext" and (not isinstance(self.align, int) or self.align < 1)):
            found = f"{self.shards} and {self.align!r}"
            raise UsageError(f"shards and align are positive numbers, or align is 'maxtext'; found {found}")
        if self.shards > 1 and "{shards}" not in TARGETS[self.layout]["wi"].pattern:
            raise UsageError(f"layout {self.layout!r} is not cut into shards; did you mean --layout per-shard?")
        if self.dequantize not in (None, "bf16"):
            raise UsageError(f"values can be computed as bf16 only, not as {self.dequantize!r}")
        if self.scan_axis not in (None, 0, 1):
            raise UsageError(f"layers are stacked along axis 0 or 1, not {self.scan_axis}")
