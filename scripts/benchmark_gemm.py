"""Time one gated MoE layer with gate and up apart, concatenated in the step, and prefused, with real grouped GEMMs.

    python scripts/benchmark_gemm.py --json scripts/results/benchmark_gemm_cpu.json       # CPU: K and N divided by 4
    OMP_NUM_THREADS=1 python scripts/benchmark_gemm.py --backend torch --scale 1 --passes forward     # true widths
    XLA_FLAGS=--xla_gpu_experimental_use_ragged_dot_fusion=true python scripts/benchmark_gemm.py   # CUDA, recent XLA

Only the grouped GEMMs and silu(gate) * up: no router, no gather or scatter of tokens. All bf16. Variants are checked
against each other and against numpy before they are timed. They take turns, each call with another routing, so that
neither noise nor a cache favours one; ratios are of neighbours in time, with their quartiles. `FLOPs x` is what XLA
counts over what is needed: about E says that `ragged_dot` became a masked dense product, whose cost hides what is
compared. `ideal` is memory only: each active expert's weights once (again, and all gradients written, for backward).
Results are kept in scripts/results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

Array = Any
"""Of jax or of torch."""
Step = Callable[..., Any]
"""(x, groups, weights) to the layer's output, or to (gradient of x, (gradient of each weight))."""
Row = dict[str, Any]
"""One line of the table, as JSON has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A layer's sizes: wi_0 and wi_1 are (experts, embed, mlp), wo is (experts, mlp, embed)."""

    model: str
    experts: int = 128
    embed: int
    mlp: int
    top_k: int = 8


SHAPES: Sequence[Shape] = (
    Shape(model="qwen3-30b-a3b", embed=2048, mlp=768),
    Shape(model="qwen3-235b-a22b", embed=4096, mlp=1536),
)
VARIANTS = ("unfused", "concat", "prefused")
PASSES = ("forward", "both")
CPU_TOKENS, TOKENS = (1, 8, 64), (1, 8, 64, 256, 2048, 8192)
ROUTINGS = 8
"""How many routings take turns: one token's 8 experts would stay in a cache, those of 8 tokens do not."""
PUBLISHED = "Published, MaxText on TPU, qwen3-30b-a3b decode, 48 layers: 28.4 ms unfused, 20.4 concat, 6.1 prefused"
COLUMNS: Mapping[str, int] = {
    "model": 15, "tokens": 6, "pass": 7, "active": 6, "unfused ms": 10, "concat ms": 9, "prefused ms": 11,
    "ideal ms": 8, "unfused/prefused": 17, "concat/prefused": 17, "FLOPs x": 7,
}  # fmt: skip
"""Each column's title and width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """What the layer needs of a library. `grouped` is (rows, k) sorted by expert, (E, k, n), groups to (rows, n)."""

    device: str
    version: str
    grouped: Callable[[Array, Array, Array], Array]
    concat: Callable[[Array, Array], Array]
    silu: Callable[[Array], Array]
    random: Callable[[int, tuple[int, ...]], Array]
    groups: Callable[[Any], Array]
    host: Callable[[Array], Any]
    build: Callable[[Step, bool, tuple[Any, ...]], tuple[Step, dict[str, Any]]]
    wait: Callable[[Any], object]


def jax_backend() -> Backend:
    """`jax.lax.ragged_dot`, jitted, bf16 out as MaxText asks for it. Weights are arguments, so nothing is folded."""
    import jax
    import jax.numpy as jnp

    def build(layer: Step, backward: bool, arguments: tuple[Any, ...]) -> tuple[Step, dict[str, Any]]:
        def loss(*a: Any) -> Array:
            return (layer(*a).astype(jnp.float32) ** 2).sum() / 2  # not linear: else the last forward GEMM is dead code

        program = jax.jit(jax.grad(loss, (0, 2)) if backward else layer).lower(*arguments).compile()
        return program, facts_of(program)

    return Backend(
        device=f"{jax.devices()[0].platform} {jax.devices()[0].device_kind}",
        version=f"jax {jax.__version__}",
        grouped=lambda x, w, groups: jax.lax.ragged_dot(x, w, groups, preferred_element_type=x.dtype),
        concat=lambda a, b: jnp.concatenate((a, b), -1),
        silu=jax.nn.silu,
        random=lambda seed, shape: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16),
        groups=lambda sizes: jnp.asarray(sizes, jnp.int32),
        host=lambda a: np.asarray(a, np.float32),
        build=build,
        wait=jax.block_until_ready,
    )


def torch_backend() -> Backend:
    """`torch._grouped_mm`, eager: a second opinion, and on CPUs the one that computes each row once."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def build(layer: Step, backward: bool, _: tuple[Any, ...]) -> tuple[Step, dict[str, Any]]:
        def gradients(x: Array, groups: Array, weights: tuple[Array, ...]) -> Any:
            leaves = [a.detach().requires_grad_() for a in (x, *weights)]
            loss = (layer(leaves[0], groups, leaves[1:]).float() ** 2).sum() / 2
            of_x, *of_weights = torch.autograd.grad(loss, leaves)
            return of_x, tuple(of_weights)

        return (gradients if backward else torch.no_grad()(layer)), {}

    def random(seed: int, shape: tuple[int, ...]) -> Array:
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    return Backend(
        device=torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        version=f"torch {torch.__version__}",
        grouped=lambda x, w, groups: torch._grouped_mm(x, w, offs=groups),
        concat=lambda a, b: torch.cat((a, b), -1),
        silu=torch.nn.functional.silu,
        random=random,
        groups=lambda sizes: torch.tensor(sizes.cumsum(), dtype=torch.int32, device=device),
        host=lambda a: a.float().cpu().numpy(),
        build=build,
        wait=lambda _: torch.cuda.synchronize() if device == "cuda" else None,
    )


