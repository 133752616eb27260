"""A quantised checkpoint, read as if it were bfloat16: values are computed here, and where adapters are merged.

    formats.py   the table: how values and scales are stored       find.py      which tensors are stored so
    values.py    what bytes stand for                              compute.py   a block of one matrix
    reader.py    the checkpoint with these tensors computed

Every format is the same: the value that some bits stand for, times the scale of its block; in some that scale is itself times,
or over, one number for the tensor. The product is taken in float32 and rounded once, to nearest even.
"""

from layouts.dequantize.formats import RULE
from layouts.dequantize.reader import DequantizingReader, dequantized

__all__ = ["RULE", "DequantizingReader", "dequantized"]
