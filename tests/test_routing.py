"""Routers and activations against plain NumPy, written from their definitions, one token after the other."""

import numpy as np
import pytest
from jax import numpy as jnp

from convert.verifier.routing import Activation, Routing, activation_of, route, routing_of

T, E = 7, 12
RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((T, E)).astype(np.float32)
CORRECTION = RNG.standard_normal(E).astype(np.float32)


def by_hand(logits, routing, correction):
    """The experts and weights of one token."""
    if routing.scores == "softmax of the chosen":
        chosen = sorted(range(E), key=lambda e: -logits[e])[: routing.top_k]
        exps = np.exp(logits[chosen])
        return dict(zip(chosen, exps / exps.sum() * routing.scale, strict=True))
    scores = 1 / (1 + np.exp(-logits)) if routing.scores == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
    choosing = scores + correction
    per = E // routing.groups
    values = {g: sum(sorted(choosing[g * per : (g + 1) * per])[-routing.best :]) for g in range(routing.groups)}
    best = sorted(values, key=lambda g: -values[g])[: routing.of_groups]
    allowed = [e for e in range(E) if e // per in best]
    chosen = sorted(allowed, key=lambda e: -choosing[e])[: routing.top_k]
    total = scores[chosen].sum() if routing.renormalise else 1
    return {e: scores[e] / total * routing.scale for e in chosen}


@pytest.mark.parametrize("correction", [None, CORRECTION])
@pytest.mark.parametrize(
    "routing",
    [
        Routing(scores="softmax", top_k=2, renormalise=True),
        Routing(scores="softmax", top_k=5, renormalise=False, scale=2.5),
        Routing(scores="sigmoid", top_k=3, renormalise=True, scale=2.5),
        Routing(scores="sigmoid", top_k=3, renormalise=True, groups=4, of_groups=2, best=2),
        Routing(scores="softmax", top_k=4, renormalise=False, groups=3, of_groups=2, best=1),
    ],
    ids=str,
)
def test_routers(routing, correction):
    chosen, weights = map(np.asarray, route(jnp.asarray(LOGITS), routing, correction))
    for token in range(T):
        wanted = by_hand(LOGITS[token], routing, np.zeros(E) if correction is None else correction)
        assert set(chosen[token]) == set(wanted)
        np.testing.assert_allclose(weights[token], [wanted[e] for e in chosen[token]], rtol=1e-5)


def test_the_softmax_of_the_chosen():
    routing = Routing(scores="softmax of the chosen", top_k=4, renormalise=False)
    chosen, weights = map(np.asarray, route(jnp.asarray(LOGITS), routing))
    for token in range(T):
        wanted = by_hand(LOGITS[token], routing, None)
        np.testing.assert_allclose(weights[token], [wanted[e] for e in chosen[token]], rtol=1e-5)


def test_the_activation_of_gpt_oss():
    gate, up = RNG.standard_normal((2, 5, 9)) * 6
    found = Activation(limit=7.0, alpha=1.702)(jnp.asarray(gate), jnp.asarray(up))
    low, clipped = np.minimum(gate, 7), np.clip(up, -7, 7)
    np.testing.assert_allclose(found, (clipped + 1) * low / (1 + np.exp(-1.702 * low)), rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "words", "activation"),
    [
        ({}, "softmax, top 8, renormalised", "silu"),
        ({"model_type": "mixtral", "num_experts_per_tok": 2, "hidden_act": "silu"}, "softmax, top 2, renormalised", "silu"),
        ({"model_type": "qwen3_moe", "num_experts_per_tok": 4, "norm_topk_prob": False}, "softmax, top 4", "silu"),
        (
            {"model_type": "deepseek_v3", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "moe_topk": 6},
            "sigmoid, top 6 in 2 of 4 groups, renormalised, x 2.5",
            "silu",
        ),
        (
            {"model_type": "gpt_oss", "num_experts_per_tok": 4, "swiglu_limit": 7.0},
            "softmax of the chosen, top 4",
            "x sigmoid(1.702 x) (up + 1), clamped to 7.0",
        ),
        (
            {"model_type": "any", "text_config": {"num_experts_per_tok": 3, "hidden_act": "gelu"}},
            "softmax, top 3, renormalised",
            "gelu",
        ),
        ({"num_experts_per_tok": 99}, f"softmax, top {E}, renormalised", "silu"),
    ],
)
def test_what_a_config_says(config, words, activation):
    assert str(routing_of(config, E)) == words
    assert str(activation_of(config)) == activation
