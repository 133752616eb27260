"""The layouts that checkpoints come in, before anybody fuses them: where gate, up and down are, and along which axes they lie.

In: nothing. Out: layouts, and `SOURCES`, which names them. It never looks at a checkpoint.

Sources: transformers 5.24 `modeling_*.py` and `conversion_mapping.py`, published checkpoints; MaxText `layers/moe.py`.
`nn.Linear` stores [out, in].
"""

from __future__ import annotations

from collections.abc import Mapping

from layouts.language.layout import Layouts, layouts

PER_EXPERT = layouts(
    wi=("{experts}.{e}.{g:gate_proj,up_proj}.{part}", "n k"),
    wo=("{experts}.{e}.down_proj.{part}", "k n"),
)
PER_EXPERT_IN_OUT = layouts(
    wi=("{experts}.{e}.{g:gate_proj,up_proj}.{part}", "k n"),
    wo=("{experts}.{e}.down_proj.{part}", "n k"),
)
PER_EXPERT_W123 = layouts(
    wi=("{experts}.{e}.{g:w1,w3}.{part}", "n k"),
    wo=("{experts}.{e}.w2.{part}", "k n"),
)
PER_EXPERT_BELOW = layouts(
    wi=("{experts}.experts.{e}.{g:gate_proj,up_proj}.{part}", "n k"),
    wo=("{experts}.experts.{e}.down_proj.{part}", "k n"),
)
PER_EXPERT_IN_MLP = layouts(
    wi=("{path}.{l}.mlp.experts.{e}.{g:gate_proj,up_proj}.{part}", "n k"),
    wo=("{path}.{l}.mlp.experts.{e}.down_proj.{part}", "k n"),
)
PER_EXPERT_KINDS = layouts(
    wi=("{path}.{l}.mlp.experts.{kind*first+e:2}.{g:gate_proj,up_proj}.{part}", "n k"),
    wo=("{path}.{l}.mlp.experts.{kind*first+e:2}.down_proj.{part}", "k n"),
)
PADDLE_KINDS = layouts(
    wi=("{path}.{l}.mlp.experts.{kind*first+e:2}.up_gate_proj.{part}", "k (g n)"),
    wo=("{path}.{l}.mlp.experts.{kind*first+e:2}.down_proj.{part}", "n k"),
)
PER_EXPERT_FC = layouts(
    wi=("{experts}.{e}.{g:fc1,fc3}.{part}", "n k"),
    wo=("{experts}.{e}.fc2.{part}", "k n"),
)
PER_EXPERT_SPELT = layouts(
    wi=("{experts}.{e}.{g:gate,up}.{part}", "n k"),
    wo=("{experts}.{e}.down.{part}", "k n"),
)
PER_EXPERT_LINEAR = layouts(
    wi=("{experts}.{e}.{g:linear,linear_v}.{part}", "n k"),
    wo=("{experts}.{e}.linear_1.{part}", "k n"),
)
PER_EXPERT_W1V1 = layouts(
    wi=("{experts}.{e}.{g:w1,v1}.{part}", "n k"),
    wo=("{experts}.{e}.w2.{part}", "k n"),
)
PER_EXPERT_HELD = layouts(
    wi=("{experts}.mlp_experts.{e}.{g:w1,v1}.{part}", "n k"),
    wo=("{experts}.mlp_experts.{e}.w2.{part}", "k n"),
)
PER_EXPERT_LISTS = layouts(
    wi=("{experts}.mlp.{g:w1_linear,v1_linear}.{e}.{part}", "n k"),
    wo=("{experts}.mlp.w2_linear.{e}.{part}", "k n"),
)
PER_EXPERT_LISTS_IN_OUT = layouts(
    wi=("{experts}.mlp.{g:w1_linear,v1_linear}.{e}.{part}", "k n"),
    wo=("{experts}.mlp.w2_linear.{e}.{part}", "n k"),
)
W1_FUSED = layouts(
    wi=("{experts}.{e}.w1.{part}", "(g n) k"),
    wo=("{experts}.{e}.w2.{part}", "k n"),
)
FC1_FUSED = layouts(
    wi=("{experts}.local_experts.{e}.linear_fc1.{part}", "(g n) k"),
    wo=("{experts}.local_experts.{e}.linear_fc2.{part}", "k n"),
)
GATE_UP = layouts(
    wi=("{experts}.{e}.gate_up_proj.{part}", "(g n) k"),
    wo=("{experts}.{e}.down_proj.{part}", "k n"),
)
PADDLE = layouts(
    wi=("{experts}.{e}.up_gate_proj.{part}", "k (g n)"),
    wo=("{experts}.{e}.down_proj.{part}", "n k"),
)
UP_FIRST = layouts(
    wi=("{experts}.{e}.gate_and_up_proj.{part}", "(-g n) k"),
    wo=("{experts}.{e}.down_proj.{part}", "k n"),
)
FUSED = layouts(
    wi=("{experts}.gate_up_proj{part}", "e (g n) k"),
    wo=("{experts}.down_proj{part}", "e k n"),
)
FUSED_IN_OUT = layouts(
    wi=("{experts}.gate_up_proj{part}", "e k (g n)"),
    wo=("{experts}.down_proj{part}", "e n k"),
)
FUSED_INTERLEAVED = layouts(
    wi=("{experts}.gate_up_proj{part}", "e k (n g)"),
    wo=("{experts}.down_proj{part}", "e n k"),
)
FC_PROJ = layouts(
    wi=("{experts}.fc", "e (g n) k"),
    wo=("{experts}.proj", "e k n"),
)
WEIGHT_FIRST = layouts(
    wi=("{experts}.weight_{g:gate,up}.{e}", "n k"),
    wo=("{experts}.weight_down.{e}", "k n"),
)
PROJECTION_FIRST = layouts(
    wi=("{experts}.{g:gate_proj,up_proj}.{e}.{part}", "n k"),
    wo=("{experts}.down_proj.{e}.{part}", "k n"),
)
STACKED_BARE = layouts(
    wi=("{experts}.{g:gate_proj,up_proj}", "e n k"),
    wo=("{experts}.down_proj", "e k n"),
)
STACKED = layouts(
    wi=("{experts}.{g:gate_proj,up_proj}.{part}", "e n k"),
    wo=("{experts}.down_proj.{part}", "e k n"),
)
FLAT = layouts(
    wi=("{experts}.mlp.{g:w1,v1}", "(e n) k"),
    wo=("{experts}.mlp.w2", "(e n) k"),
)
LINEAR = layouts(
    wi=("{experts}.input_linear.{part}", "e (g n) k"),
    wo=("{experts}.output_linear.{part}", "e k n"),
)
FC = layouts(
    wi=("{experts}.fc1.{part}", "e k (g n)"),
    wo=("{experts}.fc2.{part}", "e n k"),
)
FUSED_BELOW = layouts(
    wi=("{experts}.experts.gate_up_proj{part}", "e (g n) k"),
    wo=("{experts}.experts.down_proj{part}", "e k n"),
)
FUSED_IN_MLP = layouts(
    wi=("{path}.{l}.mlp.experts.gate_up_proj{part}", "e (g n) k"),
    wo=("{path}.{l}.mlp.experts.down_proj{part}", "e k n"),
)
W13_INTERLEAVED = layouts(
    wi=("{experts}.w13_{part}", "e (n g) k"),
    wo=("{experts}.w2_{part}", "e k n"),
)
AUTOMODEL = layouts(
    wi=("{experts}.gate_and_up_projs", "e k (g n)"),
    wo=("{experts}.down_projs", "e n k"),
)
MLX = layouts(
    wi=("{beside}switch_mlp.{g:gate_proj,up_proj}.{part:mlx}", "e n k"),
    wo=("{beside}switch_mlp.down_proj.{part:mlx}", "e k n"),
)
MLX_IN_MLP = layouts(
    wi=("{path}.{l}.mlp.switch_mlp.{g:gate_proj,up_proj}.{part:mlx}", "e n k"),
    wo=("{path}.{l}.mlp.switch_mlp.down_proj.{part:mlx}", "e k n"),
)
MLX_GLU = layouts(
    wi=("{experts}.switch_glu.{g:gate_proj,up_proj}.{part:mlx}", "e n k"),
    wo=("{experts}.switch_glu.down_proj.{part:mlx}", "e k n"),
)
MLX_EXPERTS = layouts(
    wi=("{experts}.{g:gate_proj,up_proj}.{part:mlx}", "e n k"),
    wo=("{experts}.down_proj.{part:mlx}", "e k n"),
)
TITAN = layouts(
    wi=("{path}.{l}.moe.experts.{g:w1,w3}", "e n k"),
    wo=("{path}.{l}.moe.experts.w2", "e k n"),
)
TUNIX = layouts(
    wi=("{path}.{l}.mlp.{g:gate_proj,up_proj}", "e k n"),
    wo=("{path}.{l}.mlp.down_proj", "e n k"),
)
MAXTEXT_PART = "scale"
"""The one companion that MaxText fuses with its weights; biases stay apart there."""
MAXTEXT = layouts(
    wi=("{experts}.wi_{g:0,1}{part:scale}", "e ... k n"),
    wo=("{experts}.wo{part:scale}", "e ... n k"),
)
MAXTEXT_AXIS_0 = layouts(
    wi=("{experts}.wi_{g:0,1}{part:scale}", "... e k n"),
    wo=("{experts}.wo{part:scale}", "... e n k"),
)

