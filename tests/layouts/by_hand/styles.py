"""The styles in which families store their experts, by hand: the logical weights of one MoE block -> name -> array.

Gate and up are (E, K, N), down is (E, N, K). Written from `modeling_*.py` of transformers 5.24 and from published checkpoints.
`nn.Linear` stores [out, in].
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Style = Callable[[str, np.ndarray, np.ndarray, np.ndarray], Arrays]


def projections(at: str, gate, up, down) -> Arrays:
    """experts.{e}.gate_proj.weight [N, K], up_proj [N, K], down_proj [K, N]."""
    found = {}
    for e in range(len(gate)):
        found[f"{at}.experts.{e}.gate_proj.weight"] = gate[e].T
        found[f"{at}.experts.{e}.up_proj.weight"] = up[e].T
        found[f"{at}.experts.{e}.down_proj.weight"] = down[e].T
    return found


def w123(at: str, gate, up, down) -> Arrays:
    """w1 is gate, w3 is up, w2 is down."""
    found = {}
    for e in range(len(gate)):
        found[f"{at}.experts.{e}.w1.weight"] = gate[e].T
        found[f"{at}.experts.{e}.w3.weight"] = up[e].T
        found[f"{at}.experts.{e}.w2.weight"] = down[e].T
    return found


def fc132(at: str, gate, up, down) -> Arrays:
    """The vision encoder of Dots 3 Note: fc1 is gate, fc3 is up, fc2 is down."""
    found = {}
    for e in range(len(gate)):
        found[f"{at}.experts.{e}.fc1.weight"] = gate[e].T
        found[f"{at}.experts.{e}.fc3.weight"] = up[e].T
        found[f"{at}.experts.{e}.fc2.weight"] = down[e].T
    return found


def spelt(*words: str, below: str = "experts") -> Style:
    """One matrix for each expert and projection, [out, in], under these words for gate, up and down."""

    def style(at: str, gate, up, down) -> Arrays:
        found = {}
        for e in range(len(gate)):
            for word, weight in zip(words, (gate, up, down), strict=True):
                found[f"{at}.{below}.{e}.{word}.weight"] = weight[e].T
        return found

    return style


def gate_up(at: str, gate, up, down) -> Arrays:
    """gate_up_proj [2N, K] of each expert; down_proj [K, N]."""
    found = {}
    for e in range(len(gate)):
        found[f"{at}.experts.{e}.gate_up_proj.weight"] = np.concatenate((gate[e].T, up[e].T))
        found[f"{at}.experts.{e}.down_proj.weight"] = down[e].T
    return found


def projection_first(at: str, gate, up, down) -> Arrays:
    """Some NVFP4 checkpoints of ModelOpt: experts.gate_proj.{e}.weight [N, K], up_proj, down_proj [K, N]."""
    found = {}
    for e in range(len(gate)):
        for word, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            found[f"{at}.experts.{word}.{e}.weight"] = weight[e].T
    return found


def yuan(at: str, gate, up, down) -> Arrays:
    """Yuan 2: w1 [2N, K], its first rows are gate; w2 [K, N]."""
    found = {}
    for e in range(len(gate)):
        found[f"{at}.experts.{e}.w1.weight"] = np.concatenate((gate[e].T, up[e].T))
        found[f"{at}.experts.{e}.w2.weight"] = down[e].T
    return found


def fc1(at: str, gate, up, down) -> Arrays:
    """ZAYA1 as published: linear_fc1 [2N, K] of each expert, its first rows are gate; linear_fc2 [K, N]."""
    found = {}
    for e in range(len(gate)):
        found[f"{at}.experts.local_experts.{e}.linear_fc1.weight"] = np.concatenate((gate[e].T, up[e].T))
        found[f"{at}.experts.local_experts.{e}.linear_fc2.weight"] = down[e].T
    return found


def weight_first(at: str, gate, up, down) -> Arrays:
    """LLaMA-MoE: parameters in lists, experts.weight_gate.{e} [N, K], weight_up, weight_down [K, N]."""
    found = {}
    for e in range(len(gate)):
        for word, weight in (("gate", gate), ("up", up), ("down", down)):
            found[f"{at}.experts.weight_{word}.{e}"] = weight[e].T
    return found


def fc_proj(at: str, gate, up, down) -> Arrays:
    """IQuest Q1: fc [E, 2N, K], its first rows are gate; proj [E, K, N]."""
    rows = np.concatenate((gate, up), -1).swapaxes(1, 2)
    return {f"{at}.experts.fc": rows, f"{at}.experts.proj": down.swapaxes(1, 2)}


def paddle(at: str, gate, up, down) -> Arrays:
    """ERNIE 4.5 of Paddle: up_gate_proj [K, 2N], gate first in spite of its name; down_proj [N, K]."""
    found = {}
    for e in range(len(gate)):
        found[f"{at}.experts.{e}.up_gate_proj.weight"] = np.concatenate((gate[e], up[e]), -1)
        found[f"{at}.experts.{e}.down_proj.weight"] = down[e]
    return found


def automodel(at: str, gate, up, down) -> Arrays:
    """NeMo AutoModel: gate_and_up_projs [E, K, 2N], down_projs [E, N, K]."""
    return {f"{at}.experts.gate_and_up_projs": np.concatenate((gate, up), -1), f"{at}.experts.down_projs": down}


def mlx(at: str, gate, up, down) -> Arrays:
    """MLX: switch_mlp.gate_proj.weight [E, N, K], up_proj, down_proj [E, K, N]."""
    words = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    return {f"{at}.switch_mlp.{name}.weight": array.swapaxes(1, 2) for name, array in words.items()}


def switch(below: str) -> Style:
    """MLX under other names: gate_proj.weight [E, N, K], up_proj, down_proj [E, K, N] (mlx-lm `SwitchGLU`)."""

    def style(at: str, gate, up, down) -> Arrays:
        words = {"gate_proj": gate, "up_proj": up, "down_proj": down}
        return {f"{at}.{below}.{name}.weight": array.swapaxes(1, 2) for name, array in words.items()}

    return style


def up_first(at: str, gate, up, down) -> Arrays:
    """Hunyuan-Large: the rows of up stand before those of gate."""
    found = {}
    for e in range(len(gate)):
        found[f"{at}.experts.{e}.gate_and_up_proj.weight"] = np.concatenate((up[e].T, gate[e].T))
        found[f"{at}.experts.{e}.down_proj.weight"] = down[e].T
    return found


def out_in(at: str, gate, up, down) -> Arrays:
    """gate_up_proj [E, 2N, K], down_proj [E, K, N]."""
    rows = np.concatenate((gate, up), -1).swapaxes(1, 2)
    return {f"{at}.experts.gate_up_proj": rows, f"{at}.experts.down_proj": down.swapaxes(1, 2)}


def in_out(at: str, gate, up, down) -> Arrays:
    """gate_up_proj [E, K, 2N], down_proj [E, N, K]."""
    return {f"{at}.experts.gate_up_proj": np.concatenate((gate, up), -1), f"{at}.experts.down_proj": down}


def interleaved(at: str, gate, up, down) -> Arrays:
    """gpt-oss: columns 0, 2, 4, ... are gate; biases likewise."""
    both = np.stack((gate, up), -1).reshape(*gate.shape[:2], -1)
    bias = 7 + both[:, 0] * 3
    found = {f"{at}.experts.gate_up_proj": both, f"{at}.experts.gate_up_proj_bias": bias}
    return found | {f"{at}.experts.down_proj": down, f"{at}.experts.down_proj_bias": down[:, 0] * 5}


def linear(at: str, gate, up, down) -> Arrays:
    """Granite and JetMoE: input_linear.weight [E, 2N, K], output_linear.weight [E, K, N]."""
    rows = np.concatenate((gate, up), -1).swapaxes(1, 2)
    return {f"{at}.input_linear.weight": rows, f"{at}.output_linear.weight": down.swapaxes(1, 2)}


def fc(at: str, gate, up, down) -> Arrays:
    """Aria: fc1.weight [E, K, 2N], fc2.weight [E, N, K]."""
    return {f"{at}.experts.fc1.weight": np.concatenate((gate, up), -1), f"{at}.experts.fc2.weight": down}


def flat(at: str, gate, up, down) -> Arrays:
    """DBRX: w1 (gate), v1 (up) and w2 (down) all [E * N, K]."""
    k = gate.shape[1]
    rows = {"w1": gate.swapaxes(1, 2), "v1": up.swapaxes(1, 2), "w2": down}
    return {f"{at}.experts.mlp.{name}": array.reshape(-1, k) for name, array in rows.items()}


def stacked(at: str, gate, up, down) -> Arrays:
    """Step-3.5: gate_proj.weight [E, N, K], up_proj, down_proj [E, K, N]."""
    words = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    return {f"{at}.{name}.weight": array.swapaxes(1, 2) for name, array in words.items()}


def w13_interleaved(at: str, gate, up, down) -> Arrays:
    """Inkling: w13_weight [E, 2N, K], rows 0, 2, 4, ... are gate."""
    both = np.stack((gate, up), -1).reshape(*gate.shape[:2], -1)
    return {f"{at}.experts.w13_weight": both.swapaxes(1, 2), f"{at}.experts.w2_weight": down.swapaxes(1, 2)}


@dataclass(frozen=True, kw_only=True)
class Model:
    """A published family: its `model_type`s, the module of its experts, their style, and what stands beside them."""

    types: tuple[str, ...]
    style: Style = projections
    at: str = "model.layers.{}.mlp"
    count: str = "num_experts"
    nested: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    beside: tuple[str, ...] = ("model.layers.{}.mlp.gate.weight",)
    fused: str = ""
    """Where `wi` and `wo` of `concat` go, if not below `experts`."""


def shared(at: str) -> tuple[str, ...]:
    """The names of shared experts beside the routed ones."""
    return tuple(f"{at}.shared_experts.{word}_proj.weight" for word in ("gate", "up", "down"))


MLP, SPARSE, FEED = "model.layers.{}.mlp", "model.layers.{}.block_sparse_moe", "model.layers.{}.feed_forward"
