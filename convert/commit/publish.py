"""The place of the output: whether one may be made there, and how a finished directory appears there in one step.

In: what the user calls the output; later the staging directory, and `new/` in it. Out: the output; what it replaces goes to the
stage. What is said wrongly of a place is exit 2, what stands there already 5, and what the system refuses 6.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from convert.commit import manifest
from convert.commit.below import sync_all
from convert.commit.files import Folder, exchange
from convert.commit.home import NEW, OTHER
from convert.commit.store import mark_of
from convert.errors import ConvertError, InputError, OutputError, StorageError, UsageError
from layouts.disk.addresses import foreign, is_file_name, of_the_hub, otherwise
from layouts.disk.buckets import DRIVERS
from layouts.disk.mistaken import meant, mistyped
from layouts.disk.places import RemotePath, is_remote, kvstore_of, place
from layouts.hf import is_checkpoint
from layouts.orbax.tree import find_item

OLD = "old"
_STAGED = ".partial-0123456789abcdef"
"""What the name of the staging directory has behind that of the output."""


def destination(out: str | Path, *, makes: bool = True) -> Path:
    """The place to write to; what is to be made there must be meant so. Of several processes, one makes it.

    Raises:
        UsageError: the path leads through a file, is too long or called like a file, is an address that is no store's, or looks
            as if it was meant otherwise; or there is no such bucket.
        StorageError: nothing may be made where it is to be.
        OSError: a store is failing.
    """
    if is_remote(out):
        return _in_a_store(out)
    path = Path(out)
    above = Path(os.path.abspath(path)).parents
    if file := next((each for each in above if os.path.lexists(each) and not os.path.isdir(each)), None):
        raise UsageError(f"{path}: {file} is no directory, so nothing can be made in it; {OTHER}")
    if why := mistyped(path):
        raise UsageError(f"{path}: {why}; {OTHER}")
    if not os.path.lexists(path):
        _check_name(path)
        _check_rights(path, above, makes=makes)
    return path


def _in_a_store(out: str | Path) -> Path:
    if str(out).partition("://")[0] not in DRIVERS:
        there = "write it to a disk, then: hf upload" if of_the_hub(str(out)) else foreign(str(out))
        raise UsageError(f"{out}: {there}")
    if why := otherwise(str(out).partition("://")[2], whole=False):
        raise UsageError(f"{out}: {why}; {OTHER}")
    try:
        return place(out)
    except InputError as error:  # there is no such bucket, which is no fault of the input's
        raise UsageError(str(error)) from error


def _check_name(path: Path) -> None:
    """See that the system takes the name of what is not there yet, and that of the staging directory beside it."""
    if is_file_name(path.name):
        raise UsageError(f"{path}: the output is a directory, and this is the name of a file; leave out {path.suffix}")
    try:
        path.name.encode()
        os.lstat(f"{path}{_STAGED}")
    except UnicodeError:
        raise UsageError(f"{path}: its name holds bytes that are no characters; {OTHER}") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UsageError(f"{path}: {error.strerror}, or that of {path.name}.partial-... beside it; {OTHER}") from None


def _check_rights(path: Path, above: Iterable[Path], *, makes: bool) -> None:
    folder = next((each for each in above if os.path.isdir(each)), path)
    if makes and not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"{path}: nothing may be made in {folder}; ask its owner for the right, or {OTHER}")


def check_characters(out: Path) -> None:
    """See that TensorStore can open what is made there.

    Raises:
        UsageError: it cannot.
    """
    try:
        kvstore_of(out)
    except InputError as error:
        raise UsageError(str(error)) from None


def stands(source: Path, out: Path, *, overwrite: bool, makes: bool = True) -> bool:
    """Whether an earlier conversion is complete there, which is not to be replaced; if not, one may be made there.

    Raises:
        OutputError, UsageError, StorageError: see `check_output`.
    """
    finished = (out / manifest.NAME).exists() and (not is_remote(out) or bool(mark_of(out)))
    if not finished or overwrite:
        check_output(source, out, overwrite=overwrite, makes=makes)
    return finished and not overwrite


def check_output(source: Path, out: Path, *, overwrite: bool, makes: bool = True) -> None:
    """Refuse an output that would hurt something; what a store holds there is looked at when it is opened.

    Of several processes one makes the output, and needs the rights for it.

    Raises:
        OutputError: it exists (and `overwrite` is off, or it is no checkpoint), or one of the two paths contains the other.
        UsageError: something in a store is to be replaced, or the path has no name of its own.
        StorageError: nothing may be made beside what is to be replaced.
    """
    here, there = f"{_resolved(source, InputError)}/", f"{_resolved(out, OutputError)}/"
    if here.startswith(there) or there.startswith(here):
        raise OutputError(f"{out}: input {source} and output must not contain one another; {OTHER}")
    if isinstance(out, RemotePath):
        if overwrite or not out.root.spec["path"]:
            raise UsageError(
                f"{out}: in a store nothing can be replaced at once; give the place of a new checkpoint in a bucket"
            )
        return
    if out.name in ("", ".."):
        raise UsageError(f"{out}: give the output by its own name, so that it can be made beside what it replaces")
    if os.path.lexists(out) and _is_there(source):
        check_replaceable(out)
        if not overwrite:
            raise OutputError(f"{out} exists already; remove it, {OTHER}, or pass --overwrite")
        _check_rights(out, Path(os.path.abspath(out)).parents, makes=makes)


def _is_there(source: Path) -> bool:
    """Whether the input is; where it is not, nobody is told to remove an output, which may be the input."""
    try:
        return isinstance(source, RemotePath) or bool(meant(source))
    except InputError:
        return False


def _resolved(path: Path, fault: type[ConvertError]) -> Path:
    if not isinstance(path, RemotePath):
        try:
            os.stat(path)
        except OSError as error:  # from Python 3.13 on, resolve() says nothing of a loop
            if error.errno == errno.ELOOP:
                raise fault(f"{path}: cannot be followed: {error.strerror}; give the directory itself") from None
    return path.resolve()


def check_replaceable(out: Path) -> None:
    """See that an output that is to be replaced is a checkpoint, or an empty directory.

    Raises:
        OutputError: it is something else, which nobody means to lose.
    """
    if out.is_symlink() or not out.is_dir():
        what = "a link" if out.is_symlink() else "no directory"
    else:
        try:
            if not os.listdir(out) or is_checkpoint(out) or find_item(out) is not None:
                return
            what = "no checkpoint"
        except InputError:
            what = "several checkpoints"
    raise OutputError(f"{out} is {what}, and --overwrite replaces only a checkpoint; remove it yourself, or {OTHER}")


def publish(home: Folder, new: Folder, parent: Folder, out: Path, *, overwrite: bool) -> None:
    """Show the finished directory under its name, in one step where the system has one; what stood there goes to the stage.

    Raises:
        OutputError: something else stands there by now.
    """
    sync_all(new)
    if not (overwrite and parent.exists(out.name) and _replace(home, parent, out)):
        try:
            home.rename(NEW, parent, out.name)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise OutputError(f"{out} has appeared while this run was working; the result is in {new.path}") from None
    parent.sync()


def _replace(home: Folder, parent: Folder, out: Path) -> bool:
    """Take away what stands there; whether the new output is in its place by that.

    What was looked at stays open, so that its inode is nobody else's. Something else that was taken instead is put back.

    Raises:
        OutputError: it is no checkpoint, or another one than was looked at.
    """
    check_replaceable(out)
    with parent.below(out.name) as old:
        exchanged = exchange(home, NEW, parent, out.name)
        if not exchanged:
            parent.rename(out.name, home, OLD)
        moved = home.stat(NEW if exchanged else OLD)
        if moved is not None and os.path.samestat(os.fstat(old.fd), moved):
            return exchanged
    if exchanged:
        exchange(home, NEW, parent, out.name)
    else:
        home.rename(OLD, parent, out.name)
    raise OutputError(f"{out} has changed while this run was working; it was put back. Run the same command again")