SOURCES: Mapping[str, Layouts] = {
    "per-expert": PER_EXPERT,
    "per-expert-in-out": PER_EXPERT_IN_OUT,  # Paddle's linear layers, unfused: only a user can say so
    "per-expert-w123": PER_EXPERT_W123,
    "per-expert-kinds": PER_EXPERT_KINDS,  # ERNIE 4.5 VL: text experts, and behind them those for images
    "per-expert-fc": PER_EXPERT_FC,  # the vision encoder of Dots 3 Note
    "per-expert-spelt": PER_EXPERT_SPELT,
    "per-expert-linear": PER_EXPERT_LINEAR,  # Grok-1
    "per-expert-w1v1": PER_EXPERT_W1V1,  # DBRX in MLX
    "per-expert-held": PER_EXPERT_HELD,  # DBRX, taken apart for fine-tuning and quantisers
    "per-expert-lists": PER_EXPERT_LISTS,  # DBRX of ModelOpt: which of these two, the version that wrote it knows
    "per-expert-lists-in-out": PER_EXPERT_LISTS_IN_OUT,
    "per-expert-w1": W1_FUSED,  # Yuan 2
    "per-expert-fc1": FC1_FUSED,  # ZAYA1 as its makers publish it
    "per-expert-gate-up": GATE_UP,
    "per-expert-paddle-kinds": PADDLE_KINDS,  # ERNIE 4.5 VL of Paddle
    "per-expert-paddle": PADDLE,  # ERNIE 4.5: gate first, in spite of the name
    "per-expert-below": PER_EXPERT_BELOW,  # Granite, JetMoE and Step-3.5, quantised
    "per-expert-in-mlp": PER_EXPERT_IN_MLP,  # Step and Mistral Large 4 of transformers, quantised
    "per-expert-up-first": UP_FIRST,
    "projection-first": PROJECTION_FIRST,  # some NVFP4 checkpoints of ModelOpt
    "weight-first": WEIGHT_FIRST,  # LLaMA-MoE
    "stacked": STACKED,
    "stacked-bare": STACKED_BARE,  # VeOmni
    "stacked-flat": FLAT,
    "fused-out-in": FUSED,
    "fused-in-out": FUSED_IN_OUT,
    "fused-interleaved": FUSED_INTERLEAVED,
    "fused-linear": LINEAR,
    "fused-fc": FC,
    "fused-fc-proj": FC_PROJ,  # IQuest Q1
    "fused-below": FUSED_BELOW,  # Granite and JetMoE as transformers holds them
    "fused-in-mlp": FUSED_IN_MLP,  # Step and Mistral Large 4 as transformers holds them
    "w13-interleaved": W13_INTERLEAVED,
    "automodel": AUTOMODEL,  # NeMo
    "mlx": MLX,  # beside the experts, whatever the model
    "mlx-in-mlp": MLX_IN_MLP,  # Step-3.5
    "mlx-glu": MLX_GLU,  # Gemma 4
    "mlx-experts": MLX_EXPERTS,  # gpt-oss, Llama 4, AFMoE, dots.llm1, Klear
    "torchtitan": TITAN,
    "tunix": TUNIX,
    "maxtext": MAXTEXT,
    "maxtext-axis-0": MAXTEXT_AXIS_0,  # param_scan_axis=0
}
"""The names of the layouts that checkpoints come in; `--source-layout` takes them besides the targets."""
