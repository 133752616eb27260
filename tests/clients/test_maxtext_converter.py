"""What sees and hears, leaf by leaf as MaxText's own converter makes it: the models that `test_maxtext` runs have text alone.

MaxText gives the names and shapes of its model, and the functions of `to_maxtext` each leaf. Needs what `test_maxtext` needs.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
maxtext = pytest.importorskip("maxtext")

import ml_dtypes  # noqa: E402
import psutil  # noqa: E402
from flax.traverse_util import flatten_dict  # noqa: E402
from maxtext.checkpoint_conversion import to_maxtext  # noqa: E402
from maxtext.checkpoint_conversion.standalone_scripts import llama4_ckpt_unscanned  # noqa: E402
from maxtext.checkpoint_conversion.utils import param_mapping  # noqa: E402
from maxtext.configs import pyconfig  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import convert  # noqa: E402
from layouts.checkpoint import open_checkpoint  # noqa: E402
from layouts.tensors import bits  # noqa: E402
from tests.clients import test_maxtext as models  # noqa: E402

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

SEEN: Mapping[str, tuple[str, ...]] = {
    "hidden_size_for_vit": ("hidden_size",),
    "intermediate_size_for_vit": ("intermediate_size",),
    "num_attention_heads_for_vit": ("num_heads", "num_attention_heads"),
    "num_hidden_layers_for_vit": ("depth", "num_hidden_layers"),
    "patch_size_for_vit": ("patch_size",),
    "temporal_patch_size_for_vit": ("temporal_patch_size",),
    "spatial_merge_size_for_vit": ("spatial_merge_size",),
    "out_hidden_size_for_vit": ("out_hidden_size",),
    "num_position_embeddings_for_vit": ("num_position_embeddings", "position_embedding_size"),
    "deepstack_visual_indexes_for_vit": ("deepstack_visual_indexes",),
    # of Llama 4
    "image_size_for_vit": ("image_size",),
    "tile_size_for_vit": ("image_size",),
    "num_channels_for_vit": ("num_channels",),
    "vision_output_dim_for_vit": ("vision_output_dim",),
    "projector_input_dim_for_vit": ("projector_input_dim",),
    "projector_output_dim_for_vit": ("projector_output_dim",),
    "pixel_shuffle_ratio_for_vit": ("pixel_shuffle_ratio",),
}
HEARD: Mapping[str, tuple[str, ...]] = {
    f"{word}_for_audio": (word,)
    for word in (
        "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "max_source_positions", "num_mel_bins",
        "downsample_hidden_size", "output_dim", "n_window", "n_window_infer", "conv_chunksize",
    )
}  # fmt: skip
CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen3_vl_moe": ("qwen3-vl-30b-a3b", {}),
    "qwen3_omni_moe": ("qwen3-omni-30b-a3b", {"use_audio": True}),
    "qwen3_5_moe-cycles": ("qwen3.5-35b-a3b", {}),
    "gemma4-seen": ("gemma4-26b", {}),
}

COMPUTED = {"gemma4-seen": "embedding-scale"}


def words(names: Mapping[str, tuple[str, ...]], stated: Mapping[str, Any]) -> dict[str, Any]:
    """MaxText's words with what `config.json` says."""
    found = {word: next((stated[name] for name in each if name in stated), None) for word, each in names.items()}
    return {word: value for word, value in found.items() if value is not None}


def values(tensor: Any) -> np.ndarray:
    return to_maxtext._convert_tensor_to_numpy(tensor)


def config_of(kind: str, stated: Mapping[str, Any], special: Mapping[str, Any]) -> Any:
    """MaxText's config of a model of this kind and these sizes."""
    options = {
        **{word: value for word, value in models.RUN.items() if word != "weight_dtype"},
        **words(models.WORDS, stated["text_config"]),
        **words(SEEN, stated["vision_config"]),
        **words(HEARD, stated.get("audio_config") or {}),
        **special, "model_name": kind, "scan_layers": False, "use_multimodal": True, "use_mrope": False, "head_dim": 16,
    }  # fmt: skip
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    return pyconfig.initialize(["", str(base), *(f"{word}={models._text(value)}" for word, value in options.items())])


