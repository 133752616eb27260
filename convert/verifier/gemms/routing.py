"""Which experts a token goes to, and how gate and up are combined: what `config.json` says of a MoE layer.

In: `config.json`. Out: a router and an activation. It never reads weights.

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

Scores = Literal["softmax", "sigmoid", "sqrtsoftplus", "softmax of the chosen", "sigmoid of the chosen"]
"""Those of the chosen choose by the logits themselves, and take the function of the chosen logits alone."""

SCORING = ("scoring_func", "expert_selection_fn")
SAID: Mapping[str, Scores] = {"sigmoid": "sigmoid", "sqrtsoftplus": "sqrtsoftplus"}
"""What a config says under these names needs no entry below; most say nothing."""
SCORES: Mapping[Scores, str] = {
    "sigmoid": """
        afmoe axk1 axk2 bailing_hybrid bailing_moe_v2 beam deepseek_v3 deepseek_v32 dots1 dots3_note exaone_moe flint glm4_moe
        glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa hy_v3 hy_v4 hy_v4_vl kimi_k2 kimi_linear laguna lfm2_moe llama4
        mimo_v2_flash minimax_m2 minimax_m3_vl sarvam_mla sarvam_moe solar_open step3p5 step3p7
    """,
    "softmax of the chosen": """
        aria cohere2_moe gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared jetmoe openai_privacy_filter
    """,
    "sigmoid of the chosen": "kolibri1",
}
"""Values of `model_type`, without `_text` at the end, whose routers do not take the softmax."""
PLAIN = "deepseek_ocr2 deepseek_v2 jamba llama4 longcat_flash unlimited_ocr"
"""Those whose weights are the scores as they are, whatever `norm_topk_prob` says."""
NORMAL = "deepseek_v4"
"""Those whose weights sum to one, whatever it says."""
ON_INPUTS = "llama4"
"""Those that weigh what goes into an expert, not what comes out of it."""
OTHERS: Mapping[str, str] = {
    "diffusion_gemma": "its router sees another input than the experts, normalises it, and scales each expert",
    "gemma4": "its router sees another input than the experts, normalises it, and scales each expert",
    "inkling": "its weights sum to one together with those of the shared experts",
    "inkling_mm_model": "its weights sum to one together with those of the shared experts",
    "muse_spark": "its experts work on a projection of what the router sees",
    "phimoe": "it chooses one expert after the other, each by a softmax of its own (sparsemixer)",
    "zaya": "its router is an MLP that takes states from the layer before, and may choose no expert",
}
"""Those whose routers are not described here, and why."""
ZEROS = "zero_expert_num"
"""Where a config says this, the router chooses among experts without weights, too; that is not described either."""
SHIFTED: Mapping[str, float] = {"gpt_oss": 1.702, "openai_privacy_filter": 1.702, "minimax_m3_vl": 1.702}
"""Those that multiply with up + 1, and the slope of their sigmoid unless `swiglu_alpha` gives it."""
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
USUAL = 8
"""Experts per token where nothing says how many."""
SCALE = (
    "routed_scaling_factor",
    "router_scaling_factor",
    "moe_routed_scaling_factor",
    "moe_router_scaling_factor",
    "route_scale",
)
RENORMALISE = ("norm_topk_prob", "moe_normalize_expert_weights")
SOFTCAP = "moe_router_logit_softcapping"
CAPS = ("mlp_gate_softcap", "mlp_up_softcap")
KINDS = ("hidden_act", "hidden_activation", "activation_function")


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """How gate and up (M, N) become one: `act(gate) * up`, after clamping both to `limit`; with an `alpha`, gpt-oss's form.

    With `caps`, the linear factor of gate and up are softly capped, and the sigmoid sees the gate as it is: Inkling 2's form.
    """

    kind: str = "silu"
    limit: float | None = None
    alpha: float | None = None
    caps: tuple[float, float] | None = None

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """The hidden values (M, N)."""
        if self.limit:
            gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        if self.alpha:
            return gate * jax.nn.sigmoid(self.alpha * gate) * (up + 1)
        if self.caps:
            return _capped(gate, self.caps[0]) * jax.nn.sigmoid(gate) * _capped(up, self.caps[1])
        hidden: jax.Array = _ACTIVATIONS[self.kind](gate) * up
        return hidden

    def __str__(self) -> str:
        kind = f"x sigmoid({self.alpha} x) (up + 1)" if self.alpha else self.kind
        kind += f", gate capped at {self.caps[0]:g} and up at {self.caps[1]:g}" if self.caps else ""
        return f"{kind}, clamped to {self.limit}" if self.limit else kind


def _capped(x: jax.Array, cap: float) -> jax.Array:
    return cap * jnp.tanh(x / cap)


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

    A group's score is the sum of its `best` ones; logits are softly capped at `softcap`; weights multiply what goes into an
    expert if `on_inputs`. If there is an `other`, the model is of this type, and its own router is not described.
    """

    scores: Scores
    top_k: int
    renormalise: bool
    scale: float = 1.0
    groups: int = 1
    of_groups: int = 1
    best: int = 1
    softcap: float | None = None
    on_inputs: bool = False
    other: str = ""

    def __str__(self) -> str:
        text = f"{self.scores}, top {self.top_k}"
        text += f" in {self.of_groups} of {self.groups} groups" if self.groups > 1 else ""
        text += (", renormalised" if self.renormalise else "") + (f", x {self.scale:g}" if self.scale != 1 else "")
        text += f", logits capped at {self.softcap:g}" if self.softcap else ""
        text += ", on inputs" if self.on_inputs else ""
        return f"a usual router ({text}), as {self.other}'s own is not described" if self.other else text