BACKENDS: Mapping[str, Callable[[], Backend]] = {"ragged_dot": jax_backend, "torch": torch_backend}


def facts_of(program: Any) -> dict[str, Any]:
    """What a compiled program says of itself: heavy operations, kernels, FLOPs and bytes as XLA counts them."""
    text, cost = program.as_text(), program.cost_analysis() or {}
    return {
        "operations": Counter(re.findall(r" (dot|ragged-dot|while|custom-call|fusion|copy)\(", text)),
        "weight_concatenations": len(re.findall(r"= \w+\[\d+,\d+,\d+\]\S* concatenate\(", text)),
        "kernels": sorted(set(re.findall(r'(?:custom_call_target=|"kind":)"([^"]+)"', text))),
        "flops": cost.get("flops"),
        "bytes_accessed": cost.get("bytes accessed"),
        "temporary_bytes": getattr(program.memory_analysis(), "temp_size_in_bytes", None),
    }


def layer_of(backend: Backend, variant: str, mlp: int) -> Step:
    """The layer, (rows, K) to (rows, K), of weights (wi, wo) or (wi_0, wi_1, wo)."""

    def layer(x: Array, groups: Array, weights: Sequence[Array]) -> Array:
        if variant == "unfused":
            gate, up = (backend.grouped(x, w, groups) for w in weights[:2])
        else:
            both = backend.grouped(x, weights[0] if variant == "prefused" else backend.concat(*weights[:2]), groups)
            gate, up = both[:, :mlp], both[:, mlp:]
        return backend.grouped(backend.silu(gate) * up, weights[-1], groups)

    return layer


def route(shape: Shape, tokens: int, seed: int) -> Any:
    """How many rows each expert gets, (E,): every token picks top_k distinct experts at random."""
    scores = np.random.default_rng(seed).random((tokens, shape.experts), np.float32)
    chosen = np.argpartition(scores, shape.top_k - 1, axis=1)[:, : shape.top_k]
    return np.bincount(chosen.ravel(), minlength=shape.experts)


def assert_close(pairs: Iterable[tuple[Any, Any]], inner: int, what: str) -> None:
    """By norms over all pieces: allows one rounding to bf16, and f32's for each of `inner` products."""
    sums = np.asarray([(((a - b) ** 2).sum(), (b**2).sum()) for a, b in pairs], np.float64).sum(0)
    error, allowed = float((sums[0] / sums[1]) ** 0.5), 2.0**-7 + inner * 2.0**-23
    if not error <= allowed:  # so that NaN fails
        raise AssertionError(f"{what}: relative error {error:.1e}, allowed {allowed:.1e}")


