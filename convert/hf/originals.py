"""Keep the originals of computed tensors: a safetensors file of their own beside the tree that has the computed ones.

In: a plan, the open input. Out: the file in the stage, durable, and digests of what it holds. It never publishes.

The tensors are those of the tree, by their names, shapes and types, with the values that they were computed from. So whoever
reads both can tell whether the rule makes of the one what the other is. The file is written once, before the arrays; a run that
is interrupted in it begins it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from convert.commit.recorded import TensorEntry, load
from convert.commit.stage import AnyStage
from convert.commit.store import StoreStage
from convert.engine.budget import STRIP
from convert.engine.copying import Worker, write_tensor
from convert.engine.direct import Output
from convert.hf.objects import ObjectOutput, remove_parts
from convert.hf.shards import File, file_of
from convert.planning.across.computed import kept_bytes, originals_of
from convert.planning.planner import Plan
from convert.planning.targets import Target
from convert.progress import Progress
from layouts.computing import uncomputed
from layouts.disk.upload import Upload
from layouts.reader import Reader
from layouts.side_files import ORIGINALS

_NOTE = "original:"
"""What stands before the name of a tensor in the journal, where its computed form stands, too."""


def keep_originals(plan: Plan, reader: Reader, stage: AnyStage, progress: Progress) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Write the file, if the stage does not hold it yet; what the manifest says of the tensors in it, and the user should know.

    Of a tree that comes with such a file, which is copied like any other beside it, it says what it said before.

    Raises:
        OSError: the disk or the store is full or failing.
        InputError: data of the input, or its manifest, cannot be read.
    """
    if ORIGINALS in plan.side_files:
        before = load(plan.source)
        return ({name: entry.json() for name, entry in before.originals.items()} if before else {}), ()
    targets = {target.spec.name: target for target in originals_of(plan)}
    if not targets:
        return {}, ()
    file = file_of(ORIGINALS, (target.spec for target in targets.values()), {})
    notes = remove_parts(stage, (file,)) if isinstance(stage, StoreStage) else ()
    digests = _written(plan, targets, file, reader, stage, progress)
    specs = (target.spec for target in targets.values())
    return {s.name: TensorEntry(dtype=s.dtype, shape=s.shape, digest=digests[s.name]).json() for s in specs}, notes


def _written(
    plan: Plan, targets: Mapping[str, Target], file: File, reader: Reader, stage: AnyStage, progress: Progress
) -> dict[str, str]:
    done = {name: stage.done.get(_NOTE + name) for name in targets}
    if _is_there(stage, file) and all(done.values()):
        progress(kept_bytes(plan))
        return {name: str(digest) for name, digest in done.items()}
    worker, found = Worker.make(uncomputed(reader), STRIP), dict[str, str]()
    with _opened(stage, file) as output:
        for name, offset in file.offsets.items():  # from front to back, as a store takes them
            found |= write_tensor(targets[name], output, offset, worker, progress)
    stage.record({_NOTE + name: found[name] for name in targets})
    return {name: found[name] for name in targets}


@contextmanager
def _opened(stage: AnyStage, file: File) -> Iterator[Output]:
    """The file with its head, made anew; durable in the end."""
    if isinstance(stage, StoreStage):
        with Upload(stage.out / file.name, file.size) as upload:
            upload.put(memoryview(file.head), 0)
            yield cast(Output, ObjectOutput(upload))
        return
    stage.folder.remove(file.name)
    stage.folder.reserve(file.name, file.size, head=file.head)
    with Output(stage.folder, file.name) as output:
        yield output
    stage.folder.sync(file.name)


def _is_there(stage: AnyStage, file: File) -> bool:
    if isinstance(stage, StoreStage):
        return (stage.out / file.name).is_file()
    found = stage.folder.stat(file.name)
    return found is not None and found.st_size == file.size
