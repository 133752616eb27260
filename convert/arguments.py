"""The arguments of the `convert` command."""

from __future__ import annotations

import argparse

EPILOG = """\
examples:
  convert --prefuse ckpt ckpt-fused                      wi_0, wi_1 -> wi (E, K, 2N), wo (E, N, K)
  convert --prefuse ckpt ckpt-v5 --layout transformers   gate_up_proj (E, 2N, K), as transformers 5 loads it
  convert --split ckpt-fused ckpt-again                  the exact inverse
  convert --verify ckpt ckpt-fused                       equal weights and equal grouped GEMMs
  convert --verify ckpt-fused                            the digests in its manifest

exit codes: 0 done or equal, 1 a difference, 2 usage, 3 input missing or corrupt, 4 cannot plan, 5 output exists or in use,
6 disk full or failing (run again to go on), 70 a bug, 130 / 143 interrupted (run again to go on)
"""
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parser() -> argparse.ArgumentParser:
    """All options, with their help."""
    found = argparse.ArgumentParser(
        prog="convert",
        description="Fuse the gate and up projections of MoE checkpoints (safetensors, Orbax) offline, split them, prove it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    action = found.add_mutually_exclusive_group()
    action.add_argument("--prefuse", action="store_true", help="write CKPT_IN to CKPT_OUT with one fused tensor wi")
    action.add_argument("--split", action="store_true", help="write CKPT_IN to CKPT_OUT with separate gate and up")
    action.add_argument("--verify", action="store_true", help="compare two checkpoints, or re-check one's digests")
    action.add_argument("--families", action="store_true", help="print the model families in the table")
    found.add_argument("paths", nargs="*", metavar="CKPT", help="input and output, or the two to compare")
    found.add_argument("--layout", metavar="NAME", help="target of --prefuse (default: concat); --families lists them")
    found.add_argument("--shards", type=_positive, default=1, metavar="S", help="tensor-parallel shards of per-shard and lane")
    found.add_argument(
        "--align", type=_align, default=128, metavar="A", help="per-shard: columns to pad to (default: 128), or maxtext"
    )
    found.add_argument("--to", choices=("hf", "orbax"), help="format of CKPT_OUT, if another than CKPT_IN's")
    found.add_argument("--dequantize", choices=("bf16",), help="compute FP8 block and MXFP4 weights as bfloat16 (not lossless)")
    found.add_argument("--params-only", action="store_true", help="--to hf: leave out step and optimizer state")
    found.add_argument("--drop-optimizer", action="store_true", help="Orbax: leave the optimizer's state out (muon, adafactor)")
    found.add_argument("--no-scan", action="store_true", help="--to orbax: a subtree for each layer, not stacked ones")
    found.add_argument(
        "--keep-chunks",
        action="store_true",
        help="Orbax: do not cut arrays that are one large chunk (fast; restores read them whole)",
    )
    found.add_argument(
        "--scan-axis",
        type=_natural,
        metavar="{0,1}",
        help="Orbax: where MaxText's layers are stacked, its param_scan_axis (default: as the tree says, else 1)",
    )
    found.add_argument(
        "--source-layout",
        metavar="NAME",
        help="the layout of a fused input that does not say so itself; per-shard:8 has 8 shards",
    )
    found.add_argument("--family", metavar="NAME", help="take this family instead of what config.json says")
    found.add_argument("--dry-run", action="store_true", help="print the plan and touch nothing; --verify: the cost")
    found.add_argument("--jobs", type=_positive, metavar="N", help="workers (default: one per CPU, at most 8)")
    found.add_argument("--memory", type=_bytes, default="2GiB", metavar="SIZE", help="memory budget (default: 2GiB)")
    found.add_argument("--max-shard-size", type=_bytes, default="5GB", metavar="SIZE", help="data per shard (default: 5GB)")
    found.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on after an interruption")
    found.add_argument("--overwrite", action="store_true", help="replace CKPT_OUT once the new one is complete")
    found.add_argument("--distributed", action="store_true", help="one of several processes, found by JAX (SLURM, GKE, TPU)")
    found.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 of several is found; implies --distributed")
    found.add_argument("--num-processes", type=_positive, metavar="P", help="how many there are; --dry-run: divide the work")
    found.add_argument("--process-id", type=_natural, metavar="I", help="which of them this is, from 0")
    found.add_argument("--no-gemm", action="store_true", help="--verify: compare the weights only")
    found.add_argument("--layers", type=_numbers, metavar="0,3-5", help="--verify: only these layers")
    found.add_argument("--experts", type=_numbers, metavar="0,3-5", help="--verify: only these experts")
    found.add_argument("--tokens", type=_positive, default=1, metavar="T", help="--verify: T times the tokens")
    found.add_argument("--backend", default="ragged_dot", metavar="NAME", help="--verify: which grouped GEMM; all for all")
    found.add_argument("--mesh", type=_sizes, metavar="expert=4,model=2", help="--verify: run on so many devices, too")
    found.add_argument("--json", action="store_true", help="--verify: print the verdict as JSON")
    found.add_argument("--report", metavar="FILE.html", help="--verify: write the verdict as one offline page, too")
    found.add_argument("--quiet", action="store_true", help="no progress bar")
    found.add_argument("--debug", action="store_true", help="show tracebacks")
    return found


def _bytes(text: str) -> int:
    """`512MiB`, `5GB`, `1.5g` or a plain number of bytes."""
    number = text.strip().lower().removesuffix("b")
    digits = number.rstrip("kmgti")
    unit = number[len(digits) :]
    try:
        value = int(float(digits) * UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512MiB or 5GB") from None
    if value <= 0:
        raise argparse.ArgumentTypeError("a size must be above zero")
    return value


def _numbers(text: str) -> frozenset[int]:
    """`0,3-5` is 0, 3, 4 and 5."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or (dash and not last) or len(part) > 20:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0,3-5")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def _sizes(text: str) -> dict[str, int]:
    """`expert=4,model=2` as a dictionary."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(equals for _, equals, _ in pairs) or len({name for name, _, _ in pairs}) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not a mesh such as expert=4,model=2")
    return {name: _positive(size) for name, _, size in pairs}


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return int(text)


def _align(text: str) -> int | str:
    return text if text == "maxtext" else _positive(text)
