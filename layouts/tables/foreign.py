"""Forms of weights that are no layout of a weight: told by names that nothing else has, refused with what to do.

In: nothing. Out: `FOREIGN`. It never looks at a checkpoint.

What stands in such tensors is coded for the kernels of one library, or belongs to another file format, or is half of a sum.

Sources: transformers `integrations/` (EETQ, FP-Quant, HIGGS, Metal, SpQR); bitsandbytes `functional.QuantState`; exllamav2
`ext.make_q_matrix`, exllamav3 `modules/quant/exl3.py`; gguf-py `constants.py`; PEFT `tuners/lora/layer.py`; HQQ `HQQLinear`;
AQLM `QuantizedLinear`; compressed-tensors `compressors/`; optimum-quanto; VPTQ; torchao.
"""

from __future__ import annotations

from collections.abc import Mapping

_PUBLISHED = "take the checkpoint it was made from"
FOREIGN: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("bitsandbytes", f"its codes depend on the order in which weights lie; {_PUBLISHED}, or dequantise it with transformers"): (
        "absmax", "nested_absmax", "quant_map", "nested_quant_map", "quant_state", "quant_storage", "SCB", "weight_format",
    ),
    ("EXL2", f"ExLlamaV2 shuffles rows and mixes widths; {_PUBLISHED}"): (
        "q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm", "q_perm", "q_group_map",
    ),
    ("EXL3", f"ExLlamaV3 codes tiles as a trellis; {_PUBLISHED}"): (
        "trellis", "suh", "svh", "su", "sv", "mcg", "mul1", "mcg_multiplier", "mul1_multiplier",
    ),
    ("GGUF", f"these are llama.cpp's names; {_PUBLISHED}, or convert it with transformers (gguf_file=...)"): (
        "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_up_exps", "ffn_norm_exps",
    ),
    ("an adapter inside a model", "merge it first (PEFT merge_and_unload), or save the adapter alone and convert that"): (
        "base_layer", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "modules_to_save",
        "original_module", "hada_w1_a", "lokr_w1", "vera_lambda_b", "oft_R", "ia3_l",
    ),
    ("compressed-tensors' 2:4 sparsity", "values and their places; decompress it with compressed-tensors"): (
        "bitmask", "compressed", "scale_packed",
    ),
    ("EETQ", f"its weights are [in, out], in an order of its kernels; {_PUBLISHED}"): ("weight_scales",),
    ("FP-Quant", f"weights were rotated before they were rounded; {_PUBLISHED}"): (
        "forward_hadamard_matrix", "backward_hadamard_matrix", "act_global_scale", "dqweight",
    ),
    ("HIGGS", f"weights are places in a table, in an order of its kernels; {_PUBLISHED}"): ("tables", "tables2"),
    ("SpQR", f"outliers stand apart; {_PUBLISHED}"): ("dense_weights", "col_vals", "in_perm"),
    ("transformers' Metal quantisation", f"what it calls scales GPTQ calls so, too; {_PUBLISHED}"): ("qbiases",),
    ("a quantiser's own state", "export it first (export_hf_checkpoint of ModelOpt, the safetensors export of Quark)"): (
        "weight_quantizer", "input_quantizer", "output_quantizer",
    ),
    ("HQQ", f"it packs along another axis by its own settings; {_PUBLISHED}"): ("W_q", "W_nbits"),
    ("AQLM or VPTQ", f"weights are sums of code words; {_PUBLISHED}"): ("codes", "codebooks", "centroids", "res_centroids"),
    ("QuIP# or QTIP", f"weights are code words of a lattice; {_PUBLISHED}"): ("Qidxs", "SU", "SV"),
    ("optimum-quanto or torchao", f"a tensor subclass taken apart; {_PUBLISHED}, or save it dequantised"): (
        "_data", "_scale", "_shift", "_weight_qdata", "_weight_scale", "tensor_impl",
    ),
}  # fmt: skip
"""What it is and what to do -> parts of names, between dots, that say so behind the word for a projection."""
WORDS: Mapping[str, tuple[str, str]] = {word: said for said, words in FOREIGN.items() for word in words}
"""The same by word."""
