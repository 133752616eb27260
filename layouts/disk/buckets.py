"""A bucket of an object store, or a prefix in it: how TensorStore finds it, with which credentials, and what lies in it.

In: an address. Out: its spec, and the names of all objects below it. It never reads or writes one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layouts.disk import faults
from layouts.disk.faults import answer, told
from layouts.errors import InputError

DRIVERS: Mapping[str, str] = {"gs": "gcs", "s3": "s3"}
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
"""Who sets these is known by them. Told so, TensorStore looks for no others, and does not log in which files it found none."""
_SIGNS = (
    *(_KEYS[0], "AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_WEB_IDENTITY_TOKEN_FILE"),
    *("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"),
)
"""Without one of these, a file, or a machine of Amazon's, nobody knows us, and TensorStore would log where it looked."""
_ANY = "config.json"
"""What is asked for first, there or not, to see whether anybody answers."""
_TELLING = ("_METADATA", "manifest.ocdbt", ".zarray", ".json", ".safetensors")
"""How files end that are written anew whenever a checkpoint is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """A prefix of a store, and the names of all objects below it."""

    text: str
    spec: Mapping[str, Any]
    store: Any
    files: set[str]

    @classmethod
    def open(cls, scheme: str, rest: str) -> Root:
        """List what is there.

        Raises:
            InputError: there is no such bucket.
            OSError: the store is failing, does not answer, or does not let us.
        """
        import tensorstore as ts

        bucket, _, prefix = rest.partition("/")
        spec: dict[str, Any] = {"driver": DRIVERS[scheme], "bucket": bucket, "path": f"{prefix}/" if prefix else ""}
        if scheme == "s3":
            words = {"endpoint": ("AWS_ENDPOINT_URL",), "aws_region": ("AWS_REGION", "AWS_DEFAULT_REGION")}
            found = {word: next((os.environ[n] for n in names if os.environ.get(n)), "") for word, names in words.items()}
            spec |= {word: value for word, value in found.items() if value}
            kind = "environment" if all(map(os.environ.get, _KEYS)) else None if _has_credentials() else "anonymous"
            spec |= {"aws_credentials": {"type": kind}} if kind else {}
        text = f"{scheme}://{rest}"
        with explained(text, spec), told(text, "the list of its objects"):
            store = answer(ts.KvStore.open(spec), faults.AT_FIRST)
            with suppress(ValueError):  # what is wrong, the list says better
                answer(store.read(_ANY, byte_range=slice(0, 1)), faults.AT_FIRST)
            keys = [key.decode() for key in answer(store.list())]
        files = {key for key in keys if not key.endswith("/")}  # these are what consoles show as folders
        return cls(text=text, spec=spec, store=store, files=files)

    def state(self, name: str) -> str:
        """What changes when an object that speaks for others is written again."""
        if not name.endswith(_TELLING):
            return ""
        with told(self.text, name):
            return str(answer(self.store.read(name, byte_range=slice(0, 1))).stamp.generation)


def _has_credentials() -> bool:
    """Whether there may be any for S3."""
    files = [Path.home() / ".aws" / name for name in ("credentials", "config")]
    amazons = {"/sys/devices/virtual/dmi/id/sys_vendor": "Amazon", "/sys/hypervisor/uuid": "ec2"}
    ours = any(Path(name).is_file() and Path(name).read_text().startswith(word) for name, word in amazons.items())
    return any(map(os.environ.get, _SIGNS)) or any(file.is_file() for file in files) or ours


@contextmanager
def explained(place: str, spec: Mapping[str, Any]) -> Iterator[None]:
    """Say what to do where a store does not know us, or its bucket.

    Raises:
        InputError: there is no such bucket.
        OSError: it does not let us.
    """
    try:
        yield
    except (InputError, OSError) as error:
        bucket = spec["bucket"]
        if "Invalid" in str(error) and "bucket name" in str(error):
            raise InputError(f"{place}: {bucket!r} is no name of a bucket; correct it") from error
        if "NoSuchBucket" in str(error) or "bucket does not exist" in str(error):
            ways = ", AWS_REGION or AWS_ENDPOINT_URL" if spec["driver"] == "s3" else ""
            raise InputError(f"{place}: there is no bucket {bucket!r}; correct its name{ways}") from error
        if not isinstance(error, PermissionError) or spec.get("aws_credentials") != {"type": "anonymous"}:
            raise
        text = "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or make ~/.aws/credentials"
        raise PermissionError(error.errno, text, error.filename) from error
