"""Weight sync: what one jitted function makes for a server is what MaxText 0.2.5 makes of the same arrays for vLLM.

Needs what `test_maxtext` needs.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
import scripts.make_checkpoint as made

pytest.importorskip("maxtext")
from maxtext.integration.vllm.weight_converter import MoEExpertDown, MoEFuseGateUp, MoEFuseGateUpPrefused

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]
SERVER = "vllm_model.model.layers.{}.mlp.experts.{}_weight"
WORDS = {"wi": "w13_weight", "wo": "w2_weight"}


def served(name):
    """A name of the server, as MaxText's rules for Qwen3-MoE have it."""
    place, _, word = f"vllm_{name}".rpartition(".")
    return f"{place.replace('vllm_model', 'vllm_model.model', 1)}.{WORDS.get(word, word)}"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Plain values: of any bits MaxText's own program makes zeros of the smallest bfloat16 on a CPU, and ours does not."""
    path = tmp_path_factory.mktemp("a") / "hf"
    return made.make_checkpoint(path, family="qwen3_moe", layers=3, experts=4, mlp=384, values="normal")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("prefused", [False, True], ids=["separate", "prefused"])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_the_server_gets_what_maxtext_makes(source, shards, prefused, dtype):
    trainer = convert.load(source, names="maxtext", layout="concat" if prefused else None, dtype=dtype)
    moe = trainer["params"]["params"]["decoder"]["layers"]["moe_block"]
    gates = [moe["wi"]] if prefused else [moe["wi_0"], moe["wi_1"]]
    fused = (MoEFuseGateUpPrefused if prefused else MoEFuseGateUp)()(gates, tp=shards)
    wanted = {SERVER.format(layer, "w13"): array for layer, array in enumerate(fused)}
    wanted |= {SERVER.format(layer, "w2"): array for layer, array in enumerate(MoEExpertDown()([moe["wo"]]))}
    assert fused[0].shape[-1] == 2 * shards * -(-384 // shards // 128) * 128

    names = ("hf", served)
    asked = {"layout": "per-shard", "shards": shards, "names": names}
    server = convert.load(source, dtype=dtype, lazy=True, **asked)
    specs = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in server.items()}
    config = json.loads((source / "config.json").read_text())
    sync = convert.sync_plan(trainer, specs, config=config, source_layout="concat" if prefused else None, **asked)
    found = sync.jitted()(trainer)
    assert wanted.keys() <= found.keys()
    for name, array in wanted.items():
        assert array.dtype == found[name].dtype == jnp.dtype(dtype)
        assert np.asarray(found[name]).tobytes() == np.asarray(array).tobytes(), name
