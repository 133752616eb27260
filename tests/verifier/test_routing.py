"""Routers and activations against plain NumPy, written from their definitions, one token after the other."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from jax import numpy as jnp

from convert.verifier.gemms.probes import Setting
from convert.verifier.gemms.routing import Activation, Routing, activation_of, route, routing_of
from convert.verifier.gemms.whole import Routed, add_experts, pieces

T, E = 7, 12
RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((T, E)).astype(np.float32)
CORRECTION = RNG.standard_normal(E).astype(np.float32)


FUNCTIONS = {
    "softmax": lambda x: np.exp(x) / np.exp(x).sum(),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "sqrtsoftplus": lambda x: np.sqrt(np.log(1 + np.exp(x))),
}


def by_hand(logits, routing, correction):
    """The experts and weights of one token."""
    if routing.scores.endswith("of the chosen"):
        chosen = sorted(range(E), key=lambda e: -(logits + correction)[e])[: routing.top_k]
        weights = FUNCTIONS[routing.scores.partition(" ")[0]](logits[chosen])
        total = weights.sum() if routing.renormalise else 1
        return dict(zip(chosen, weights / total * routing.scale, strict=True))
    scores = FUNCTIONS[routing.scores](logits)
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
        Routing(scores="sqrtsoftplus", top_k=3, renormalise=True, scale=1.5),
        Routing(scores="softmax of the chosen", top_k=4, renormalise=False),
        Routing(scores="sigmoid of the chosen", top_k=4, renormalise=False, scale=2.0),
        Routing(scores="sigmoid of the chosen", top_k=4, renormalise=True),
    ],
    ids=str,
)
def test_routers(routing, correction):
    chosen, weights = map(np.asarray, route(jnp.asarray(LOGITS), routing, correction))
    for token in range(T):
        wanted = by_hand(LOGITS[token], routing, np.zeros(E) if correction is None else correction)
        assert set(chosen[token]) == set(wanted)
        np.testing.assert_allclose(weights[token], [wanted[e] for e in chosen[token]], rtol=1e-5)


def test_capped_logits():
    plain = Routing(scores="sigmoid", top_k=3, renormalise=False)
    found = route(jnp.asarray(LOGITS), dataclasses.replace(plain, softcap=0.5))
    for token, (chosen, weights) in enumerate(zip(*map(np.asarray, found), strict=True)):
        wanted = by_hand(0.5 * np.tanh(LOGITS[token] / 0.5), plain, np.zeros(E))
        np.testing.assert_allclose(weights, [wanted[e] for e in chosen], rtol=1e-5)


@pytest.mark.parametrize("on_inputs", [False, True])
def test_weights_on_outputs_or_inputs(on_inputs):
    """One expert that squares what it is given shows which of the two a weight multiplies."""
    weights = SimpleNamespace(run=lambda x, sizes, backend, activation, rows, most: x**2)
    x = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    to = Routed(
        x=x, token=np.array([1, 0, 1]), weight=np.array([0.5, 3, 2]), sizes=np.array([3]), router="", on_inputs=on_inputs
    )
    out = np.zeros_like(x)
    add_experts(out, pieces(to, range(1), 2), weights, Setting(backend=None), (2, 2))
    square = 2 if on_inputs else 1
    np.testing.assert_allclose(out, [x[0] ** 2 * 3**square, x[1] ** 2 * (0.5**square + 2**square)])


def test_the_activation_of_inkling_2():
    gate, up = RNG.standard_normal((2, 5, 9)) * 6
    found = Activation(caps=(4.0, 25.0))(jnp.asarray(gate), jnp.asarray(up))
    wanted = 4 * np.tanh(gate / 4) / (1 + np.exp(-gate)) * 25 * np.tanh(up / 25)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


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
        (
            {"model_type": "llama4", "text_config": {"model_type": "llama4_text", "num_experts_per_tok": 1}},
            "sigmoid, top 1, on inputs",
            "silu",
        ),
        (
            {"model_type": "deepseek_v4", "scoring_func": "sqrtsoftplus", "norm_topk_prob": False, "num_experts_per_tok": 6},
            "sqrtsoftplus, top 6, renormalised",
            "silu",
        ),
        ({"model_type": "kolibri1", "norm_topk_prob": False}, "sigmoid of the chosen, top 8", "silu"),
        (
            {"model_type": "laguna", "moe_routed_scaling_factor": 2.5, "moe_router_logit_softcapping": 30.0},
            "sigmoid, top 8, renormalised, x 2.5, logits capped at 30",
            "silu",
        ),
        ({"model_type": "jamba"}, "softmax, top 8", "silu"),
        ({"model_type": "cohere2_moe", "expert_selection_fn": "sigmoid"}, "sigmoid, top 8, renormalised", "silu"),
        ({"ffn_config": {"moe_top_k": 4, "moe_normalize_expert_weights": None}}, "softmax, top 4", "silu"),
        (
            {"mlp_gate_softcap": 4.0, "mlp_up_softcap": 25.0, "scoring_func": "sigmoid", "route_scale": 8.0},
            "sigmoid, top 8, renormalised, x 8",
            "silu, gate capped at 4 and up at 25",
        ),
        (
            {"model_type": "gemma4_text", "top_k_experts": 2, "hidden_activation": "gelu_pytorch_tanh"},
            "a usual router (softmax, top 2, renormalised), as gemma4's own is not described",
            "gelu_pytorch_tanh",
        ),
        (
            {"model_type": "longcat_flash", "moe_topk": 2, "zero_expert_num": 4},
            "a usual router (softmax, top 2), as longcat_flash's own is not described",
            "silu",
        ),
        ({"num_experts_per_tok": 99}, f"softmax, top {E}, renormalised", "silu"),
    ],
)
def test_what_a_config_says(config, words, activation):
    assert str(routing_of(config, E)) == words
    assert str(activation_of(config)) == activation