def theirs(case: str, stated: dict[str, Any], tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What MaxText's converter makes of what sees and hears, by the names that leaves have in a tree."""
    kind, special = CASES[case]
    config = config_of(kind, stated.get("thinker_config", stated), special)
    shapes, _ = to_maxtext.get_maxtext_model_info(config)
    names = param_mapping.PARAM_MAPPING[kind](stated, config, False)
    hooks = param_mapping.HOOK_FNS[kind](stated, config, False, saving_to_hf=False)
    found: list[Any] = [None] * len(shapes)
    for key, sources in names.items():
        if all(part in shapes and "_encoder-" in part for part in ((key,) if isinstance(key, str) else key)):
            at, shape = to_maxtext._get_maxtext_indices_and_shapes(key, shapes)
            load = to_maxtext._get_hf_loading_function(
                sources, lambda name: values(tensors[name]), hooks.get(key), shape, config, key
            )
            to_maxtext._get_maxtext_weight(load, at, shape, key, found, "bfloat16", False)  # which compares shapes
    leaves = {f"params.{key.replace('-', '.')}": found[at] for key, (at, _) in shapes.items() if "_encoder-" in key}
    assert all(leaf is not None for leaf in leaves.values())
    return leaves


@pytest.mark.parametrize("case", CASES)
def test_encoders_are_what_maxtext_makes_of_them(case, tmp_path, monkeypatch):
    monkeypatch.setitem(models.tiny_models.SMALL, "patch_size", 16)  # MaxText's pictures are 768 wide
    monkeypatch.setitem(models.tiny_models.SMALL, "deepstack_visual_indexes", [0, 1, 1])
    models.tiny_models.build(case).save_pretrained(tmp_path / "in")
    if case in models.EDITED:
        models.EDITED[case](tmp_path / "in")
    stated = json.loads((tmp_path / "in" / "config.json").read_text())
    convert.reformat(tmp_path / "in", tmp_path / "tree", to="orbax", scan=False, compute=COMPUTED.get(case))
    wanted = theirs(case, stated, load_file(tmp_path / "in" / "model.safetensors"))
    assert_same(tmp_path / "tree", wanted, "_encoder.")
    assert len(wanted) > 20


def assert_same(path: Path, wanted: Mapping[str, np.ndarray], word: str = "") -> None:
    """That the arrays of a tree whose names have this word are these, bit for bit."""
    tree = open_checkpoint(path)
    assert {name for name in tree.tensors if word in name} == set(wanted)
    for name, array in wanted.items():
        ours = tree.read(name, (slice(None),) * array.ndim)
        assert np.array_equal(ours.view(bits("BF16")), np.asarray(array, ml_dtypes.bfloat16).view(bits("BF16"))), name


@pytest.mark.parametrize("step", [1, 2])
def test_llama_4_is_what_maxtexts_script_makes_of_it(step, tmp_path):
    """All of it, text too; names and shapes are those of MaxText's model."""
    built = models.tiny_models.config("llama4-seen")
    built.text_config.interleave_moe_layer_step = step
    built.text_config.moe_layers = list(range(step - 1, 4, step))
    models.tiny_models.built(built).save_pretrained(tmp_path / "in")
    stated = json.loads((tmp_path / "in" / "config.json").read_text())
    convert.reformat(tmp_path / "in", tmp_path / "tree", to="orbax", scan=False)
    text, seen = stated["text_config"], stated["vision_config"]
    sizes = {
        "num_layers": text["num_hidden_layers"], "num_heads": text["num_attention_heads"], "dims_per_head": text["head_dim"],
        "num_kv_heads": text["num_key_value_heads"], "vocab": text["vocab_size"], "interleave_moe_layer_step": step,
        "rope_type": "llama3.1", "scale_query": False, "num_layers_vit": seen["num_hidden_layers"],
        "num_att_head_vit": seen["num_attention_heads"], "hidden_size_vit": seen["hidden_size"],
    }  # fmt: skip
    made = llama4_ckpt_unscanned._convert_huggingface_to_jax_weights(
        str(tmp_path / "in"), "llama4-17b-16e", sizes, psutil.Process()
    )
    wanted = {f"params.params.{'.'.join(place)}": array for place, array in flatten_dict(made).items()}
    assert_same(tmp_path / "tree", wanted)
    shapes, _ = to_maxtext.get_maxtext_model_info(config_of("llama4-17b-16e", stated, {}))
    shapes = {f"params.{key.replace('-', '.')}": tuple(shape) for key, (_, shape) in shapes.items()}
    assert shapes == {name: array.shape for name, array in wanted.items()}
