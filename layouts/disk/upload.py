"""Write an object of a store bit by bit, in one go from front to back: it is there once it is complete, and else not at all.

In: a place in a store, its size, bytes. Out: the object. It never holds more than `held` bytes of it, and reads nothing.

A small object goes to TensorStore as a whole, as all that Orbax stores does. TensorStore has no other way of writing, and S3
takes no more than 5 GB like that, so that larger ones go there in parts, by boto3. In `gs://` they are collected in memory.

Source: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html (10,000 parts of 5 MiB to 5 GiB).
"""

from __future__ import annotations

import errno
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from layouts.disk.faults import short
from layouts.disk.places import PIECE, RemotePath

PART, PARTS = 16 << 20, 10_000
"""Bytes of a part, if so many are enough; objects below that are written as a whole."""
CLIENT = 64 << 20
"""Bytes of the clients of a store."""
_DENIED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "403")


def held(path: RemotePath, size: int) -> int:
    """Bytes that an upload of so many holds: what is being filled, and what is being sent."""
    return 2 * (_part(size) if _takes_parts(path, size) else size)


def _takes_parts(path: RemotePath, size: int) -> bool:
    return path.root.spec["driver"] == "s3" and size > PART


def _part(size: int) -> int:
    return max(PART, -(-size // PARTS))


class Upload:
    """An object of `size` bytes that is being written. Left by an exception, nothing of it stays."""

    def __init__(self, path: RemotePath, size: int) -> None:
        self.path, self.size = path, size
        self._done = self._fill = 0
        self._buffer = bytearray(_part(size) if _takes_parts(path, size) else size)
        self._parts: _Parts | None = _Parts(path) if _takes_parts(path, size) else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._complete()
        elif self._parts:
            self._parts.abort()

    def put(self, block: memoryview, offset: int) -> None:
        """Write the bytes that follow.

        Raises:
            ValueError: they do not.
            OSError: the store fails.
        """
        if offset != self._done:
            raise ValueError(f"{self.path}: bytes at {offset:,} do not follow those before {self._done:,}")
        taken = 0
        while taken < len(block):
            step = min(len(block) - taken, len(self._buffer) - self._fill)
            self._buffer[self._fill : self._fill + step] = block[taken : taken + step]
            taken, self._fill = taken + step, self._fill + step
            if self._parts and self._fill == len(self._buffer):
                self._parts.send(self._buffer)
                self._fill = 0
        self._done += taken

    def _complete(self) -> None:
        if self._done != self.size:
            raise ValueError(f"{self.path}: {self._done:,} bytes were written, {self.size:,} were to be")
        if self._parts is None:
            self.path.write_bytes(bytes(self._buffer))
            return
        if self._fill:
            self._parts.send(self._buffer[: self._fill])
        self._parts.complete()
        self.path.root.files.add(self.path.key)


def write_pieces(path: RemotePath, pieces: Iterable[bytes], size: int) -> None:
    """Write an object of pieces, of which it is not known how many there are; `size` is what is known of their bytes, or 0.

    Parts of it that a killed run has left are removed.

    Raises:
        OSError: the store fails; nothing of the object stays.
    """
    buffer, parts, part = bytearray(), None, _part(size) if _has_parts(path) else None
    try:
        for piece in pieces:
            buffer += piece
            if part and len(buffer) > part:
                parts = parts or _anew(path)
                parts.send(buffer)
                buffer = bytearray()
        if parts is None:
            path.write_bytes(bytes(buffer))
            return
        parts.send(buffer)
        parts.complete()
    except BaseException:
        if parts:
            parts.abort()
        raise
    path.root.files.add(path.key)


def held_by_pieces(path: RemotePath, sources: Mapping[Path, int]) -> int:
    """Bytes that `write_pieces` holds at most, one after another, of these with their sizes, which are not known in a store."""
    return max((2 * _held_of(path, source, size) for source, size in sources.items()), default=0)


def _held_of(path: RemotePath, source: Path, size: int) -> int:
    parts = _has_parts(path)
    if isinstance(source, RemotePath):
        size = PIECE
        while source.longer_than(size) and not (parts and size > PART):
            size *= 2
    return PIECE + (min(size, _part(size)) if parts else size)


def _has_parts(path: RemotePath) -> bool:
    """Whether a store takes parts of what stands beside tensors: without boto3, which not all have, all of it goes at once."""
    return path.root.spec["driver"] == "s3" and importlib.util.find_spec("boto3") is not None


def _anew(path: RemotePath) -> _Parts:
    with suppress(OSError):  # who may write need not be allowed to list
        abort_all(path)
    return _Parts(path)


class _Parts:
    """An upload in parts, which S3 joins in the end."""

    def __init__(self, path: RemotePath) -> None:
        self._path, self._client, self._place = path, _client(path), _place(path)
        self._tags: list[dict[str, Any]] = []
        with _asked(path):
            self._place["UploadId"] = self._client.create_multipart_upload(**self._place)["UploadId"]

    def send(self, data: bytes | bytearray) -> None:
        number = len(self._tags) + 1
        with _asked(self._path):
            found = self._client.upload_part(**self._place, PartNumber=number, Body=data)
        self._tags.append({"PartNumber": number, "ETag": found["ETag"]})

    def complete(self) -> None:
        with _asked(self._path):
            self._client.complete_multipart_upload(**self._place, MultipartUpload={"Parts": self._tags})

    def abort(self) -> None:
        with suppress(OSError), _asked(self._path):  # what has gone wrong already says more
            self._client.abort_multipart_upload(**self._place)


def abort_all(path: RemotePath) -> int:
    """Remove the parts that killed runs have left of what begins so: nobody sees them, somebody pays; how many uploads.

    Raises:
        OSError: the store fails, or does not let us look.
    """
    client, place, count = _client(path), _place(path), 0
    with _asked(path):
        pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=place["Bucket"], Prefix=place["Key"])
        for each in (each for page in pages for each in page.get("Uploads", ())):
            client.abort_multipart_upload(Bucket=place["Bucket"], Key=each["Key"], UploadId=each["UploadId"])
            count += 1
    return count


def _place(path: RemotePath) -> dict[str, Any]:
    spec = path.root.spec
    return {"Bucket": spec["bucket"], "Key": f"{spec['path']}{path.key}"}


def _client(path: RemotePath) -> Any:
    """One who finds credentials as Amazon's own tools do, and the store where TensorStore finds it."""
    spec = path.root.spec
    with _asked(path):
        return _made(spec.get("endpoint"), spec.get("aws_region"))


@lru_cache
def _made(endpoint: str | None, region: str | None) -> Any:
    """To make one takes longer than to send a part; any number of threads may use it."""
    import boto3

    return boto3.session.Session().client("s3", endpoint_url=endpoint, region_name=region)


@contextmanager
def _asked(path: RemotePath) -> Iterator[None]:
    """Say of boto3's errors within what they are about.

    Raises:
        OSError: the store fails.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError, Boto3Error) as error:
        code = getattr(error, "response", {}).get("Error", {}).get("Code", "")
        number = errno.EACCES if code in _DENIED else errno.EIO
        raise OSError(number, short(error), str(path)) from error
