"""LoRA beside experts in memory: what qwix computes with A and B is the same before and after; and the way back is exact."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from einops import rearrange

import convert
from convert.errors import InputError, PlanError
from layouts.adapters import trees

E, K, N, R, L, T = 3, 4, 8, 2, 5, 7
# The einsum of the weight in MaxText, those of A and B as qwix derives them, and the axes of both.
PRODUCTS = {
    "A for all": ("tk,ekn->ten", "tk,kr,ren->ten", "kr", "ren"),
    "B for all": ("etk,ekn->etn", "etk,ekr,rn->etn", "ekr", "rn"),
    "batched": ("etk,ekn->etn", "etk,ekr,ern->etn", "ekr", "ern"),
}
LAYOUTS = {  # layout and options -> how its columns are gate's and up's
    ("concat",): "g n",
    ("interleaved",): "n g",
    ("glu32",): "c g n",
    ("per-shard", 2, 3): "s g n",
    ("lane", 1): "s c g n",
}
SIZES = dict(zip("ekrnlt", (E, K, R, N, L, T), strict=True))


def shape(axes, **more):
    return tuple({**SIZES, **more}[axis] for axis in axes)


def tree(kind="A for all", scan=None, n=N, make=lambda array: array, seed=0):
    """A block with LoRA on gate and up; with `scan`, its layers are on the second axis, and those of A and B on this one."""
    rng = np.random.default_rng(seed)
    _, _, a, b = PRODUCTS[kind]
    one = {"wi": "ekn" if scan is None else "elkn", "wo": "enk" if scan is None else "elnk"}
    a, b = (axes if scan is None else axes[:scan] + "l" + axes[scan:] for axes in (a, b))
    axes = {f"wi_{g}{end}": each for g in "01" for end, each in (("", one["wi"]), ("_lora_a", a), ("_lora_b", b))} | {
        "wo": one["wo"]
    }
    found = {name: make(rng.integers(-9, 9, shape(each, n=n)).astype("f4")) for name, each in axes.items()}
    return {"moe": found | {"wo_lora_a": make(np.ones(3, "f4"))}, "norm": make(np.ones(2, "f4"))}


def asked(layout):
    name, *options = layout
    return {"layout": name, **dict(zip(("shards", "align"), options, strict=False))}


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        assert np.asarray(a).dtype == np.asarray(b).dtype


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_fused_product_is_that_of_gate_and_of_up(kind, layout):
    """Whole numbers, which no sum rounds; the columns are told apart here by einops."""
    n = {"glu32": 64, "lane": 256}.get(layout[0], N)
    params = tree(kind, n=n)
    fused = convert.prefuse_params(params, **asked(layout))["moe"]
    plain, lora, _, _ = PRODUCTS[kind]
    x = np.random.default_rng(1).integers(-3, 3, shape(plain.partition(",")[0])).astype("f4")
    found = np.einsum(plain, x, fused["wi"]) + np.einsum(lora, x, fused["wi_lora_a"], fused["wi_lora_b"])
    sizes = {"concat": {}, "interleaved": {}, "glu32": {"n": 32}, "per-shard": {"s": 2}, "lane": {"s": 1, "n": 128}}[layout[0]]
    apart = rearrange(found, f"... ({LAYOUTS[layout]}) -> ... {LAYOUTS[layout]}", g=2, **sizes)
    apart = np.moveaxis(apart, apart.ndim - len(LAYOUTS[layout].split()) + LAYOUTS[layout].split().index("g"), 0)
    for g, each in enumerate(apart):
        wi, a, b = (params["moe"][f"wi_{g}{end}"] for end in ("", "_lora_a", "_lora_b"))
        wanted = np.einsum(plain, x, wi) + np.einsum(lora, x, a, b)
        if layout[0] == "per-shard":
            each, rest = each[..., : N // 2], each[..., N // 2 :]
            assert not rest.any()
        assert np.array_equal(each.reshape(wanted.shape), wanted)
    assert fused["wi_lora_a"].shape[-1] == 2 * R


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("scan", [None, 0, 1])
def test_it_comes_back(kind, scan):
    params = tree(kind, scan)
    for layout in [("concat",), ("per-shard", 2, 3), ("lane", 2, 128)]:
        fused = convert.prefuse_params(params, **asked(layout))
        same(convert.split_params(fused, convert.layout_of(params, **asked(layout))), params)
        same(convert.prefuse_params(params, source_layout="maxtext", **asked(layout)), fused)
        other = convert.prefuse_params(params, layout="interleaved")
        same(convert.prefuse_params(fused, source_layout=":".join(map(str, layout)), layout="interleaved"), other)


def test_torch_comes_back():
    torch = pytest.importorskip("torch")
    params = tree(make=torch.from_numpy)
    same(convert.split_params(convert.prefuse_params(params), "concat"), params)


def test_every_bit_stays():
    bits = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    pair = {"lora_a": bits.reshape(-1, 1), "lora_b": bits.reshape(1, E + 1, -1)}
    params = {f"wi_{g}_{name}": jnp.asarray(array) for g in "01" for name, array in pair.items()}
    fused = convert.prefuse_params(params)
    n, b = pair["lora_b"].shape[-1], np.asarray(fused["wi_lora_b"]).view("u2")
    assert np.array_equal(b[0, :, :n], b[1, :, n:])
    assert np.array_equal(b[:1, :, :n], pair["lora_b"].view("u2"))
    assert not b[0, :, n:].any()
    assert not b[1, :, :n].any()
    same(convert.split_params(fused, "concat"), params)


def test_alone_and_masked():
    """A tree of LoRA alone, as `nnx.LoRAParam` filters it out, and the state of an optimizer that trains nothing else."""
    params = tree(scan=1)
    alone = {"moe": {name: array for name, array in params["moe"].items() if "lora" in name}}
    fused = convert.prefuse_params(alone)
    same(fused["moe"], {name: array for name, array in convert.prefuse_params(params)["moe"].items() if "lora" in name})
    same(convert.split_params(fused, "concat"), alone)
    mask = jax.tree_util.tree_map_with_path(lambda path, _: "lora" in jax.tree_util.keystr(path), params)
    state = optax.masked(optax.adam(1e-3), mask).init(params)
    same(convert.split_params(convert.prefuse_params(state), "concat"), state)


def test_names_of_the_user():
    names = {"wi_0": "gate.kernel", "wi_1": "up.kernel", "wi": "both.kernel"}
    params = {"gate": {}, "up": {}}
    for name, array in tree()["moe"].items():
        word = {"wi_0": "gate", "wi_1": "up"}.get(name[:4])
        params.setdefault(word or "rest", {})[f"kernel{name[4:]}" if word else name] = array
    fused = convert.prefuse_params(params, names=names)
    assert set(fused["both"]) == {"kernel", "kernel_lora_a", "kernel_lora_b"}
    same(convert.split_params(fused, "concat", names=names), params)


def test_under_transformations():
    layout = ("per-shard", 2, 3)
    params = tree(make=jnp.asarray)
    wanted = convert.prefuse_params(params, **asked(layout))
    fuse = lambda given: convert.prefuse_params(given, **asked(layout))  # noqa: E731
    same(jax.jit(fuse)(params), wanted)
    shapes = jax.eval_shape(fuse, params)
    assert jax.tree.map(jnp.shape, wanted) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    cotangent = jax.tree.map(lambda leaf: jnp.asarray(np.random.default_rng(2).integers(1, 9, leaf.shape), "f4"), wanted)
    (back,) = jax.vjp(fuse, params)[1](cotangent)
    # The derivative of a move is the inverse move: that of the cotangent without what is zero in B.
    mask = convert.prefuse_params(jax.tree.map(jnp.ones_like, params), **asked(layout))
    kept = jax.tree.map(lambda one, m: one * m, cotangent, mask)
    same(back, convert.split_params(kept, convert.layout_of(params, **asked(layout))))


def changed(params, name, array):
    return {**params, "moe": {**params["moe"], name: array}}


def without(params, *names):
    return {**params, "moe": {name: array for name, array in params["moe"].items() if name not in names}}


WHOLE, SCANNED = tree(), tree(scan=1)
REFUSED = {
    "no B": (without(WHOLE, "wi_0_lora_b"), PlanError, "has no partner params.moe.wi_0_lora_b"),
    "gate alone": (without(WHOLE, "wi_1_lora_a", "wi_1_lora_b"), PlanError, "one whose B is zeros"),
    "other ranks": (
        changed(changed(WHOLE, "wi_1_lora_a", np.ones((K, 3), "f4")), "wi_1_lora_b", np.ones((3, E, N), "f4")),
        InputError,
        "must be alike",
    ),
    "other types": (changed(WHOLE, "wi_1_lora_b", WHOLE["moe"]["wi_1_lora_b"].astype("f8")), PlanError, "must be alike"),
    "A as PEFT has it": (
        changed(changed(WHOLE, "wi_0_lora_a", np.ones((R, K), "f4")), "wi_1_lora_a", np.ones((R, K), "f4")),
        InputError,
        "is no A for",
    ),
    "of another model": (
        {**WHOLE, "moe": WHOLE["moe"] | {f"wi_{g}_lora_b": np.ones((R, E + 1, N), "f4") for g in "01"}},
        InputError,
        "is no B of rank 2",
    ),
    "of no experts": (
        {**WHOLE, "moe": WHOLE["moe"] | {f"wi_{g}_lora_b": np.ones((R, N), "f4") for g in "01"}},
        InputError,
        "no A and B of experts",
    ),
    "of rank 0": (
        {**WHOLE, "moe": WHOLE["moe"] | {f"wi_{g}_lora_a": np.ones((K, 0), "f4") for g in "01"}},
        InputError,
        "no A and B of experts",
    ),
    "both forms": (changed(WHOLE, "wi_lora_a", np.ones((K, R), "f4")), PlanError, "has no partner"),
}  # fmt: skip


@pytest.mark.parametrize("given", REFUSED)
def test_refused(given):
    params, error, text = REFUSED[given]
    with pytest.raises(error, match=text):
        convert.prefuse_params(params)


def test_no_place_for_it():
    with pytest.raises(PlanError, match="has no place for it; take a layout"):
        convert.prefuse_params(WHOLE, layout="vllm")


@pytest.mark.parametrize("layout", ["concat", "interleaved"])
def test_what_is_not_block_diagonal_is_not_split(layout):
    """Each element of the two other blocks, one after the other."""
    params = tree()
    fused = convert.prefuse_params(params, layout=layout)
    ones = convert.prefuse_params(jax.tree.map(np.ones_like, params), layout=layout)["moe"]["wi_lora_b"]
    for at in np.argwhere(ones == 0)[:: E + 1]:
        b = fused["moe"]["wi_lora_b"].copy()
        b[tuple(at)] = 1e-30
        with pytest.raises(InputError, match="wi_lora_b should hold zeros where the ranks of gate meet the columns of up"):
            convert.split_params(changed(fused, "wi_lora_b", b), layout)
    with pytest.raises(PlanError, match="is traced"):
        jax.jit(lambda given: convert.split_params(given, layout))(fused)
    odd = changed(changed(fused, "wi_lora_b", np.zeros((3, E, 2 * N), "f4")), "wi_lora_a", np.zeros((K, 3), "f4"))
    with pytest.raises(InputError, match="which is odd"):
        convert.split_params(odd, layout)


def test_as_many_ranks_as_layers():
    """A tells where the layers are, unless it is as wide as they are many: all parameters have one scan axis."""
    rng = np.random.default_rng(1)
    a = [rng.standard_normal((K, L, L), "f4") for _ in "01"]
    b = [rng.standard_normal((L, L, E, N), "f4") for _ in "01"]  # rank, layers
    lora = {f"wi_{g}_lora_{side}": each[g] for side, each in (("a", a), ("b", b)) for g in (0, 1)}
    moe = {name: array for name, array in SCANNED["moe"].items() if "lora" not in name} | lora
    fused = convert.prefuse_params({**SCANNED, "moe": moe}, layout="concat")["moe"]
    np.testing.assert_array_equal(fused["wi_lora_a"], np.concatenate(a, 2))
    zeros = np.zeros_like(b[0])
    np.testing.assert_array_equal(
        fused["wi_lora_b"], np.concatenate([np.concatenate([b[0], zeros], 3), np.concatenate([zeros, b[1]], 3)], 0)
    )
    with pytest.raises(PlanError, match="nothing tells its rank 5 from its layers"):
        trees.axes(("a", "b"), (5, 5, 5), (5, 5, 2, 6), {"e": 2, "k": 5, "n": 6}, (5,))


@pytest.mark.parametrize("record", [{"stored": []}, {"stored": {"wi.": []}}, {"stored": {"wi.": {"unpadded": {"n": "x"}}}}])
def test_a_damaged_record_is_the_inputs_fault(record):
    """With LoRA beside the experts, and without."""
    for given in (WHOLE, {"moe": {name: array for name, array in WHOLE["moe"].items() if "lora" not in name}}):
        with pytest.raises((InputError, PlanError)):
            convert.split_params(given, record)
