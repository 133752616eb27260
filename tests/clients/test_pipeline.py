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

from tests import guide  # noqa: E402
from tests.clients import tiny_models  # noqa: E402
from tests.clients.qwen3 import forward  # noqa: E402

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("default")]
PAGE = "convert/pipeline/README.md"
IDS = torch.arange(34).reshape(2, 17) * 7 % 160


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3") / "hf"
    model = tiny_models.build("qwen3_moe").float().eval()
    model.save_pretrained(path, max_shard_size="200KB")
    return path, model


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("choices", "along"), [({"layout": "concat"}, 0), ({"layout": "per-shard", "shards": 8}, 2)])
def test_on_eight_devices_it_computes_the_logits_of_transformers(tmp_path, choices, along, normalised):
    """Along experts each device has whole ones; along N each has its shard of every gate and up, padded."""
    config = tiny_models.config("qwen3_moe")
    config.num_experts, config.norm_topk_prob = 16, normalised
    model = tiny_models.built(config).float()
    model.save_pretrained(tmp_path / "hf", max_shard_size="200KB")
    mesh = Mesh(np.array(jax.devices()), ("x",))

    def cut(name, shape):
        at = {"wi": along, "wo": min(along, 1)}.get(name.rpartition(".")[2], 0)
        return NamedSharding(mesh, P(*[None] * at, "x") if shape[at] % 8 == 0 else P())

    params = convert.load(tmp_path / "hf", sharding=cut, **choices)
    wi = params["model.layers.0.mlp.experts.wi"]
    assert len(wi.sharding.device_set) == 8
    assert {shard.data.size for shard in wi.addressable_shards} == {wi.size // 8}
    with torch.no_grad():
        wanted = model(IDS).logits.numpy()
    found = forward(params, jnp.asarray(IDS.numpy()), config)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    assert len({*wanted.argmax(-1).flat}) > 1


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


def test_the_guide_loads_tunes_and_saves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_models.build("qwen3_moe").float()
    model.save_pretrained("Qwen3-30B-A3B")
    names = {"convert": convert, "jax": jax, "np": np, "P": P, "forward": forward, "config": model.config}
    names["ids"] = ids = jnp.asarray(IDS.numpy())
    found = guide.run(PAGE, "### From Hugging Face to eight devices", names)
    np.testing.assert_allclose(found["logits"], model(IDS).logits.detach().numpy(), rtol=1e-4, atol=1e-4)
    names |= {"params": found["params"], "loss": lambda params: jnp.sum(params["model.layers.0.mlp.experts.wo"] ** 2)}
    names["AutoModelForCausalLM"] = transformers.AutoModelForCausalLM
    found = guide.run(PAGE, "### Tuned, saved, and loaded by transformers", names)
    logits = found["model"](IDS).logits.detach().numpy()
    np.testing.assert_allclose(forward(found["tuned"], ids, model.config), logits, rtol=1e-4, atol=1e-4)
    assert np.abs(logits - model(IDS).logits.detach().numpy()).max() > 1e-2
