"""Whether an output is what a plan makes of its input: a proof, or an error that says what is not so.

In: a plan, the open input, and a writer. Out: a sentence that says what was looked at. Cheap looks come first; in the end all
tensors are made from the input again and their digests compared with the manifest's. It never writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from convert.commit import manifest
from convert.commit.identity import input_digest
from convert.commit.inventory import differences, entry_of, read_card, read_in_pieces
from convert.commit.processes import Processes
from convert.commit.recorded import Manifest, load
from convert.content import content_of
from convert.engine.writer import Writer
from convert.errors import InputError, OutputError
from convert.planning.across.computed import originals_of
from convert.planning.planner import Plan
from convert.progress import Progress
from layouts.card import CARD, alike
from layouts.disk.files import CONFIG, INDEX
from layouts.orbax.tree import COMMITTED
from layouts.reader import Reader

_REWRITTEN = (CONFIG, INDEX, manifest.NAME)
"""Files that may be made anew; the digest of the input has what they are made from."""
_OTHER_CONTENT = "its manifest has another content digest than --content gives now, or none"


class Proof(NamedTuple):
    """What was looked at, in a sentence, and the content digest, where one is made anyway."""

    said: str
    content: Mapping[str, Any] | None


def prove(plan: Plan, reader: Reader, writer: Writer, processes: Processes, progress: Progress) -> Proof:
    """Say what was looked at; several processes read a share of the tensors each.

    Raises:
        OutputError: something is not as this plan makes it from this input.
        InputError: data of the input cannot be read.
    """
    found = look(plan, reader, writer)
    targets = [plan.targets[number] for number in processes.mine([target.spec.nbytes for target in plan.targets])]
    for name, rows, digest, wanted in writer.again(targets, found, progress):
        if digest != wanted:
            where = f"{name}[{rows.start}:{rows.stop}]" if rows else name
            raise _refused(plan, f"was made from another input: {where} differs")
    if not found.intact:  # last, as the least: what a split needs may be gone, where digests and files are as they were
        raise _refused(plan, f"is not what was written: {manifest.NAME} has been changed since, or an earlier version wrote it")
    processes.agree("compared")
    content = plan.content or _content(plan, found)
    have, noted = (each["model"].get("xxh3") if each else None for each in (content, found.content))
    if have and noted and have != noted:
        raise _refused(plan, "its manifest has another content digest (xxh3) than the digests of its tensors make")
    files = sum(entry.count or 1 for entry in found.files.values())
    said = (
        f"{plan.out} has been made by this plan from this input: {len(plan.targets)} tensors were read again and compared with "
        f"{manifest.NAME}, {files} files are there with their sizes, whose tensors a verification reads; nothing to do"
    )
    return Proof(said, content)


def look(plan: Plan, reader: Reader, writer: Writer, *, content: bool = False) -> Manifest:
    """See what can be seen without reading a tensor, as `--dry-run` does; with `content`, that there is a digest to compare.

    Raises:
        OutputError: something is not as this plan makes it from this input.
    """
    found = _manifest(plan)
    for why in (*_unlike(plan, reader, writer, found), *_changed(plan, found)):
        raise _refused(plan, why)
    if content and not (found.content and found.content["model"].get("sha256")):
        raise _refused(plan, _OTHER_CONTENT)
    return found


def _content(plan: Plan, found: Manifest) -> dict[str, Any] | None:
    """What a conversion would have noted: of the digests of tensors that were made again, and of sources as they are noted."""
    written = {name: entry.digest for name, entry in found.tensors.items()}
    return content_of(plan, written | {manifest.SOURCE + name: digest for name, digest in found.sources.items()})


def _refused(plan: Plan, why: str) -> OutputError:
    return OutputError(f"{plan.out} exists already and {why}; remove it, choose another output, or pass --overwrite")


def _manifest(plan: Plan) -> Manifest:
    try:
        found = load(plan.out)
    except InputError as error:
        raise _refused(plan, f"was not made by this plan ({error})") from None
    if found is None:
        raise _refused(plan, f"was not made by this plan: it has no {manifest.NAME}")
    return found


def _unlike(plan: Plan, reader: Reader, writer: Writer, found: Manifest) -> Iterator[str]:
    """What the manifest says that this plan would not say."""
    for key, value in _made(plan).items():
        if found.made[key] != value:
            yield f"was not made by this plan: its {key} is another one"
    wanted = {target.spec.name: (target.spec.dtype, target.spec.shape) for target in plan.targets}
    have = {name: (entry.dtype, entry.shape) for name, entry in found.tensors.items()}
    if wanted != have:
        name = min(name for name in wanted.keys() | have.keys() if wanted.get(name) != have.get(name))
        yield f"was not made by this plan: {name} is {_spec(have.get(name))} there, and {_spec(wanted.get(name))} in the plan"
    originals = {target.spec.name: (target.spec.dtype, target.spec.shape) for target in originals_of(plan)}
    if plan.computed and originals != {name: (entry.dtype, entry.shape) for name, entry in found.originals.items()}:
        yield "was not made by this plan: it does not keep the originals of the same computed tensors"
    if why := writer.unlike(found):
        yield why
    yield from _other_files(plan, found)
    if plan.content and _by_sha256(plan.content) != _by_sha256(found.content):
        yield _OTHER_CONTENT
    if found.input != input_digest(reader):
        yield "was made from another input: headers, config or metadata differ"


def _by_sha256(content: Mapping[str, Any] | None) -> Any:
    """A content digest as earlier versions wrote it, too."""
    return content and {key: {**each, "xxh3": None} if isinstance(each, Mapping) else each for key, each in content.items()}


def _other_files(plan: Plan, found: Manifest) -> Iterator[str]:
    """Side files that are there and would be left out, or the other way round; those in the place of tensors have no digest."""
    for name in plan.left_out_files:
        if (entry := found.files.get(name)) and entry.digest:
            yield f"was made with other options (--copy-all): {name} is there, and would be left out"
    for name in plan.side_files:
        if name not in found.files and name not in (*_REWRITTEN, CARD) and name.rpartition("/")[2] != COMMITTED:
            yield f"was made with other options (--copy-all) or from another input: {name} is not there, and would be copied"


def _made(plan: Plan) -> Mapping[str, Any]:
    """What the manifest of this plan says in `MADE`, as JSON gives it back."""
    record = json.loads(json.dumps(plan.record))
    mesh = dict(plan.mesh) if plan.mesh else None
    sharding = manifest.digest_of(plan.shardings) if plan.shardings else None
    words = plan.action, plan.format, plan.family, plan.layout, record, plan.computed, mesh, sharding
    return dict(zip(manifest.MADE, words, strict=True))


def _spec(found: tuple[str, tuple[int, ...]] | None) -> str:
    return f"{found[0]} {found[1]}" if found else "absent"


def _changed(plan: Plan, found: Manifest) -> Iterator[str]:
    """Files that are not as they were written, or not as the input now has them."""
    try:
        for difference in differences(plan.out, manifest.NAME, found.files):
            yield f"is not what was written: {difference}"
    except InputError as error:
        yield f"is not what was written: {error}"
    for name in plan.side_files:
        entry = found.files.get(name)
        if entry and entry.digest and name not in (*_REWRITTEN, CARD) and entry_of(read_in_pieces(plan.source / name)) != entry:
            yield f"was made from another input: {name} differs"
    if not alike(*(read_card(place / CARD) for place in (plan.source, plan.out))):
        yield f"was made from another input: {CARD} differs"
