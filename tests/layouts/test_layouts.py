"""Every target against an independent construction: the formulas of the kernels themselves, in NumPy.

`fuse` and `chunk_pad` were checked against tpu-inference's `process_w13_for_gmm` and MaxText's `_fuse_moe_weights`.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from convert.errors import InputError, PlanError, UsageError
from convert.options import Choices
from convert.planning.choices import check
from convert.planning.planner import make_plan
from layouts.language.pattern import Pattern
from layouts.tables.families import FAMILIES
from layouts.tables.targets import target
from tests.tiny import MemoryReader, logical, memory, run, same, tensors

QWEN = next(family for family in FAMILIES if family.name == "qwen3_moe")
E, K = 3, 4
WI, WO = "model.layers.1.mlp.experts.wi", "model.layers.1.mlp.experts.wo"


def chunk_pad(w, shards, padded):
    n = w.shape[-1]
    chunk, wanted = n // shards, padded // shards
    w = w.reshape(*w.shape[:-1], shards, chunk)
    return np.concatenate([w, np.zeros((*w.shape[:-1], wanted - chunk), w.dtype)], -1) if wanted > chunk else w


def fuse(gate, up, shards=1, padded=None):
    padded = padded or gate.shape[-1]
    both = np.concatenate([chunk_pad(gate, shards, padded), chunk_pad(up, shards, padded)], -1)
    return both.reshape(*gate.shape[:-1], 2 * padded)


def lanes(gate, up, shards, width):
    chunk = gate.shape[-1] // shards
    turn = [w.reshape(*w.shape[:-1], shards, chunk // width, width) for w in (gate, up)]
    return np.stack(turn, -2).reshape(*gate.shape[:-1], 2 * gate.shape[-1])


def weights(n, k=K):
    wi, wo = logical(1, E, k, n).values()
    return wi[:, :, 0], wi[:, :, 1], wo


def reader(n, k=K) -> MemoryReader:
    return memory(QWEN, layers=(1,), e=E, k=k, n=n)


def up_to(size, multiple):
    return -(-size // multiple) * multiple


# Padded N by MaxText's rule before 0.2.5 and by the kernel's: adapter.py of MaxText e591f30cb, tpu-inference
# get_w13_padding_config.
PADDED = {
    (512, 4): (1024, 512), (512, 8): (2048, 1024), (704, 1): (1024, 768), (704, 4): (1024, 1024), (768, 1): (768, 768),
    (768, 2): (1024, 768), (768, 8): (2048, 1024), (1408, 1): (2048, 1408), (1408, 8): (2048, 2048), (1536, 4): (2048, 1536),
    (2560, 4): (4096, 2560), (2880, 8): (4096, 3072), (2880, 16): (4096, 4096),
}  # fmt: skip


@pytest.mark.parametrize(("n", "shards"), PADDED)
@pytest.mark.parametrize("rule", ["maxtext-pow2", 128])
def test_each_shard_has_its_own_gate_and_up_padded(n, shards, rule):
    gate, up, wo = weights(n)
    source = reader(n)
    fused = run(source, "prefuse", layout="per-shard", shards=shards, align=rule)
    padded = PADDED[n, shards][rule == 128]
    assert np.array_equal(fused.arrays[WI], fuse(gate, up, shards, padded))
    assert np.array_equal(fused.arrays[WO], wo), "wo is never padded"
    assert same(run(fused, "split").arrays, source.arrays)


# The widths of experts in MaxText 0.2.5 (`configs/models`), with all of 1..16 shards that divide them.
WIDTHS = (16, 64, 512, 704, 768, 1024, 1408, 1536, 2048, 2560, 2880, 6144, 8192, 14336, 16384, 20480)
# Where today's rule and the older one differ, by hand: the models and others.
TODAY = {
    (2880, 1): 3072, (2880, 2): 3072, (2880, 4): 3072, (2880, 3): 3072, (2880, 6): 3072, (2880, 8): 4096, (2880, 15): 3840,
    (704, 1): 768, (1408, 1): 1536, (1408, 2): 1536, (1408, 11): 2816, (1536, 3): 1536, (1536, 4): 2048, (1536, 12): 3072,
    (2560, 4): 3072, (768, 1): 768, (768, 3): 768, (512, 4): 1024, (2560, 10): 2560, (64, 16): 4096,
}  # fmt: skip


def maxtext_width(n, shards):
    """MaxText 0.2.5, `compute_padded_moe_mlp_dim`: the next multiple of 256 x S, unless each shard has a multiple of 256."""
    return n if n // shards % 256 == 0 else -(-n // (256 * shards)) * 256 * shards


@pytest.mark.parametrize("n", WIDTHS)
def test_maxtext_pads_each_of_its_widths_for_any_number_of_shards(n):
    for shards in (s for s in range(1, 17) if n % s == 0):
        wi = target("per-shard", QWEN, shards=shards, align="maxtext")["wi"]
        sizes = {"e": 1, "k": 2, "g": 2, "s": shards, "n": n // shards}
        assert Pattern(wi.pattern).expand(3).shape(sizes)[-1] == 2 * maxtext_width(n, shards)
        assert maxtext_width(n, shards) == TODAY.get((n, shards), maxtext_width(n, shards))


@pytest.mark.parametrize(
    ("rule", "n", "shards"),
    [("maxtext", 768, 3), *itertools.product(("maxtext", "maxtext-pow2"), (704, 1536, 2880), (1, 4))],
)
def test_the_record_tells_which_rule_of_maxtext_padded(rule, n, shards):
    """A record of the older rule says `n%maxtext`, and is read like that for ever."""
    gate, up, _ = weights(n)
    fused = run(reader(n), "prefuse", layout="per-shard", shards=shards, align=rule)
    padded = maxtext_width(n, shards) if rule == "maxtext" else {704: 1024, 1536: 1536 if shards == 1 else 2048, 2880: 4096}[n]
    assert np.array_equal(fused.arrays[WI], fuse(gate, up, shards, padded))
    assert f"g n%{256 if rule == 'maxtext' else 'maxtext'})" in str(fused.record)
    assert same(run(fused, "split").arrays, reader(n).arrays)
    if rule == "maxtext-pow2":  # an older output becomes one of today
        today = run(fused, "prefuse", layout="per-shard", shards=shards, align="maxtext")
        assert np.array_equal(today.arrays[WI], fuse(gate, up, shards, maxtext_width(n, shards)))


@pytest.mark.parametrize(("n", "one", "other"), [(96, 8, 4), (96, 3, 4), (96, 2, 6), (768, 8, 1)])
def test_from_any_number_of_shards_to_any_other(n, one, other):
    source = reader(n)
    relaid = run(run(source, "prefuse", layout="per-shard", shards=one), "prefuse", layout="per-shard", shards=other)
    assert same(relaid.arrays, run(source, "prefuse", layout="per-shard", shards=other).arrays)
    assert same(run(relaid, "split").arrays, source.arrays)


@pytest.mark.parametrize("n", [64, 100, 704])
def test_expert_parallel_pads_each_half(n):
    gate, up, _ = weights(n)
    fused = run(reader(n), "prefuse", layout="gmm-ep")
    assert np.array_equal(fused.arrays[WI], fuse(gate, up, 1, up_to(n, 128)))
    assert same(run(fused, "split").arrays, reader(n).arrays)


@pytest.mark.parametrize(("n", "k"), [(64, 4), (256, 256), (300, 260)])
def test_fused_moe_has_gate_and_up_side_by_side_padded_in_both(n, k):
    gate, up, wo = weights(n, k)
    fused = run(reader(n, k), "prefuse", layout="fused-moe").arrays
    wide = ((0, 0), (0, up_to(k, 256) - k), (0, up_to(n, 256) - n))
    assert np.array_equal(fused[WI.replace("wi", "w13")], np.stack([np.pad(gate, wide), np.pad(up, wide)], 1))
    assert np.array_equal(fused[WO.replace("wo", "w2")], np.pad(wo, (wide[0], wide[2], wide[1])))
    assert same(run(run(reader(n, k), "prefuse", layout="fused-moe"), "split").arrays, reader(n, k).arrays)


@pytest.mark.parametrize(
    ("layout", "n", "shards", "width"),
    [("lane", 512, 2, 128), ("lane", 256, 1, 128), ("glu32", 96, 1, 32), ("glu64", 192, 1, 64)],
)
def test_gate_and_up_in_turn(layout, n, shards, width):
    gate, up, _ = weights(n)
    source = reader(n)
    fused = run(source, "prefuse", layout=layout, shards=shards)
    assert np.array_equal(fused.arrays[WI], lanes(gate, up, shards, width))
    assert same(run(fused, "split").arrays, source.arrays)


def test_rows_of_vllm_cutlass_and_flashinfer():
    gate, up, wo = weights(6)
    w13, w2 = WI.replace("wi", "w13_weight"), WO.replace("wo", "w2_weight")
    rows, turned = (np.concatenate(pair, -1).swapaxes(1, 2) for pair in ((gate, up), (up, gate)))
    for layout, wanted in (("vllm", rows), ("cutlass", rows), ("flashinfer", turned)):
        fused = run(reader(6), "prefuse", layout=layout)
        assert np.array_equal(fused.arrays[w13], wanted)
        assert np.array_equal(fused.arrays[w2], wo.swapaxes(1, 2))
        assert same(run(fused, "split").arrays, reader(6).arrays)


@pytest.mark.parametrize("width", [1, 3, 32, 48, 96])
def test_blocks_of_gate_and_up_of_any_size(width):
    gate, up, _ = weights(96)
    fused = run(reader(96), "prefuse", layout="glu", glu_block=width)
    assert np.array_equal(fused.arrays[WI], lanes(gate, up, 1, width))
    assert same(run(fused, "split").arrays, reader(96).arrays)
    told = run(MemoryReader(fused.arrays, config=fused.config), "split", source_layout=f"glu:{width}")
    assert same(told.arrays, reader(96).arrays)


def test_a_block_is_for_layouts_of_blocks_and_divides():
    with pytest.raises(UsageError, match="'concat' has no blocks whose size can be chosen; did you mean --layout=glu"):
        check(Choices(glu_block=32))
    with pytest.raises(PlanError, match="n = 96 does not divide into n = 64"):
        make_plan(reader(96), Path("out"), "prefuse", Choices(layout="glu"))
    with pytest.raises(PlanError, match="no layout is called 'concat:0'"):
        make_plan(reader(96), Path("out"), "prefuse", Choices(source_layout="concat:0"))


@pytest.mark.parametrize(
    ("layout", "first", "width"), [("cutedsl", 1, 64), ("cutedsl", 1, 16), ("cutedsl", 1, 128), ("interleaved-rows", 0, 1)]
)
def test_rows_of_gate_and_up_in_turn(layout, first, width):
    pair = [part.swapaxes(1, 2) for part in weights(128)[:2]]
    fused = run(reader(128), "prefuse", layout=layout, glu_block=width)
    rows = fused.arrays[WI.replace("wi", "w13_weight")]
    for at in range(0, 128, width):
        for g in (0, 1):
            start = 2 * at + g * width
            assert np.array_equal(rows[:, start : start + width], pair[first ^ g][:, at : at + width])
    assert same(run(fused, "split").arrays, reader(128).arrays)


def test_interleaved_columns():
    gate, up, _ = weights(6)
    wi = run(reader(6), "prefuse", layout="interleaved").arrays[WI]
    assert np.array_equal(wi[..., ::2], gate)
    assert np.array_equal(wi[..., 1::2], up)


@pytest.mark.parametrize(
    "layout", ["concat", "transformers", "vllm", "flashinfer", "interleaved", "per-shard", "fused-moe", "lane", "cutedsl"]
)
@pytest.mark.parametrize("other", ["concat", "flashinfer", "interleaved", "gmm-ep", "glu32", "lane", "cutedsl"])
def test_any_layout_becomes_any_other(layout, other):
    if layout == other:
        return
    source = reader(256)
    cut = {"shards": 2} if layout in ("per-shard", "lane") else {}
    relaid = run(run(source, "prefuse", layout=layout, **cut), "prefuse", layout=other)
    assert same(relaid.arrays, run(source, "prefuse", layout=other).arrays)
    assert same(run(relaid, "split").arrays, source.arrays)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"layout": "per-shard", "shards": 7}, "n = 96 does not divide into s = 7"),
        (
            {"layout": "lane", "shards": 1},
            "n = 96 does not divide into n = 128; --layout=lane is padded with --align=128",
        ),
        ({"layout": "per-shard", "shards": 6, "align": "maxtext-pow2"}, "does not divide into 6 shards"),
    ],
)
def test_what_cannot_be_cut_is_refused(choices, words):
    with pytest.raises(PlanError, match=words):
        make_plan(reader(96), Path("out"), "prefuse", Choices(**choices))


@pytest.mark.parametrize("layout", ["per-shard", "gmm-ep", "fused-moe"])
def test_what_stands_in_the_padding_is_not_thrown_away(layout):
    fused = run(reader(96), "prefuse", layout=layout)
    name = next(name for name in fused.arrays if name.endswith(("wi", "w13")))
    fused.arrays[name][1, ..., -1] = 7
    with pytest.raises(InputError, match=f"{name}.*should hold zeros"):
        run(fused, "split")


def test_an_unmarked_sharded_tensor_needs_its_number_of_shards():
    source = reader(96)
    fused = run(source, "prefuse", layout="per-shard", shards=8)
    bare = MemoryReader(fused.arrays, config=source.config)
    with pytest.raises(PlanError, match="--source-layout"):
        run(bare, "split")
    assert same(run(bare, "split", source_layout="per-shard:8").arrays, source.arrays)
    assert same(run(bare, "split", source_layout="per-shard:8:128").arrays, source.arrays)
    with pytest.raises((PlanError, InputError)):
        run(bare, "split", source_layout="per-shard:3")


def test_other_tensors_are_untouched():
    source = memory(QWEN, n=96)
    fused = run(source, "prefuse", layout="per-shard", shards=8)
    others = set(source.arrays) - set(tensors(QWEN, others=False, n=96))
    assert others
    assert all(fused.arrays[name] is not None and np.array_equal(fused.arrays[name], source.arrays[name]) for name in others)


MESH = """
import numpy as np, jax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
S, E, K, N = 8, 3, 16, 96
rng = np.random.default_rng(0)
gate, up = rng.standard_normal((2, E, K, N)).astype("f4")
wide = [np.pad(w.reshape(E, K, S, N // S), ((0, 0),) * 3 + ((0, 128 - N // S),)) for w in (gate, up)]
sharded, plain = np.load("sharded.npy"), np.concatenate((gate, up), -1)
assert np.array_equal(sharded, np.stack(wide, 3).reshape(E, K, -1)), "the file is what the formula says"
mesh = Mesh(np.array(jax.devices()), ("model",))
place = NamedSharding(mesh, P(None, None, "model"))
for shard in jax.device_put(sharded, place).addressable_shards:
    s = shard.index[2].start // 256
    columns = slice(s * N // S, (s + 1) * N // S)
    assert np.array_equal(shard.data[..., : N // S], gate[..., columns])
    assert np.array_equal(shard.data[..., 128 : 128 + N // S], up[..., columns])
def cut_here(x, wi):
    g, u = jnp.split(jnp.einsum("tk,ekn->etn", x, wi).reshape(E, -1, S, wi.shape[-1] // S), 2, -1)
    return jax.nn.silu(g) * u
def cut_globally(x, wi):
    g, u = jnp.split(jnp.einsum("tk,ekn->etn", x, wi), 2, -1)
    return jax.nn.silu(g) * u
x = jax.device_put(rng.standard_normal((5, K)).astype("f4"), NamedSharding(mesh, P()))
words = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
for call, wi, wanted in ((cut_here, sharded, False), (cut_globally, plain, True)):
    compiled = jax.jit(call, out_shardings=place).lower(x, jax.device_put(wi, place)).compile()
    assert any(word in compiled.as_text() for word in words) == wanted, call
out = jax.jit(cut_here)(x, jax.device_put(sharded, place))[..., : N // S].reshape(E, 5, N)
g, u = jnp.einsum("tk,ekn->etn", x, gate), jnp.einsum("tk,ekn->etn", x, up)
np.testing.assert_allclose(out, jax.nn.silu(g) * u, rtol=1e-5, atol=1e-5)
"""


def test_on_a_mesh_each_device_has_its_own_gate_and_up_and_needs_no_other(tmp_path):
    rng = np.random.default_rng(0)
    gate, up = rng.standard_normal((2, 3, 16, 96)).astype("f4").view("u4")
    arrays = {}
    for e in range(3):
        place = f"model.layers.1.mlp.experts.{e}."
        arrays |= {f"{place}gate_proj.weight": gate[e].T, f"{place}up_proj.weight": up[e].T}
        arrays |= {f"{place}down_proj.weight": np.zeros((16, 96), "u4")}
    source = MemoryReader(arrays, config={"model_type": "qwen3_moe"})
    wi = run(source, "prefuse", layout="per-shard", shards=8).arrays[WI]
    np.save(tmp_path / "sharded.npy", wi.view("f4"))
    env = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=8", JAX_PLATFORMS="cpu")
    done = subprocess.run([sys.executable, "-c", MESH], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
