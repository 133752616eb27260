"""Small files are regular files of a stated size that hold sane JSON; all else is refused at once.

What the system refuses is told apart.
"""

import errno
import json
import os

import pytest

from layouts.disk import files
from layouts.disk.files import DEPTH, check_regular, read_json, read_object
from layouts.errors import InputError


def deep(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "cannot be read as JSON"),
        (b"\xef\xbb\xbf{}", "cannot be read as JSON"),
        (b"\xff{}", "cannot be read as JSON"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        (rb'{"a\u0000": 1}', "has a NUL"),
        (rb'{"a": ["b\u0000"]}', "has a NUL"),
        (rb'{"a": "\ud800"}', "half a letter"),
        (rb'[["\udfff"]]', "half a letter"),
        (deep(DEPTH + 2).encode(), "nested more than"),
        (deep(100_000).encode(), "cannot be read as JSON"),
        (b"[" + b"1" * 5000 + b"]", "cannot be read as JSON"),
    ],
)
def test_odd_json_is_refused(tmp_path, text, words):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(InputError, match=words):
        read_json(tmp_path / "config.json")


def test_sane_json_is_read(tmp_path):
    wanted = {"a": ["ä", "\U0001f600", "\\u0000", {"deep": json.loads(deep(DEPTH - 5))}], "b": None}
    (tmp_path / "config.json").write_text(json.dumps(wanted))
    assert read_json(tmp_path / "config.json") == wanted
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="expected a JSON object, found list"):
        read_object(tmp_path / "config.json")


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "dangling", "circle", "absent"])
def test_only_regular_files_are_read(tmp_path, kind):
    path = tmp_path / "config.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "absent":
        path.symlink_to({"device": "/dev/zero", "dangling": "nowhere", "circle": "config.json"}[kind])
    with pytest.raises(InputError, match=r"config\.json"):
        read_json(path)


def test_no_more_than_the_limit_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LIMITS", {"config.json": 10})
    (tmp_path / "config.json").write_text("[1, 2, 3, 4]")
    with pytest.raises(InputError, match="12 bytes, and 10 are the most"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.EIO])
def test_what_the_system_refuses_is_no_fault_of_the_file(tmp_path, monkeypatch, code):
    def refuse(path, *_):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=os.strerror(code)):
        read_json(tmp_path / "config.json")


def test_a_directory_with_a_pipe_in_it_is_refused(tmp_path):
    (tmp_path / "array" / "c").mkdir(parents=True)
    (tmp_path / "array" / "c" / "0").write_bytes(b"")
    (tmp_path / "array" / "c" / "1").symlink_to("0")
    (tmp_path / "lost").symlink_to("nowhere")
    check_regular(tmp_path)
    os.mkfifo(tmp_path / "array" / "c" / "2")
    with pytest.raises(InputError, match="c/2: not a regular file"):
        check_regular(tmp_path)
