"""Safetensors are written past the page cache of a disk."""

from tests.on_disk import tmp_path, tmp_path_factory  # noqa: F401