def _words(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config says of its language model, wherever it says it."""
    inner = [config[key] for key in ("text_config", "thinker_config", "ffn_config") if isinstance(config.get(key), dict)]
    inner += [part["text_config"] for part in inner if isinstance(part.get("text_config"), dict)]
    return ChainMap(*reversed(inner), dict(config))


def _names(config: Mapping[str, Any]) -> set[str]:
    """The values of `model_type`: of the whole, and of its language model."""
    kinds = (each.get("model_type") for each in (config, _words(config)))
    return {str(kind).removesuffix("_text") for kind in kinds if kind}


def routing_of(config: Mapping[str, Any], experts: int) -> Routing:
    """The router of a model with this `config.json`, or the usual one where it says nothing."""
    words, names = _words(config), _names(config)
    scores = _scores(words, names)
    groups = _number(words.get("n_group") or 1)
    normal = bool(names & set(NORMAL.split())) or all(words.get(key, True) for key in RENORMALISE)
    return Routing(
        scores=scores,
        top_k=min(experts, _number(_first(words, TOP_K) or USUAL)),
        renormalise=normal and scores != "softmax of the chosen" and not names & set(PLAIN.split()),
        scale=float(_first(words, SCALE) or 1.0),
        groups=groups if groups > 1 and experts % groups == 0 and words.get("topk_method") != "greedy" else 1,
        of_groups=_number(words.get("topk_group") or 1),
        best=1 if words.get("topk_method") == "group_limited_greedy" else 2,
        softcap=words.get(SOFTCAP) or None,
        on_inputs=bool(names & set(ON_INPUTS.split())),
        other=" and ".join(sorted(names if words.get(ZEROS) else names & set(OTHERS))),
    )


def _scores(words: Mapping[str, Any], names: set[str]) -> Scores:
    said = next((SAID[words[key]] for key in SCORING if words.get(key) in SAID), None)
    known: dict[str, Scores] = {name: scores for scores, kinds in SCORES.items() for name in kinds.split()}
    usual: Scores = next((known[name] for name in names & set(known)), "softmax")
    return said or usual


def _first(words: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The first of these that a config gives."""
    return next((words[key] for key in keys if words.get(key)), None)


def activation_of(config: Mapping[str, Any]) -> Activation:
    """How a model with this `config.json` combines gate and up; `silu(gate) * up` where it says nothing that we know."""
    words = _words(config)
    kind = str(_first(words, KINDS))
    limit = words.get("swiglu_limit")
    alpha = next((SHIFTED[name] for name in _names(config) if name in SHIFTED), None)
    gate, up = (words.get(key) for key in CAPS)
    return Activation(
        kind=kind if kind in _ACTIVATIONS else "silu",
        limit=float(limit) if isinstance(limit, int | float) and limit > 0 else 7.0 if alpha else None,
        alpha=float(words.get("swiglu_alpha") or alpha) if alpha else None,
        caps=(float(gate), float(up)) if gate and up else None,
    )


def _number(value: Any) -> int:
    return int(value[0] if isinstance(value, Sequence) else value)


_FUNCTIONS: Mapping[str, Any] = {
    "softmax": jax.nn.softmax,
    "sigmoid": jax.nn.sigmoid,
    "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
}


def route(logits: jax.Array, routing: Routing, correction: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The experts (T, top_k) of each token and their weights, from the router's logits (T, E).

    A `correction` (E,) is added to the scores that choose, not to those that weigh.
    """
    kind, late, _ = routing.scores.partition(" of the chosen")
    logits = _capped(logits, routing.softcap) if routing.softcap else logits
    scores = logits if late else _FUNCTIONS[kind](logits)
    choosing = scores if correction is None else scores + correction
    if routing.groups > 1:
        choosing = _in_best_groups(choosing, routing)
    _, chosen = jax.lax.top_k(choosing, routing.top_k)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    weights = _FUNCTIONS[kind](weights) if late else weights
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
