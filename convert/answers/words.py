"""What the command says about itself: its purpose, examples, exit codes, and whom it takes for another program's user.

In: nothing. Out: texts. It knows no option.
"""

from __future__ import annotations

ABOUT = "Fuse the gate and up projections of MoE checkpoints (safetensors, Orbax)\noffline, split them, prove it."
EXAMPLES = """\
examples:
  convert --inspect ckpt                           what it is, what can be done
  convert --prefuse ckpt fused                     one tensor wi, (E, K, 2N)
  convert --prefuse ckpt fused --dry-run           the plan; nothing is written
  convert --prefuse ckpt v5 --layout transformers  as transformers 5 loads it
  convert --split fused again                      the exact inverse
  convert --merge adapter merged --base ckpt       LoRA added, in float32
  convert --to orbax ckpt maxtext                  for MaxText; back: --to hf
  convert --verify ckpt fused                      equal weights, equal GEMMs
  convert --verify fused                           the digests in its manifest
  convert --digest ckpt fused                      one sha256 of what each holds
  convert --families qwen3_moe                     a model family; no name: all
  convert --layouts                                the words behind --layout
  convert --help verify                            the options of one action
"""
EPILOG = """exit codes: 0 done or equal, 1 a difference, 2 usage, 3 input missing or
corrupt, 4 cannot plan, 5 output exists or in use, 6 disk full or failing (run
again to go on), 70 a bug, 130 / 143 interrupted (run again to go on)
"""
IMAGES = frozenset(
    [f".{end}" for end in ("png", "jpg", "jpeg", "gif", "webp", "tif", "tiff", "bmp", "svg", "pdf", "heic")]
    + [f"-{word}" for word in ("resize", "quality", "crop", "rotate", "density")]
)
"""How files end, and options begin, of the other program that is called `convert`."""
MEANT = {
    "--output": "the output is the second path",
    "--input": "the input is the first path",
    "--fuse": "did you mean --prefuse?",
    "--unfuse": "did you mean --split?",
    "--compare": "did you mean --verify?",
    "--info": "did you mean --inspect?",
    "--force": "did you mean --overwrite?",
    "--verbose": "--dry-run shows the plan, --debug tracebacks",
    "--threads": "did you mean --jobs?",
    "--device": "conversions use no GPU or TPU; --verify takes what JAX finds (JAX_PLATFORMS)",
    "--token": "nothing is downloaded here; hf download does",
    "--yes": "nothing is asked; --overwrite replaces an output",
    "--log": "--debug shows tracebacks, --progress plain is for logs",
    "--dtype": "types stay as they are; --dequantize computes bfloat16 of quantised weights",
}
MEANT |= {
    short: MEANT.get(flag, f"did you mean {flag}?")
    for short, flag in {
        "-o": "--output", "--out": "--output", "-i": "--input", "--in": "--input", "--diff": "--compare",
        "--check": "--compare", "--show": "--info", "-v": "--verbose", "--workers": "--threads", "-j": "--jobs",
        "-q": "--quiet", "-V": "--version", "-n": "--dry-run", "--tp": "--shards", "--list": "--families",
        "--target-layout": "--layout", "-f": "--force", "--num-workers": "--threads", "-t": "--threads", "-vv": "--verbose",
        "--tensor-parallel-size": "--shards", "--tp-size": "--shards", "--ram": "--memory", "-m": "--memory",
        "-y": "--yes", "--cuda": "--device", "--gpu": "--device", "--tpu": "--device", "--revision": "--token",
        "--log-level": "--log", "--model": "--input", "--format": "--to", "--output-format": "--to",
        "--model-type": "--family", "--clean": "--no-resume",
    }.items()
}  # fmt: skip
"""Options of other programs -> what is said of them."""
OTHER_PROGRAM = "this converts MoE checkpoints; for pictures, call ImageMagick's convert by its full path, or magick"
