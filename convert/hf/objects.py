"""Write the tensors of a plan as safetensors objects of a store, several at a time, each from front to back.

In: targets and files. Out: complete objects, the digests of their tensors, notes in the store. It never publishes.

What `convert.hf.execute` does on a disk, where blocks may come in any order. An object is there once it is complete, so that
the next run goes on by the file.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import cast

from convert.commit.manifest import SOURCE
from convert.commit.store import StoreStage
from convert.engine.budget import Budget
from convert.engine.copying import Worker, write_tensor
from convert.engine.direct import Output
from convert.hf.shards import File
from convert.planning.targets import Target
from convert.progress import Progress, stoppable
from layouts.disk.files import MANIFEST, UNFINISHED
from layouts.disk.upload import PART, Upload, abort_all
from layouts.reader import Reader


class ObjectOutput:
    """What `write_tensor` takes in the place of a file; no kernel copies into a store."""

    def __init__(self, upload: Upload) -> None:
        self.put = upload.put

    def passes_cache(self, nbytes: int) -> bool:  # noqa: ARG002
        """There is none."""
        return True

    def copy(self, *_: int) -> int:
        """Nothing is copied so."""
        return 0


def begin(stage: StoreStage, files: Sequence[File]) -> tuple[str, ...]:
    """Say that the place is no checkpoint yet, and `remove_parts`."""
    stage.folder.write_text(MANIFEST, json.dumps({UNFINISHED: str(stage.home)}))
    return remove_parts(stage, files)


def remove_parts(stage: StoreStage, files: Sequence[File]) -> tuple[str, ...]:
    """Remove parts that killed runs have left, where these files go there in parts; what the user should know."""
    if not any(file.size > PART for file in files) or stage.out.root.spec["driver"] != "s3":
        return ()
    try:
        abort_all(stage.out / "")
    except OSError as error:
        return (f"parts that an interrupted run may have left below {stage.out} could not be removed: {error.strerror}",)
    return ()


def write_objects(
    targets: Sequence[Target],
    files: Sequence[File],
    reader: Reader,
    stage: StoreStage,
    budget: Budget,
    progress: Progress,
    *,
    sources: bool = True,
) -> dict[str, str]:
    """Write every file that is not there yet, and return the digests of all tensors, as `write_tensors` does.

    Raises:
        OSError: the store fails; finished files are noted.
        OutputError: another run has begun to write the same output.
    """
    by_name = {target.spec.name: target for target in targets}
    digests = {key: digest for key, digest in stage.done.items() if key.startswith(SOURCE)}
    left = []
    for file in files:
        if (stage.out / file.name).is_file() and file.offsets.keys() <= stage.done.keys():
            digests |= {name: stage.done[name] for name in file.offsets}
            progress(sum(by_name[name].spec.nbytes for name in file.offsets))
        else:
            left.append(file)
    stop, own = threading.Event(), threading.local()
    told = stoppable(progress, stop)

    def equip() -> None:
        own.worker = Worker.make(reader, budget.strip, sources=sources)

    def work(file: File) -> dict[str, str]:
        stage.check()
        return _write(file, by_name, own.worker, stage, told)

    with ThreadPoolExecutor(budget.jobs, initializer=equip) as pool:
        try:
            for future in as_completed([pool.submit(work, file) for file in left]):
                stage.record(future.result())
                digests |= future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return digests


def _write(file: File, targets: Mapping[str, Target], worker: Worker, stage: StoreStage, told: Progress) -> dict[str, str]:
    found: dict[str, str] = {}
    with Upload(stage.out / file.name, file.size) as upload:
        upload.put(memoryview(file.head), 0)
        output = cast(Output, ObjectOutput(upload))
        for name, offset in sorted(file.offsets.items(), key=lambda item: (item[1], targets[item[0]].spec.nbytes)):
            found |= write_tensor(targets[name], output, offset, worker, told)
    return found
