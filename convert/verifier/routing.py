"""Which experts a token goes to, and how gate and up are combined: what `config.json` says of a MoE layer.

Sources: transformers 5.23, the routers and `act_fn`s of `modeling_*.py`; DeepSeek-V3 (arXiv 2412.19437), section 2.1.2, for
groups and the correction that chooses without weighing.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

Scores = Literal["softmax", "sigmoid", "softmax of the chosen"]

SIGMOID = """
    afmoe axk1 axk2 bailing_hybrid bailing_moe_v2 beam deepseek_v3 deepseek_v32 dots1 dots3_note exaone_moe flint glm4_moe
    glm4_moe_lite glm4v_moe glm4v_moe_text glm5_next glm5_next_text glm_moe_dsa hy_v3 hy_v4 kimi_k2 kimi_linear laguna lfm2_moe
    mimo_v2_flash minimax_m2 minimax_m3_vl solar_open step3p7
"""
"""Values of `model_type` whose routers take sigmoids; where `scoring_func` says so, it needs no entry."""
CHOSEN = """
    aria aria_text gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared jetmoe openai_privacy_filter
"""
"""Those that take the softmax over the logits of the chosen experts only."""
SHIFTED: Mapping[str, float] = {"gpt_oss": 1.702, "openai_privacy_filter": 1.702, "minimax_m3_vl": 1.702}
"""Those that multiply with up + 1, and the slope of their sigmoid unless `swiglu_alpha` gives it."""
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
USUAL = 8
"""Experts per token where nothing says how many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """How gate and up (M, N) become one: `act(gate) * up`, after clamping both to `limit`; with an `alpha`, gpt-oss's form."""

    kind: str = "silu"
    limit: float | None = None
    alpha: float | None = None

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """The hidden values (M, N)."""
        if self.limit:
            gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        if self.alpha:
            return gate * jax.nn.sigmoid(self.alpha * gate) * (up + 1)
        hidden: jax.Array = _ACTIVATIONS[self.kind](gate) * up
        return hidden

    def __str__(self) -> str:
        kind = f"x sigmoid({self.alpha} x) (up + 1)" if self.alpha else self.kind
        return f"{kind}, clamped to {self.limit}" if self.limit else kind


SILU = Activation()
_ACTIVATIONS: Mapping[str, Any] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """What a router does: `top_k` experts of the `of_groups` best groups, by scores, weighed by them times `scale`.

    A group's score is the sum of its `best` ones.
    """

    scores: Scores
    top_k: int
    renormalise: bool
    scale: float = 1.0
    groups: int = 1
    of_groups: int = 1
    best: int = 1

    def __str__(self) -> str:
        text = f"{self.scores}, top {self.top_k}"
        text += f" in {self.of_groups} of {self.groups} groups" if self.groups > 1 else ""
        return text + (", renormalised" if self.renormalise else "") + (f", x {self.scale:g}" if self.scale != 1 else "")


def _words(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config says of its language model, wherever it says it."""
    inner = [config[key] for key in ("text_config", "thinker_config", "ffn_config") if isinstance(config.get(key), dict)]
    inner += [part["text_config"] for part in inner if isinstance(part.get("text_config"), dict)]
    return ChainMap(*reversed(inner), dict(config))


def routing_of(config: Mapping[str, Any], experts: int) -> Routing:
    """The router of a model with this `config.json`, or the usual one where it says nothing."""
    words = _words(config)
    names = {config.get("model_type"), words.get("model_type")}
    top = next((words[name] for name in TOP_K if words.get(name)), USUAL)
    scores: Scores = "softmax of the chosen" if names & set(CHOSEN.split()) else "softmax"
    if words.get("scoring_func", "softmax") == "sigmoid" or names & set(SIGMOID.split()):
        scores = "sigmoid"
    groups = _number(words.get("n_group") or 1)
    return Routing(
        scores=scores,
        top_k=min(experts, _number(top)),
        renormalise=scores != "softmax of the chosen" and bool(words.get("norm_topk_prob", True)),
        scale=float(words.get("routed_scaling_factor") or 1.0),
        groups=groups if groups > 1 and experts % groups == 0 and words.get("topk_method") != "greedy" else 1,
        of_groups=_number(words.get("topk_group") or 1),
        best=1 if words.get("topk_method") == "group_limited_greedy" else 2,
    )


def activation_of(config: Mapping[str, Any]) -> Activation:
    """How a model with this `config.json` combines gate and up; `silu(gate) * up` where it says nothing that we know."""
    words = _words(config)
    names = {config.get("model_type"), words.get("model_type")}
    kind = str(words.get("hidden_act") or words.get("hidden_activation"))
    limit = words.get("swiglu_limit")
    alpha = next((SHIFTED[str(name)] for name in names if name in SHIFTED), None)
    return Activation(
        kind=kind if kind in _ACTIVATIONS else "silu",
        limit=float(limit) if isinstance(limit, int | float) and limit > 0 else 7.0 if alpha else None,
        alpha=float(words.get("swiglu_alpha") or alpha) if alpha else None,
    )


def _number(value: Any) -> int:
    return int(value[0] if isinstance(value, Sequence) else value)


def route(logits: jax.Array, routing: Routing, correction: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The experts (T, top_k) of each token and their weights, from the router's logits (T, E).

    A `correction` (E,) is added to the scores that choose, not to those that weigh.
    """
    if routing.scores == "softmax of the chosen":
        values, chosen = jax.lax.top_k(logits, routing.top_k)
        return chosen, jax.nn.softmax(values, axis=-1) * routing.scale
    scores = jax.nn.sigmoid(logits) if routing.scores == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    choosing = scores if correction is None else scores + correction
    if routing.groups > 1:
        choosing = _in_best_groups(choosing, routing)
    _, chosen = jax.lax.top_k(choosing, routing.top_k)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if routing.renormalise:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return chosen, weights * routing.scale


def _in_best_groups(scores: jax.Array, routing: Routing) -> jax.Array:
    """The scores (T, E), with minus infinity outside the best groups of each token."""
    tokens, experts = scores.shape
    each = scores.reshape(tokens, routing.groups, experts // routing.groups)
    of_group = jax.lax.top_k(each, min(routing.best, each.shape[-1]))[0].sum(axis=-1)
    _, best = jax.lax.top_k(of_group, routing.of_groups)
    allowed = (jnp.arange(routing.groups)[None, :, None] == best[:, None, :]).any(axis=-1)
    return jnp.where(allowed[:, :, None], each, -jnp.inf).reshape(tokens, experts)
