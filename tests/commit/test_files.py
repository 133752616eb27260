"""Nothing is created, written, renamed or removed outside the output and its staging directory, whatever lies there."""

import ast
import errno
import json
import os
import shutil
from pathlib import Path

import pytest

import convert
from convert.cli import main
from convert.commit import journal
from convert.commit.files import Folder, write_all
from convert.errors import InputError
from convert.orbax import write
from layouts.disk import names
from scripts.make_checkpoint import make_checkpoint
from tests.commit.test_commit import contents, count_calls, partials, prefuse
from tests.orbax.test_names import save, tree_of

ROOT = Path(__file__).parents[2]


def test_a_line_of_a_journal_counts_once_its_end_is_there(tmp_path):
    with Folder.at(tmp_path) as home:
        journal.append(home, "lines", {"a": "1"})
        (tmp_path / "lines").write_bytes((tmp_path / "lines").read_bytes() + b'{"b": "2"}')
        assert journal.digests(home, "lines") == {"a": "1"}
        journal.cut(home, "lines")
        journal.append(home, "lines", {"c": "3"})
        assert journal.digests(home, "lines") == {"a": "1", "c": "3"}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "in", family="qwen3_moe", experts=3, layers=2, shard=60_000)


@pytest.fixture
def staged(source, tmp_path, monkeypatch) -> Path:
    """What an interrupted run has left."""
    with monkeypatch.context() as patch:
        count_calls(patch, fail_at=40)
        assert prefuse(source, tmp_path / "out") == 6
    (found,) = partials(tmp_path)
    assert journal.NAME in os.listdir(found)
    return found


BAD = (
    "",
    ".",
    "..",
    "/a",
    "a/",
    "a//b",
    "a/../b",
    "./a",
    "a\0",
    "a\nb",
    "\x1b[2J",
    "\x7f",
    "\x9b",
    "\ud800",
    "a" * 256,
    "a/" + "b" * 256,
)


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_names_that_are_none(name, tmp_path):
    with pytest.raises(InputError, match=r"^somewhere: the name .* is not safe as the name of a file"):
        names.parts(name, "somewhere")
    with pytest.raises(InputError):
        names.part(name, "somewhere")
    if len(name) < 255:
        with pytest.raises(InputError):
            names.key(name, "somewhere")
    before = os.stat(tmp_path).st_mtime_ns
    with Folder.at(tmp_path) as folder:
        for call in (folder.make, folder.remove, folder.stat, folder.read, lambda name: folder.write_text(name, "")):
            with pytest.raises(InputError):
                call(name)
    assert os.stat(tmp_path).st_mtime_ns == before


@pytest.mark.parametrize("name", ["a", "a b", "...", "a..b", "~", "-", "*", "a\\b", "ä", "\N{HANGUL SYLLABLE GA}", "a" * 255])
def test_names_that_are_some(name):
    assert names.part(name, "") == name
    assert names.parts(f"{name}/{name}", "") == (name, name)
    assert names.key(f"{name}{name}", "") == name * 2


OPERATIONS = {
    "write_text": lambda folder, name: folder.write_text(name, "text"),
    "reserve": lambda folder, name: folder.reserve(name, 10, head=b"head"),
    "anew": lambda folder, name: folder.reserve(name, 10, anew=True),
    "append": lambda folder, name: folder.append(name, b"more"),
    "cut": lambda folder, name: folder.cut(name, 1),
    "read": lambda folder, name: folder.read(name),
    "sync": lambda folder, name: folder.sync(name),
    "copy_in": lambda folder, name: folder.copy_in(Path(__file__), name),
    "below": lambda folder, name: folder.below(name, make=True),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("link", ["file", "folder", "nothing", "on the way"])
def test_no_operation_follows_a_link(operation, link, tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "file").write_text("mine")
    (outside / "deep" / "file").write_text("mine")
    inside.mkdir()
    (inside / "link").symlink_to(outside / {"file": "file", "folder": "deep", "nothing": "new", "on the way": "."}[link])
    before = contents(outside)
    with Folder.at(inside) as folder, pytest.raises(OSError, match="inside/link") as caught:
        OPERATIONS[operation](folder, "link/deep/file" if link == "on the way" else "link")
    assert caught.value.errno in (errno.ELOOP, errno.ENOTDIR)
    assert contents(outside) == before
    assert sorted(os.listdir(outside)) == ["deep", "file"]


def test_removing_and_renaming_take_the_link_itself(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("mine")
    (tmp_path / "inside" / "tree").mkdir(parents=True)
    for name in ("one", "two", "tree/three"):
        (tmp_path / "inside" / name).symlink_to(tmp_path / "outside")
    with Folder.at(tmp_path / "inside") as folder:
        folder.remove("one")
        folder.rename("two", folder, "new")
        folder.remove("tree")
        folder.remove("nothing")
        folder.remove("nothing/below")
    assert os.listdir(tmp_path / "inside") == ["new"]
    assert (tmp_path / "inside" / "new").is_symlink()
    assert contents(tmp_path / "outside") == {"file": b"mine"}


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_short_writes_are_gone_on_with(tmp_path, monkeypatch, step):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:step], at))
    with Folder.at(tmp_path) as folder:
        folder.reserve("file", 60, head=bytes(range(50)))
        folder.append("file", b"more")
        folder.write_text("text", "text" * 20)
        folder.copy_in(tmp_path / "file", "copy")
    assert (tmp_path / "file").read_bytes() == (tmp_path / "copy").read_bytes() == bytes(range(50)) + bytes(10) + b"more"
    assert (tmp_path / "text").read_text() == "text" * 20


