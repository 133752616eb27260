"""Worked examples with transformers: what was loaded onto eight devices computes the same, and what is saved it loads again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import convert

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.clients import tiny_models  # noqa: E402

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("default")]
IDS = torch.arange(34).reshape(2, 17) * 7 % 160
BLOCK = "model.layers.{}.mlp"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3") / "hf"
    model = tiny_models.build("qwen3_moe").float().eval()
    model.save_pretrained(path, max_shard_size="200KB")
    return path, model


def moe(params, layer, x, top_k, normalised):
    """Qwen3's MoE block on fused experts; `wi` is (E, K, 2N)."""
    place = BLOCK.format(layer)
    weights, chosen = jax.lax.top_k(jax.nn.softmax(x @ params[f"{place}.gate.weight"].T), top_k)
    weights = weights / weights.sum(-1, keepdims=True) if normalised else weights
    gate, up = jnp.split(jnp.einsum("tk,ekn->etn", x, params[f"{place}.experts.wi"]), 2, axis=-1)
    out = jnp.einsum("etn,enk->etk", jax.nn.silu(gate) * up, params[f"{place}.experts.wo"])
    return jnp.einsum("etk,te->tk", out, (jax.nn.one_hot(chosen, out.shape[0]) * weights[..., None]).sum(1))


def test_on_eight_devices_it_computes_what_transformers_computes(saved):
    path, model = saved
    mesh = Mesh(np.array(jax.devices()[:4]), ("expert",))

    def cut(name, shape):
        return NamedSharding(mesh, P("expert") if name.endswith((".wi", ".wo")) else P())

    params = convert.load(path, layout="concat", sharding=cut)
    config, checked = model.config, 0
    for layer, block in enumerate(model.model.layers):
        if f"{BLOCK.format(layer)}.experts.wi" not in params:
            continue
        x = np.random.default_rng(layer).standard_normal((24, config.hidden_size)).astype("f4")
        with torch.no_grad():
            wanted = block.mlp(torch.from_numpy(x)[None])
        wanted = (wanted[0] if isinstance(wanted, tuple) else wanted).numpy().reshape(x.shape)
        found = moe(params, layer, jnp.asarray(x), config.num_experts_per_tok, config.norm_topk_prob)
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5 * np.abs(wanted).max())
        checked += 1
    assert checked


def test_transformers_loads_what_was_trained_and_saved(saved, tmp_path):
    path, model = saved
    params = convert.load(path, layout="per-shard", shards=2, dtype=None)
    same, other = tmp_path / "same", tmp_path / "other"
    convert.save(params, same, like=path, layout="per-shard", shards=2)
    trained = {name: array * 2 if name.endswith(".wo") else array for name, array in params.items()}
    convert.save(trained, other, like=path, layout="per-shard", shards=2)
    with torch.no_grad():
        wanted = model(IDS).logits
        for each in model.model.layers:
            if hasattr(each.mlp, "experts"):
                each.mlp.experts.down_proj.mul_(2)
        doubled = model(IDS).logits
        for folder, logits in ((same, wanted), (other, doubled)):
            again, info = type(model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
            assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            assert torch.equal(again.eval()(IDS).logits, logits)
    assert not torch.equal(wanted, doubled)
