"""On eight devices: what is sharded stays so, per-shard needs no collective, and equal layers are compiled once."""

import subprocess
import sys

import pytest

HEAD = """
import os, re, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, numpy as np, convert
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

GATE, UP = (np.arange(8 * 4 * 16, dtype=np.float32).reshape(8, 4, 16) * sign for sign in (1, -1))
SPECS = {
    P("expert"): {"per-shard", "concat", "fused-moe"},
    P("expert", None, "model"): {"per-shard"},
    P(None, "expert", "model"): {"per-shard"},
    P(None, None, ("expert", "model")): {"per-shard"},
}  # spec -> the layouts that need no collective
LAYOUTS = {"per-shard": {"shards": 8, "align": 4}, "concat": {}, "fused-moe": {}}

def put(mesh, spec):
    return {k: jax.device_put(v, NamedSharding(mesh, spec)) for k, v in (("wi_0", GATE), ("wi_1", UP))}

def plain(spec):
    entries = [*spec]
    while entries and entries[-1] is None:
        entries.pop()
    return tuple(entries)
"""
STAYS = """
def check(kind, specs, layouts):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("expert", "model"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        for spec in specs:
            for layout in layouts:
                stays(put(mesh, spec), spec, layout, LAYOUTS[layout])

def stays(params, spec, layout, options):
    fuse = lambda p: convert.prefuse_params(p, layout=layout, **options)
    fused, wanted = fuse(params), fuse({"wi_0": GATE, "wi_1": UP})
    (name, wi), = fused.items()
    assert np.array_equal(wi, wanted[name]), (spec, layout)
    if layout != "fused-moe":
        assert plain(wi.sharding.spec) == plain(spec), (spec, wi.sharding)
    back = convert.split_params(fused, convert.layout_of(params, layout=layout, **options))
    assert np.array_equal(back["wi_1"], UP) and plain(back["wi_1"].sharding.spec) == plain(spec)
    gradient = jax.grad(lambda p: (fuse(p)[name] ** 2).sum())(params)
    assert np.array_equal(gradient["wi_1"], 2 * UP)
    if layout in SPECS[spec]:
        text = jax.jit(fuse).lower(params).compile().as_text()
        assert not re.search("all-gather|all-reduce|all-to-all|collective|reduce-scatter", text), (spec, layout)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), params)
    assert fuse(shapes)[name].shape == wi.shape
    assert plain(fuse(shapes)[name].sharding.spec) == plain(wi.sharding.spec)

for kind in (AxisType.Auto, AxisType.Explicit):
    check(kind, [P("expert", None, "model")] if len(sys.argv) < 2 else SPECS, ["per-shard"] if len(sys.argv) < 2 else LAYOUTS)
"""
ONCE = """
jax.config.update("jax_log_compiles", True)
import logging
seen = []
logging.getLogger("jax").addHandler(type("Seen", (logging.Handler,), {"emit": lambda self, r: seen.append(r.getMessage())})())
mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("expert", "model"))
layers = {str(i): put(mesh, P("expert", None, "model")) for i in range(48)}
for _ in range(2):
    convert.prefuse_params(layers, layout="per-shard", shards=4, align=4)
compiled = [line for line in seen if line.startswith("Compiling")]
assert len(compiled) == 1, compiled
"""


@pytest.mark.parametrize("arguments", [[], pytest.param(["all"], marks=pytest.mark.slow)], ids=["some", "all"])
def test_on_eight_devices(arguments):
    command = [sys.executable, "-c", HEAD + STAYS + ONCE + "\nprint('done')", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr[-3000:]
