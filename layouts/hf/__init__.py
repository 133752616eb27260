"""Hugging Face checkpoints: directories of safetensors files."""

from layouts.hf.reader import HFReader, is_checkpoint

__all__ = ["HFReader", "is_checkpoint"]