def test_a_disk_that_takes_nothing_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    descriptor = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    with pytest.raises(OSError, match="takes no more bytes"):
        write_all(descriptor, b"data", 0)
    os.close(descriptor)


def test_a_line_that_cannot_be_added_leaves_the_journal_as_it_was(tmp_path, monkeypatch):
    with Folder.at(tmp_path) as folder:
        journal.append(folder, "notes", {"a": "1"})
        real, left = os.pwrite, [3, 0]

        def full(fd, data, at):
            if not (step := left.pop(0)):
                raise OSError(errno.ENOSPC, "full")
            return real(fd, data[:step], at)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(OSError, match="full"):
                journal.append(folder, "notes", {"b": "2"})
        journal.append(folder, "notes", {"c": "3"})
        assert journal.digests(folder, "notes") == {"a": "1", "c": "3"}


def test_short_writes_of_headers_do_not_cost_the_output(source, tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[: max(1, len(data) // 2)], at))
    assert prefuse(source, tmp_path / "out") == 0
    monkeypatch.undo()
    assert convert.verify(source, tmp_path / "out", gemm=False).equal


@pytest.mark.parametrize("what", ["cut", "longer", "header", "gone"])
def test_a_file_that_has_lost_data_is_not_shown(source, tmp_path, monkeypatch, capsys, what):
    real = Folder.write_text

    def last(self, name, text):
        real(self, name, text)
        if name != "convert_manifest.json":
            return
        file = sorted(self.path.glob("*.safetensors"))[1]
        size = file.stat().st_size
        if what == "gone":
            file.unlink()
        elif what == "header":
            file.write_bytes(b"\0" * 100 + file.read_bytes()[100:])
        else:
            os.truncate(file, size - 1 if what == "cut" else size + 1)

    monkeypatch.setattr(Folder, "write_text", last)
    assert prefuse(source, tmp_path / "out") == 6
    assert "nothing is shown" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert prefuse(source, tmp_path / "out") == 0
    assert convert.verify(source, tmp_path / "out", gemm=False).equal


@pytest.mark.parametrize("way", ["kept", "written", "directories"])
def test_an_array_that_has_lost_its_metadata_is_not_shown(tmp_path, monkeypatch, capsys, way):
    source = save(tmp_path / "in", tree_of(), ocdbt=way != "directories")
    if way == "written":
        monkeypatch.setattr("convert.orbax.write.keep", lambda plan, reader: None)
    real = write.look

    def lost(item, plan, origin):
        for file in [*item.glob("manifest.ocdbt"), *item.glob("*wi/zarr.json"), *item.glob("*wi/.zarray")]:
            os.truncate(file, 20)
        real(item, plan, origin)

    monkeypatch.setattr("convert.orbax.write.look", lost)
    assert main(["--prefuse", str(source), str(tmp_path / "out"), "--quiet"]) == 6
    assert "nothing is shown" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def plant(place: Path, what: str, victim: Path) -> None:
    if what == "symlink":
        place.symlink_to(victim)
    elif what == "hard link":
        os.link(victim / "file", place)
    elif what == "fifo":
        os.mkfifo(place)


@pytest.fixture
def victim(tmp_path) -> Path:
    path = tmp_path / "victim"
    (path / "deep").mkdir(parents=True)
    (path / "file").write_text("mine")
    (path / "deep" / "file").write_text("mine")
    return path


@pytest.mark.parametrize("options", [(), ("--no-resume",), ("--overwrite",)], ids=" ".join)
@pytest.mark.parametrize("what", ["symlink", "file", "directory", "old journal", "copied"])
def test_a_staging_directory_that_is_not_ours_is_left_alone(source, staged, victim, tmp_path, capsys, what, options):
    name = staged.name
    away = staged.rename(tmp_path / "away")
    if what == "symlink":
        staged.symlink_to(victim)
    elif what == "file":
        staged.write_text("mine")
    elif what == "copied":
        shutil.copytree(away, staged)
    else:
        staged.mkdir()
        (staged / "letters").write_text("mine")
        if what == "old journal":
            (staged / journal.NAME).write_text((away / journal.NAME).read_text())
    before, entry = contents(tmp_path), os.lstat(tmp_path / name).st_ino
    assert prefuse(source, tmp_path / "out", *options) == 5
    assert "choose another output" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert os.lstat(tmp_path / name).st_ino == entry


@pytest.mark.parametrize("options", [(), ("--no-resume",)], ids=" ".join)
@pytest.mark.parametrize("what", ["symlink", "hard link", "fifo"])
@pytest.mark.parametrize("place", ["new/model-00001-of-00004.safetensors", "new/config.json", "new/deep", "rubbish", "new"])
def test_a_link_in_our_staging_directory_is_not_followed(source, staged, victim, tmp_path, capsys, place, what, options):
    if (staged / place).is_dir():
        (staged / place).rename(tmp_path / "away")
    (staged / place).unlink(missing_ok=True)
    plant(staged / place, what, victim)
    before = contents(victim)
    assert prefuse(source, tmp_path / "out", *options) == 5
    assert "is a link or no file" in capsys.readouterr().err
    assert contents(victim) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("begun", [(), ("new",), ("new", b""), ("new", b'{"ho'), (b"",)], ids=str)
def test_a_staging_directory_that_was_killed_at_its_beginning_is_taken(source, staged, tmp_path, begun):
    for name in os.listdir(staged):
        with Folder.at(staged) as folder:
            folder.remove(name)
    for each in begun:
        (staged / "new").mkdir() if isinstance(each, str) else (staged / journal.NAME).write_bytes(each)
    assert prefuse(source, tmp_path / "out") == 0
    assert os.listdir(tmp_path) == ["out"]


def test_the_first_line_knows_both_directories(staged):
    first = json.loads((staged / journal.NAME).read_text().splitlines()[0])
    assert first == {"home": staged.stat().st_ino, "inode": (staged / "new").stat().st_ino}


def test_staging_directories_of_others_beside_ours_are_not_touched(source, victim, tmp_path):
    (tmp_path / "out.partial-12345678").symlink_to(victim)
    (tmp_path / "out.partial-letters").write_text("mine")
    (tmp_path / "out.partial-mine").mkdir()
    assert prefuse(source, tmp_path / "out") == 0
    assert sorted(os.listdir(tmp_path)) == ["out", "out.partial-12345678", "out.partial-letters", "out.partial-mine", "victim"]
    assert contents(victim) == {"file": b"mine", "deep/file": b"mine"}


def test_a_refused_run_leaves_no_staging_directory(source, tmp_path, monkeypatch, capsys):
    copy = make_checkpoint(tmp_path / "in", family="qwen3_moe", experts=2, layers=1)
    (copy / "model.safetensors.index.json").unlink(missing_ok=True)
    monkeypatch.setattr("convert.hf.write.write_tensors", lambda *_, **__: (_ for _ in ()).throw(InputError("bad")))
    assert prefuse(copy, tmp_path / "out") == 3
    assert os.listdir(tmp_path) == ["in"]
    monkeypatch.setattr("convert.hf.write.write_tensors", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prefuse(copy, tmp_path / "out")
    assert len(partials(tmp_path)) == 1, "what was interrupted can be gone on with"


def test_a_refused_run_keeps_what_an_earlier_one_finished(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("convert.hf.write.HFWriter._write_beside", lambda *_: os.close(-1))
        assert prefuse(source, tmp_path / "out") == 6
    with monkeypatch.context() as patch:
        patch.setattr("convert.hf.write.HFWriter._write_beside", lambda *_, **__: (_ for _ in ()).throw(InputError("bad")))
        assert prefuse(source, tmp_path / "out") == 3
    assert convert.prefuse(source, tmp_path / "out", max_shard_size=60_000).resumed > 20


def test_a_side_file_that_is_no_file_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with Folder.at(tmp_path) as folder, pytest.raises(InputError, match="neither a file nor a directory"):
        folder.copy_in(tmp_path / "fifo", "copy")


# Which calls change a disk, and who may make them.

FUNCTIONS = {
    "os": [
        "mkdir",
        "makedirs",
        "rename",
        "renames",
        "replace",
        "remove",
        "unlink",
        "rmdir",
        "removedirs",
        "truncate",
        "ftruncate",
        "link",
        "symlink",
        "mkfifo",
        "mknod",
        "chmod",
        "chown",
        "lchown",
        "utime",
        "setxattr",
        "write",
        "writev",
        "posix_fallocate",
        "sendfile",
    ],
    "shutil": [
        "copy",
        "copy2",
        "copyfile",
        "copyfileobj",
        "copytree",
        "move",
        "rmtree",
        "chown",
        "copymode",
        "copystat",
        "make_archive",
    ],
    "tempfile": ["mkstemp", "mkdtemp", "NamedTemporaryFile", "TemporaryFile", "TemporaryDirectory", "SpooledTemporaryFile"],
}
METHODS = ["mkdir", "rmdir", "unlink", "touch", "symlink_to", "hardlink_to", "write_bytes", "chmod", "lchmod"]
READING = {"O_RDONLY", "O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK", "O_PATH"}
ALLOWED = {
    "convert/commit/files.py": None,  # the one module
    "layouts/disk/places.py": {"mkdir", "write_bytes"},  # objects of a store
    "convert/commit/store.py": {"write_bytes"},  # the same
    "layouts/disk/upload.py": {"write_bytes"},  # the same
    "layouts/orbax/malloc.py": {"CDLL"},  # mallopt
    "convert/terminal.py": {"os.open"},  # /dev/null in place of a stream that is closed, or full
    "convert/actions/proving.py": {"write_text", "open", "unlink"},  # the report that the user names
    "layouts/disk/stored.py": {"os.write", "os.truncate"},  # a header in memory, for the parser
}


def changes(call: ast.Call) -> str:
    """What of a call may change a disk; nothing if it cannot."""
    function = call.func
    words = [
        argument.value for argument in [*call.args, *(k.value for k in call.keywords)] if isinstance(argument, ast.Constant)
    ]
    for_writing = any(isinstance(word, str) and len(word) < 4 and set(word) & set("wax+") for word in words)
    if isinstance(function, ast.Name):
        return "open" if function.id == "open" and for_writing else ""
    if not isinstance(function, ast.Attribute):
        return ""
    module = function.value.id if isinstance(function.value, ast.Name) else ""
    if function.attr in FUNCTIONS.get(module, ()):
        return f"{module}.{function.attr}"
    if module == "os" and function.attr == "open":
        flags = {n.attr for n in ast.walk(call.args[1]) if isinstance(n, ast.Attribute)}
        return "" if flags and flags <= READING else "os.open"
    if function.attr == "open" and for_writing:
        return "open"
    moves = function.attr in ("replace", "rename") and not call.keywords  # of a path; with keywords it is of a dataclass
    if function.attr in METHODS or ((function.attr == "write_text" or moves) and len(call.args) == 1):
        return function.attr
    return "CDLL" if function.attr == "CDLL" else ""


def test_only_one_module_changes_a_disk():
    found = set()
    for path in sorted([*(ROOT / "convert").rglob("*.py"), *(ROOT / "layouts").rglob("*.py")]):
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and (what := changes(node)):
                allowed = ALLOWED.get(name, set())
                if allowed is not None and what not in allowed:
                    found.add(f"{name}:{node.lineno}: {what}")
    assert found == set(), "these go past convert/commit/files.py"


def test_the_walk_finds_what_it_should():
    lines = (
        "os.open(p, os.O_WRONLY)", "os.open(p, flags)", "os.rename(a, b)", "shutil.rmtree(p)", "open(p, 'w')", "p.open('ab')",
        "open(p, mode='r+')", "p.write_text(t)", "p.replace(q)", "p.unlink()", "p.touch()", "tempfile.mkdtemp()",
    )  # fmt: skip
    assert all(changes(ast.parse(line).body[0].value) for line in lines)
    harmless = ("os.open(p, os.O_RDONLY | os.O_NOFOLLOW)", "open(p, 'rb')", "t.replace(a, b)", "f.write_text(n, t)", "p.open()")
    assert not any(changes(ast.parse(line).body[0].value) for line in harmless)
