"""What the command says about itself: its purpose, examples, exit codes, and whom it takes for another program's user.

In: nothing. Out: texts. It knows no option.
"""

from __future__ import annotations

ABOUT = "Fuse the gate and up projections of MoE checkpoints (safetensors, Orbax) offline, split them, prove it."
EXAMPLES = """\
examples:
  convert --inspect ckpt                                 what it is, and what could be done with it
  convert --prefuse ckpt ckpt-fused                      wi_0, wi_1 -> wi (E, K, 2N), wo (E, N, K)
  convert --prefuse ckpt ckpt-fused --dry-run            the plan; nothing is written
  convert --prefuse ckpt ckpt-v5 --layout transformers   gate_up_proj (E, 2N, K), as transformers 5 loads it
  convert --split ckpt-fused ckpt-again                  the exact inverse
  convert --merge adapter merged --base ckpt             base + LoRA adapter, computed in float32
  convert --to orbax ckpt ckpt-maxtext                   as MaxText reads it; --to hf is the way back
  convert --verify ckpt ckpt-fused                       equal weights and equal grouped GEMMs
  convert --verify ckpt-fused                            the digests in its manifest
  convert --digest ckpt ckpt-fused                       what they hold, by one sha256 each
  convert --families qwen3_moe                           what is known of a model family; without a name, all
  convert --layouts                                      what the words behind --layout mean
  convert --help verify                                  the options of one action
"""
EPILOG = """exit codes: 0 done or equal, 1 a difference, 2 usage, 3 input missing or corrupt, 4 cannot plan,
5 output exists or in use, 6 disk full or failing (run again to go on), 70 a bug, 130 / 143 interrupted (run again to go on)
"""
IMAGES = frozenset(
    [f".{end}" for end in ("png", "jpg", "jpeg", "gif", "webp", "tif", "tiff", "bmp", "svg", "pdf", "heic")]
    + [f"-{word}" for word in ("resize", "quality", "crop", "rotate", "density")]
)
"""How files end, and options begin, of the other program that is called `convert`."""
OTHER_PROGRAM = "this converts MoE checkpoints; for pictures, call ImageMagick's convert by its full path, or magick"
