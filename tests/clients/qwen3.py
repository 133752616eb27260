"""Qwen3-MoE in plain JAX, on what `convert.load` gives: written from the model's equations, without our code.

Shapes: x is (batch, tokens, embed), heads are (batch, tokens, heads, size); a device's `wi` is (E, K, 2N), its `wo` (E, N, K).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P


def norm(x, scale, eps):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * scale


def rotated(x, theta):
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None, None] * theta ** -(jnp.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * jnp.cos(angles) - b * jnp.sin(angles), b * jnp.cos(angles) + a * jnp.sin(angles)], -1)


def attention(x, weight, config):
    """Grouped queries, each head normalised, causal."""
    size = len(weight("q_norm"))
    q, k, v = ((x @ weight(f"{part}_proj").T).reshape(*x.shape[:2], -1, size) for part in "qkv")
    theta = config.rope_parameters["rope_theta"]
    q, k = (rotated(norm(y, weight(f"{part}_norm"), config.rms_norm_eps), theta) for y, part in ((q, "q"), (k, "k")))
    k, v = (jnp.repeat(y, q.shape[2] // k.shape[2], axis=2) for y in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * size**-0.5
    scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(*x.shape[:2], -1) @ weight("o_proj").T


def experts(x, weights, chosen, wi, wo, *, axis, along_experts):
    """What one device adds: one grouped GEMM over its part of `wi`, in which gate and up lie beside each other."""
    count, top_k = len(wi), chosen.shape[-1]
    own = (chosen - (jax.lax.axis_index(axis) * count if along_experts else 0)).reshape(-1)
    own = jnp.where((own >= 0) & (own < count), own, count)  # the rows of others come last
    order = jnp.argsort(own)
    sizes = jnp.bincount(own, length=count + 1)[:count].astype(jnp.int32)
    gate, up = jnp.split(jax.lax.ragged_dot(x[order // top_k], wi, sizes), 2, -1)
    hidden = (jax.nn.silu(gate) * up)[:, : wo.shape[1]]  # `wi` may be padded
    out = jax.lax.ragged_dot(hidden, wo, sizes)
    out = jnp.where((own[order] < count)[:, None], out, 0) * weights.reshape(-1)[order, None]
    return jax.lax.psum(jnp.zeros_like(x).at[order // top_k].add(out), axis)


def feed(x, params, place, config):
    """A dense layer, or the experts where they lie."""
    if f"{place}.experts.wi" not in params:
        gate, up, down = (params[f"{place}.{part}_proj.weight"].T for part in ("gate", "up", "down"))
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down
    rows, wi, wo = x.reshape(-1, x.shape[-1]), params[f"{place}.experts.wi"], params[f"{place}.experts.wo"]
    weights, chosen = jax.lax.top_k(jax.nn.softmax(rows @ params[f"{place}.gate.weight"].T), config.num_experts_per_tok)
    weights = weights / weights.sum(-1, keepdims=True) if config.norm_topk_prob else weights
    mesh, cut, cut_down = wi.sharding.mesh, wi.sharding.spec, wo.sharding.spec
    (axis,) = mesh.axis_names
    local = partial(experts, axis=axis, along_experts=cut[0] == axis)
    found = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), P(), cut, cut_down), out_specs=P())(
        rows, weights, chosen, wi, wo
    )
    return found.reshape(x.shape)


def forward(params, ids, config):
    """Logits (B, T, vocabulary) of tokens (B, T)."""
    x, eps = params["model.embed_tokens.weight"][ids], config.rms_norm_eps
    for layer in range(config.num_hidden_layers):
        place = f"model.layers.{layer}"
        y = norm(x, params[f"{place}.input_layernorm.weight"], eps)
        x = x + attention(y, lambda part, at=place: params[f"{at}.self_attn.{part}.weight"], config)
        x = x + feed(norm(x, params[f"{place}.post_attention_layernorm.weight"], eps), params, f"{place}.mlp", config)
    return norm(x, params["model.norm.weight"], eps) @ params["lm_head.weight"].T
