"""`--verify` and `--digest`.

In: parsed arguments. Out: an `Answer`. Nothing here prints or exits.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import convert
from convert.actions.answer import Answer, counted, processes_of, shown, two_paths
from convert.answers.envelope import envelope
from convert.arguments import options
from convert.errors import StorageError, UsageError
from convert.options import Verification
from convert.options.option import complete
from convert.progress import ignore, watching


def verify(arguments: argparse.Namespace) -> Answer:
    """A verdict, or what it would cost; of several processes, the first one has something to say."""
    from convert.verifier.environment import run_of
    from convert.verifier.page import page

    if len(arguments.paths) not in (1, 2):
        raise UsageError(
            f"--verify takes two checkpoints to compare, or one whose digests to re-check; found {counted(arguments.paths)}"
        )
    whole = bool(arguments.json or arguments.report is not None)
    given = options(arguments, "--verify")
    given = {**_beside(arguments.paths, whole and not given.get("trust_digests")), **given}  # both read everything
    if arguments.dry_run:
        return _cost(arguments, given)
    if arguments.report is not None:
        _try_to_write(arguments.report)
    processes = processes_of(arguments)
    started = datetime.now(UTC)
    with watching(shown(arguments, processes), "opening") as progress:
        verdict = convert.verify(*arguments.paths, processes=processes, progress=progress, **given)
    run, code = run_of(arguments.command, started), 0 if verdict.equal else 1
    if not processes or processes.first:
        if arguments.report:
            Path(arguments.report).write_text(page(verdict, run), encoding="utf-8")
        document = envelope("verify", code, verdict.to_dict(run)) if arguments.json else ""
        return Answer(text=str(verdict), document=document, exit_code=code)
    return Answer(text="", document="", exit_code=code)


def _beside(paths: Sequence[str], whole: bool) -> dict[str, bool]:
    """What a `whole` report has besides, as far as there is any for what is compared."""
    from layouts.checkpoint import is_adapter
    from layouts.disk.places import place

    adapter = whole and any(is_adapter(place(path)) for path in paths)
    return {"content": whole and not adapter, "self_test": whole and not (adapter and len(paths) > 1)}


def _try_to_write(given: str) -> None:
    """See before hours of work that a page can be written there; what stands there stays until then.

    Raises:
        UsageError: it is not called as a page is, such as a file of the checkpoint.
        StorageError: it cannot.
    """
    path = Path(given)
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--report: {given!r} is no name of a page; end it in .html (--json is for programs)")
    new = not path.exists()
    try:
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise StorageError(
            f"--report={path} cannot be written: {error.strerror}; give a file in a directory that is there"
        ) from None
    if new:
        path.unlink()


def _cost(arguments: argparse.Namespace, given: Mapping[str, Any]) -> Answer:
    if arguments.distributed or arguments.coordinator or arguments.num_processes or arguments.process_id is not None:
        raise UsageError("--verify --dry-run tells what one process takes; leave out what is said of several")
    from convert.verifier import estimate_cost
    from layouts.disk.places import place

    one, other = map(place, two_paths(arguments.paths))
    text = str(estimate_cost(one, other, complete(Verification, given, of=2)))
    empty = {"plan": None, "peak_bytes": None, "workers": None, "free_bytes": None}
    return Answer(text=text, document=envelope("dry-run", 0, {**empty, "cost": text}))


def digest(arguments: argparse.Namespace) -> Answer:
    """The digest of each checkpoint."""
    if not arguments.paths:
        raise UsageError("--digest takes one checkpoint or more")
    from convert.verifier.content.sides import content_of
    from convert.verifier.sides import check_places
    from layouts.disk.places import place

    asked, found = complete(Verification, options(arguments, "--digest")), {}
    check_places([place(path) for path in arguments.paths], asked)
    for path in arguments.paths:
        with watching(shown(arguments, None), total=_input_bytes(path) or None) as progress:
            found[path] = content_of(place(path), asked, progress or ignore, checked=True)
    result = {"digests": {path: each.to_dict() for path, each in found.items()}}
    text = "\n".join(each.told(path) for path, each in found.items())
    return Answer(text=text, document=envelope("digest", 0, result))


def _input_bytes(path: str) -> int:
    """What lies in a directory; nobody knows in a store."""
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