def check(backend: Backend, shape: Shape, outs: Mapping[str, Any], x: Array, sizes: Any, weights: Any) -> None:
    """Concat and prefused against unfused, output or all gradients; 16 rows of the output against numpy."""
    host, backward = backend.host, isinstance(outs["unfused"], tuple)
    flat = {variant: (out[0], *out[1]) if backward else (out,) for variant, out in outs.items()}
    if backward:
        of_x, of_wi, of_wo = flat["prefused"]
        flat["prefused"] = (of_x, of_wi[..., : shape.mlp], of_wi[..., shape.mlp :], of_wo)
    for variant in ("concat", "prefused"):
        for got, wanted in zip(flat[variant], flat["unfused"], strict=True):
            step = max(1, len(wanted) // 16)  # in pieces: gradients are gigabytes in f32
            cuts = [slice(start, start + step) for start in range(0, len(wanted), step)]
            inner = max(shape.embed, int(max(sizes)))
            name = f"{variant} and unfused, backward={backward}"
            assert_close(((host(got[c]), host(wanted[c])) for c in cuts), inner, name)
    rows = () if backward else np.linspace(0, len(x) - 1, min(16, len(x))).astype(int)
    pairs = []
    for row, expert in zip(rows, np.repeat(np.arange(len(sizes)), sizes)[list(rows)], strict=True):
        gate, up = (host(x[int(row)]) @ host(w[int(expert)]) for w in weights[:2])
        wanted = gate / (1 + np.exp(-gate)) * up @ host(weights[2][int(expert)])
        pairs += [(host(outs["unfused"][int(row)]), wanted)]
    if pairs:
        assert_close(pairs, shape.embed, "unfused and numpy")


def seconds_of(backend: Backend, step: Step, cases: Sequence[Any], calls: int = 1) -> float:
    """Seconds a call. All are queued before the wait: on a GPU that is the device's time, not the dispatch's."""
    start = time.perf_counter()
    result = None
    for call in range(calls):
        result = step(*cases[call % len(cases)])  # one kept at a time: gradients are gigabytes
    backend.wait(result)
    return (time.perf_counter() - start) / calls


def measure_bandwidth(backend: Backend) -> float:
    """Bytes a second of 512 MiB negated or only read, the better: what memory gives here, whatever a datasheet says."""
    block = (backend.random(0, (256, 2**20)), None, None)
    kinds: Mapping[int, Step] = {2: lambda x, *_: -x, 1: lambda x, *_: x.max()}
    steps = {passes: backend.build(kind, False, block)[0] for passes, kind in kinds.items()}
    return max(passes * 2**29 / seconds_of(backend, step, [block]) for _ in range(7) for passes, step in steps.items())


def measure(backend: Backend, shape: Shape, weights: Any, tokens: int, work: str, options: Any) -> Row:
    """Check, then time, one line of the table: seconds a call of each variant, one a repetition."""
    backward, sizes = work == "both", [route(shape, tokens, seed) for seed in range(ROUTINGS)]
    x = backend.random(99, (tokens * shape.top_k, shape.embed))
    cases = {v: [(x, backend.groups(s), weights[v]) for s in sizes] for v in VARIANTS}
    built = {v: backend.build(layer_of(backend, v, shape.mlp), backward, cases[v][0]) for v in VARIANTS}
    check(backend, shape, {v: built[v][0](*cases[v][0]) for v in VARIANTS}, x, sizes[0], weights["unfused"])
    calls = {v: max(1, min(20, int(0.02 / seconds_of(backend, built[v][0], cases[v])))) for v in VARIANTS}
    seconds: dict[str, list[float]] = {v: [] for v in VARIANTS}
    for repeat in range(options.repeats):
        for v in VARIANTS:
            turned = np.roll(np.arange(ROUTINGS), repeat)
            seconds[v] += [seconds_of(backend, built[v][0], [cases[v][int(i)] for i in turned], calls[v])]
    active = float(np.mean([(s > 0).sum() for s in sizes]))
    expert, needed = 6 * shape.embed * shape.mlp, (2 if not backward else 6) * 3 * len(x) * shape.embed * shape.mlp
    return {
        "shape": asdict(shape),
        "tokens": tokens,
        "pass": work,
        "active_experts": active,
        "median_seconds": {v: float(np.median(s)) for v, s in seconds.items()},
        "seconds": seconds,
        "ideal_seconds": expert * (active + backward * (active + shape.experts)) / options.bandwidth,
        "facts": {v: facts | {"flops_over_needed": facts.get("flops", 0) / needed} for v, (_, facts) in built.items()},
    }


def line(cells: Iterable[str]) -> str:
    """A line of a markdown table that can also be read as it is."""
    return "| " + " | ".join(c.rjust(width) for c, width in zip(cells, COLUMNS.values(), strict=True)) + " |"


def as_line(row: Row) -> str:
    """A measured line: medians, and ratios of turns that followed each other, with quartiles."""
    milliseconds = [f"{1e3 * s:.3f}" for s in (*row["median_seconds"].values(), row["ideal_seconds"])]
    apart, late, early = (np.asarray(row["seconds"][v]) for v in VARIANTS)
    quartiles = [np.quantile(ratio, (0.5, 0.25, 0.75)) for ratio in (apart / early, late / early)]
    ratios = ["{:.2f} [{:.2f}-{:.2f}]".format(*q) for q in quartiles]
    flops = row["facts"]["prefused"]["flops_over_needed"]
    head = [row["shape"]["model"], str(row["tokens"]), row["pass"], f"{row['active_experts']:.0f}"]
    return line([*head, *milliseconds, *ratios, f"{flops:.1f}" if flops else ""])


def measure_model(backend: Backend, shape: Shape, options: Any) -> Iterator[Row]:
    """All lines of one model. One that does not fit says so and the rest go on."""
    sizes = [(shape.embed, shape.mlp)] * 2 + [(shape.mlp, shape.embed)]
    w0, w1, wo = (backend.random(seed, (shape.experts, *s)) * s[0] ** -0.5 for seed, s in enumerate(sizes))
    weights = {"unfused": (w0, w1, wo), "concat": (w0, w1, wo), "prefused": (backend.concat(w0, w1), wo)}
    for tokens, work in ((t, w) for t in options.tokens for w in options.passes):
        try:
            yield measure(backend, shape, weights, tokens, work, options)
        except RuntimeError as error:  # out of memory, in jax and in torch
            cells = [shape.model, str(tokens), work, "failed", *[""] * (len(COLUMNS) - 4)]
            print(line(cells), str(error).splitlines()[0], flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [shape.model for shape in SHAPES]
    parser.add_argument("--backend", choices=BACKENDS, default="ragged_dot", help="whose grouped GEMM (%(default)s)")
    parser.add_argument("--models", nargs="+", choices=names, default=names, help="whose shapes (all)")
    parser.add_argument("--tokens", nargs="+", type=int, help=f"tokens in a step ({TOKENS}; on CPUs {CPU_TOKENS})")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES, help="forward or both ways (both)")
    parser.add_argument("--scale", type=int, help="divide K and N by this, not E nor top-k (1; on CPUs 4)")
    parser.add_argument("--repeats", type=int, default=9, help="timed turns of each variant (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all seconds, HLO facts and the environment")
    return parser.parse_args()


def main() -> None:
    """Measure, print, keep."""
    options = parse()
    backend = BACKENDS[options.backend]()
    on_cpu = backend.device.startswith("cpu")
    options.scale = options.scale or (4 if on_cpu else 1)
    options.tokens = options.tokens or (CPU_TOKENS if on_cpu else TOKENS)
    options.bandwidth = measure_bandwidth(backend)
    environment = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": backend.device,
        "processors": os.cpu_count(),
        "library": backend.version,
        "backend": options.backend,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "load_average": round(os.getloadavg()[0], 1),
        "measured_gigabytes_per_second": round(options.bandwidth / 1e9, 1),
        "scale": f"K and N divided by {options.scale}",
    }
    print(", ".join(f"{key}: {value}" for key, value in environment.items() if value), end="\n\n")
    print(line(COLUMNS), line("-" * (width - 1) + ":" for width in COLUMNS.values()), sep="\n")
    chosen = (shape for shape in SHAPES if shape.model in options.models)
    scaled = [replace(s, embed=s.embed // options.scale, mlp=s.mlp // options.scale) for s in chosen]
    document: dict[str, Any] = {"environment": environment, "published": PUBLISHED, "rows": []}
    for row in (row for shape in scaled for row in measure_model(backend, shape, options)):
        print(as_line(row), flush=True)
        document["rows"].append(row)
        if options.json:  # after every row, so that a run that is cut short keeps what it measured
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\n{PUBLISHED}")


if __name__ == "__main__":
    main()
