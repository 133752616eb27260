"""Write a plan as a Hugging Face checkpoint: shards, index, config, side files, manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from convert.commit import manifest
from convert.commit.durable import copy_file, write_text
from convert.commit.processes import ALONE, Processes
from convert.commit.stage import Stage
from convert.engine.budget import Budget
from convert.errors import PlanError
from convert.hf.execute import write_tensors
from convert.hf.shards import File, index_text, pack, restore
from convert.planning.planner import Plan
from convert.progress import Progress
from layouts.checkpoint import Reader
from layouts.files import CONFIG, RECORD, read_json
from layouts.hf import INDEX, HFReader

REWRITTEN = (CONFIG, INDEX, manifest.NAME)
"""Files that are made anew; every other file that holds no tensors is copied as it is."""


def plan_files(plan: Plan, reader: Reader, limit: int) -> tuple[File, ...]:
    """The files of the output: the original ones again where the input remembers them and they fit, else freshly packed."""
    original = _remembered(plan)
    files = restore(original.headers, plan.targets) if original else None
    if files is None:
        metadata = _metadata(reader)
        if plan.record:
            metadata[RECORD] = json.dumps(plan.record)
        files = pack(plan.targets, limit=limit, metadata=metadata)
    if clash := {file.name for file in files} & set(plan.side_files):
        name = min(clash)
        raise PlanError(f"{plan.source / name} holds no tensor of this checkpoint, but the output needs its name; remove it")
    return files


def _remembered(plan: Plan) -> manifest.Original | None:
    """The original files, for an output whose experts are as they were."""
    return manifest.original_files(plan.source) if plan.record is None and not plan.computed else None


def _metadata(reader: Reader) -> dict[str, str]:
    """The `__metadata__` of the input without our record; the first shard speaks for all, as loaders take it."""
    if not isinstance(reader, HFReader):
        return {"format": "pt"}  # what transformers writes, and wants
    metadata: dict[str, str] = dict(json.loads(reader.shards[0].header).get("__metadata__") or {})
    metadata.pop(RECORD, None)
    return metadata


def write(
    plan: Plan,
    reader: Reader,
    stage: Stage,
    budget: Budget,
    progress: Progress,
    *,
    max_shard_size: int,
    processes: Processes = ALONE,
) -> tuple[str, ...]:
    """Fill the staging directory; everything in it is durable on return. Gives what the user should know of it.

    Each of several processes writes whole files, since not every network file system is good at two writing one.

    Raises:
        OSError: the disk is full or failing.
    """
    files = plan_files(plan, reader, max_shard_size)
    extent = reader.extent if isinstance(reader, HFReader) else None
    own = [files[number] for number in processes.mine([file.size for file in files])]
    names = {name for file in own for name in file.offsets}
    targets = [target for target in plan.targets if target.spec.name in names]
    if not extent:
        from convert.orbax.reading import in_order  # TensorStore comes with it

        targets = in_order(targets, reader)
    digests = write_tensors(targets, own, reader, stage, budget, progress, extent)
    processes.agree("written")
    if not processes.first:
        return ()
    digests = stage.done | stage.by_helpers() | digests
    texts = _texts(plan, reader, files)
    for name, text in texts.items():
        write_text(stage.path / name, text)
    for name in plan.side_files:
        if name not in REWRITTEN:
            copy_file(plan.source / name, stage.path / name)
    write_text(stage.path / manifest.NAME, manifest.render(plan, digests, original_of(plan, reader)))
    original = _remembered(plan)
    if plan.record is None and (original is None or {file.name for file in files} != set(original.headers)):
        return (f"{plan.source} does not say from which files it was made, so the tensors are in {len(files)} new ones",)
    return ()


def _texts(plan: Plan, reader: Reader, files: Sequence[File]) -> dict[str, str]:
    """Index and config. A split restores the original texts if what they say is still what the checkpoint says."""
    original = _remembered(plan)
    old = original.texts if original else {}
    config = {key: value for key, value in (reader.config or _beside(plan)).items() if key != RECORD}
    texts: dict[str, str] = {}
    if plan.record:
        config[RECORD] = dict(plan.record)
    if CONFIG in old and _parsed(old[CONFIG]) == config:
        texts[CONFIG] = old[CONFIG]
    elif config:
        texts[CONFIG] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    index = index_text(plan.targets, files)
    if original and {file.name for file in files} == set(original.headers) and _agree(old.get(INDEX), index):
        index = old.get(INDEX)
    if index:
        texts[INDEX] = index
    return texts


def _beside(plan: Plan) -> Mapping[str, Any]:
    """The `config.json` that a checkpoint of another format carries along."""
    found = read_json(plan.source / CONFIG) if CONFIG in plan.side_files else {}
    return found if isinstance(found, dict) else {}


def _agree(old: str | None, new: str | None) -> bool:
    """Whether a remembered index says what the new one would; having none is as good, and so is one for a single file."""
    if old is None or new is None:
        return True
    parsed = _parsed(old)
    return isinstance(parsed, dict) and parsed.get("weight_map") == json.loads(new)["weight_map"]


def _parsed(text: str) -> Any:
    """What a remembered text says; nothing if somebody broke it."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def original_of(plan: Plan, reader: Reader) -> manifest.Original | None:
    """What a later way back needs; a checkpoint that we made keeps what it remembers."""
    if plan.format == "hf" and plan.record is None:
        return None
    if (
        not plan.computed
        and (reader.record or not isinstance(reader, HFReader))
        and (kept := manifest.original_files(plan.source))
    ):
        return kept
    if plan.computed or not isinstance(reader, HFReader):
        return None
    texts = {name: (plan.source / name).read_bytes().decode() for name in (CONFIG, INDEX) if (plan.source / name).exists()}
    return manifest.Original(headers={shard.name: shard.header for shard in reader.shards}, texts=texts)
