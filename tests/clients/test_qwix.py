"""Real qwix puts LoRA on a MoE block with MaxText's einsums; what it computes is the same with gate and up fused.

pip install -e '.[maxtext]' && pytest -m clients tests/clients/test_qwix.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from tests.tiny import restore, save

qwix = pytest.importorskip("qwix", reason="qwix comes with the extra maxtext")
nnx = pytest.importorskip("flax.nnx")
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

E, K, N, R, B, S = 3, 4, 8, 2, 2, 5
EINSUMS = {"BSM,EMH->BSEH": (B, S, K), "EBCM,EMH->EBCH": (E, B, S, K)}


class Block(nnx.Module):
    """Gate and up of MaxText's dense products, apart or as one."""

    def __init__(self, words):
        for word in words:
            setattr(self, word, nnx.Param(jnp.zeros((E, K, N if word != "wi" else 2 * N))))
        self.words = words

    def __call__(self, x, einsum):
        return jnp.concatenate([jnp.einsum(einsum, x, getattr(self, word)[...]) for word in self.words], axis=-1)


def adapted(words, einsum, x, rank, alpha):
    """The block with LoRA, and its state as a tree of arrays."""
    model = qwix.apply_lora_to_model(
        Block(words), qwix.LoraProvider(module_path=".*", rank=rank, alpha=alpha), x, einsum, rngs=nnx.Rngs(0)
    )
    return model, nnx.to_pure_dict(nnx.state(model, nnx.Param))


def on_disk(params, path):
    """The same as files: saved by Orbax, fused, restored by Orbax; and split, compared with what it was."""
    convert.prefuse(save(path / "in", {"params": {"moe": jax.tree.map(np.asarray, params)}}), path / "out")
    convert.split(path / "out", path / "back")
    assert convert.verify(path / "in", path / "out", gemm=False).equal
    back = restore(path / "back")["params"]["moe"]
    assert all(np.array_equal(back[name], params[name]) for name in params)
    return jax.tree.map(jnp.asarray, restore(path / "out")["params"]["moe"])


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("einsum", EINSUMS)
def test_a_tree_on_the_disk_computes_the_same(einsum, alone, tmp_path):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.integers(-3, 4, EINSUMS[einsum]), "f4")
    model, params = adapted(("wi_0", "wi_1"), einsum, x, R, 2 * R)
    params = {name: jnp.asarray(rng.integers(-3, 4, leaf.shape), "f4") for name, leaf in params.items()}
    nnx.update(model, params)
    fused, _ = adapted(("wi",), einsum, x, 2 * R, 4 * R)
    kept = {name: leaf for name, leaf in params.items() if "lora" in name or not alone}
    made = on_disk(kept if alone else kept | {"wo": jnp.ones((E, N, K))}, tmp_path)
    made |= {"wi": jnp.concatenate((params["wi_0"], params["wi_1"]), -1)} if alone else {}
    nnx.update(fused, {name: leaf for name, leaf in made.items() if name != "wo"})
    assert np.array_equal(model(x, einsum), fused(x, einsum))


@pytest.mark.parametrize("einsum", EINSUMS)
def test_it_is_what_qwix_has_for_the_fused_weight(einsum):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-3, 4, EINSUMS[einsum]), "f4")
    model, params = adapted(("wi_0", "wi_1"), einsum, x, R, 2 * R)
    assert {"wi_0_lora_a", "wi_1_lora_b"} <= params.keys()
    params = {name: jnp.asarray(rng.integers(-3, 4, leaf.shape), "f4") for name, leaf in params.items()}
    nnx.update(model, params)
    fused, wanted = adapted(("wi",), einsum, x, 2 * R, 4 * R)
    made = convert.prefuse_params(params)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, wanted)
    nnx.update(fused, made)
    assert np.array_equal(model(x, einsum), fused(x, einsum))
    again = convert.split_params(made, "concat")
    assert all(np.array_equal(again[name], params[name]) for name in params)
