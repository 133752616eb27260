"""Under every transformation of JAX the calls are what `jnp.concatenate` and slices are, and the bits are moved exactly."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import convert

E, K, N = 2, 3, 4
QUICK = ["bfloat16", "float8_e4m3fn"]
DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]


def fuse(gate, up):
    return convert.prefuse_params({"wi_0": gate, "wi_1": up})["wi"]


def split(wi):
    params = convert.split_params({"wi": wi}, "concat")
    return params["wi_0"], params["wi_1"]


def concatenate(gate, up):
    return jnp.concatenate((gate, up), -1)


def halves(wi):
    return wi[..., : wi.shape[-1] // 2], wi[..., wi.shape[-1] // 2 :]


def numbers(*shape, dtype="float32", seed=0):
    """Halves between -2 and 2, which every type has."""
    return (jnp.asarray(np.random.default_rng(seed).integers(-4, 5, shape)) / 2).astype(dtype)


def pair(dtype="float32", *lead):
    return tuple(numbers(*lead, E, K, N, dtype=dtype, seed=seed) for seed in (1, 2))


def cubed(fused, weight):
    return (weight * fused.astype("float32") ** 3).sum()


def ours(gate, up):
    """Both calls, so that each transformation is compiled once."""
    return fuse(*split(fuse(gate, up))[::-1])


def theirs(gate, up):
    return concatenate(up, gate)


WAYS = {
    "grad": lambda f, args, w: jax.grad(lambda a: cubed(f(*a), w))(args),
    "grad of jit": lambda f, args, w: jax.grad(lambda a: cubed(jax.jit(f)(*a), w))(args),
    "vjp": lambda f, args, w: jax.vjp(f, *args)[1](w.astype(args[0].dtype)),
    "jvp": lambda f, args, w: jax.jvp(f, args, args[::-1]),
    "second derivatives": lambda f, args, w: jax.jvp(jax.grad(lambda a: cubed(f(*a), w)), (args,), (args[::-1],)),
    "remat": lambda f, args, w: jax.grad(lambda a: cubed(jax.checkpoint(f)(*a), w))(args),
    "vmap": lambda f, args, w: jax.vmap(f)(*(jnp.stack((a, -a)) for a in args)),
    "grad of vmap": lambda f, args, w: jax.grad(
        lambda a: cubed(jax.vmap(f, (1, 1), 1)(*(jnp.stack((x, x * 2), 1) for x in a)), w[:, None])
    )(args),
    "scan": lambda f, args, w: jax.grad(
        lambda a: jax.lax.scan(lambda c, x: (c + cubed(f(*x), w), None), 0.0, tuple(jnp.stack((x, x * 2, x)) for x in a))[0]
    )(args),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_values_and_derivatives_are_those_of_concatenate(way):
    args, weight = pair(), numbers(E, K, 2 * N, seed=3)
    mine, wanted = (jax.tree.leaves(WAYS[way](f, args, weight)) for f in (ours, theirs))
    assert any(np.any(leaf) for leaf in wanted)
    for a, b in zip(mine, wanted, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [pytest.param(d, marks=() if d in QUICK else pytest.mark.slow) for d in DTYPES])
@pytest.mark.parametrize("way", ["vjp", "jvp"])
def test_derivatives_in_every_float_type(dtype, way):
    args, weight = pair(dtype), numbers(E, K, 2 * N, seed=3)
    mine, wanted = (jax.tree.leaves(WAYS[way](f, args, weight)) for f in (ours, theirs))
    for a, b in zip(mine, wanted, strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("dtype", [*QUICK, "float32", "int32", "bool", "int4", "float4_e2m1fn"])
def test_all_bits_pass_and_only_the_floats_have_a_derivative(dtype):
    width = {"bool": 1, "int4": 4, "float4_e2m1fn": 4}.get(dtype, 8 * jnp.dtype(dtype).itemsize)
    store = np.dtype(f"u{max(1, width // 8)}")
    words = np.random.default_rng(0).integers(0, 1 << width, (2, E, K, N), dtype=store)
    gate, up = (jnp.asarray(word.view(jnp.dtype(dtype)) if width >= 8 else word.astype(jnp.dtype(dtype))) for word in words)
    for run in (fuse, jax.jit(fuse)):
        fused = run(gate, up)
        assert np.asarray(fused).tobytes() == np.concatenate([np.asarray(x) for x in (gate, up)], -1).tobytes()
        again = split(fused)
        assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(again, (gate, up), strict=True))
    if not jnp.issubdtype(dtype, jnp.floating):
        tangents = tuple(np.zeros(gate.shape, jax.dtypes.float0) for _ in "ab")
        assert jax.jvp(fuse, (gate, up), tangents)[1].dtype == jax.dtypes.float0


def test_abstract_values_and_a_mesh():
    spec = jax.ShapeDtypeStruct((E, K, N), "bfloat16")
    assert jax.eval_shape(fuse, spec, spec).shape == (E, K, 2 * N)
    mesh = Mesh(np.array(jax.devices()[:1]), ("expert",))
    args, weight = pair(), numbers(E, K, 2 * N)
    shard = partial(jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    found = jax.grad(lambda a: cubed(shard(fuse)(*a), weight))(args)
    wanted = jax.grad(lambda a: cubed(concatenate(*a), weight))(args)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("fused", [True, False], ids=["fuse in the loss", "split in the loss"])
def test_a_training_loop_through_the_call_is_the_one_without_it(fused):
    """The issue's loop: twenty steps of Adam moved `wo` and nothing else."""
    gate, up = pair()
    start = {"wi_0": gate, "wi_1": up} if fused else {"wi": concatenate(gate, up)}
    start["wo"] = numbers(E, N, K, seed=4)
    x, wanted = numbers(5, K, seed=5), numbers(E, 5, K, seed=6)

    def train(view):
        def loss(params):
            found = view(params)
            wi = found["wi"] if fused else concatenate(found["wi_0"], found["wi_1"])
            g, u = halves(jnp.einsum("tk,ekn->etn", x, wi))
            return ((jnp.einsum("etn,enk->etk", jax.nn.silu(g) * u, params["wo"]) - wanted) ** 2).mean()

        optimizer = optax.adam(1e-2)

        @jax.jit
        def step(params, state):
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return optax.apply_updates(params, updates), state

        params, state = start, optimizer.init(start)
        for _ in range(20):
            params, state = step(params, state)
        return params

    if fused:
        trained, plain = train(convert.prefuse_params), train(lambda p: {"wi": concatenate(p["wi_0"], p["wi_1"])})
    else:
        trained, plain = (
            train(partial(convert.split_params, layout="concat")),
            train(lambda p: dict(zip(("wi_0", "wi_1"), halves(p["wi"]), strict=True))),
        )
    for name, array in trained.items():
        assert np.abs(array - start[name]).max() > 0.01, name
        np.testing.assert_allclose(array, plain[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("layout", "options"),
    [("per-shard", {"shards": 2, "align": 3}), ("flashinfer", {}), ("fused-moe", {}), ("interleaved", {})],
)
def test_what_goes_forth_comes_back_as_the_derivative(layout, options):
    """A relay is a permutation with padding: its transpose is the relay back, and padding has no part in it."""
    args = dict(zip(("wi_0", "wi_1"), pair(), strict=True))
    relay = partial(convert.prefuse_params, layout=layout, **options)
    (name,) = jax.eval_shape(relay, args)
    weight = relay(dict(zip(args, pair()[::-1], strict=True)))[name]
    found = jax.jit(jax.grad(lambda p: (relay(p)[name] * (weight + (weight == 0))).sum()))(args)
    back = convert.split_params({name: weight}, convert.layout_of(args, layout=layout, **options))
    for key in args:
        np.testing.assert_array_equal(found[key], jnp.where(back[key] == 0, 1, back[key]))


SMALLEST = """
import sys
from functools import partial
import jax, jax.numpy as jnp, ml_dtypes, numpy as np
import convert

asked = {"layout": sys.argv[1], **({"shards": 2, "align": 4096} if sys.argv[1] == "per-shard" else {})}
gate, up = np.arange(1 << 16, dtype="u2").reshape(2, 2, 4, 4096).view("bfloat16")
wanted = convert.prefuse_params({"m": {"wi_0": gate, "wi_1": up}}, **asked)["m"]["wi"]
held = {"m": {"wi_0": jnp.asarray(gate), "wi_1": jnp.asarray(up)}}
for call in (partial(convert.prefuse_params, **asked), jax.jit(partial(convert.prefuse_params, **asked))):
    assert np.asarray(call(held)["m"]["wi"]).tobytes() == np.ascontiguousarray(wanted).tobytes()
"""


@pytest.mark.parametrize("layout", ["concat", "per-shard"])
def test_the_smallest_numbers_and_nans_of_two_bytes_pass_as_they_are(forks, layout, monkeypatch):
    """A CPU picks between floats of 16 bits as floats of 32, and makes zeros of the smallest: as XLA compiles for users."""
    monkeypatch.setenv("XLA_FLAGS", "")
    done = forks.run(SMALLEST, layout)
    assert done.returncode == 0, done.stderr
