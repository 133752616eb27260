"""MaxText's own converter joins and takes apart what takes turns as the tables say, and names FP8's scales so: of Qwen3.5."""

from types import SimpleNamespace

import numpy as np
import pytest

from convert.planning.across.pairs import Sides, names_of, pairs_of
from layouts.language.sections import ROWS, TENSOR
from layouts.tables.families import FAMILIES, maxtext
from layouts.tables.maxtext_rows import APART, DELTA_NET
from layouts.tables.maxtext_trees import TREES
from layouts.tables.natives import PER_EXPERT

pytest.importorskip("torch")
pytest.importorskip("maxtext")
HF_MODEL_CONFIGS = pytest.importorskip("maxtext.checkpoint_conversion.utils.hf_model_configs").HF_MODEL_CONFIGS
HOOK_FNS = pytest.importorskip("maxtext.checkpoint_conversion.utils.param_mapping").HOOK_FNS
PARAM_MAPPING = pytest.importorskip("maxtext.checkpoint_conversion.utils.param_mapping").PARAM_MAPPING

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]
MAXTEXT = SimpleNamespace(inhomogeneous_layer_cycle_interval=4, use_multimodal=False)


@pytest.mark.parametrize("row", APART, ids=["qkvz", "ba"])
@pytest.mark.parametrize("model", ["qwen3.5-35b-a3b", "qwen3.5-397b-a17b"])
def test_rows_are_where_maxtext_puts_them(model, row):
    config = HF_MODEL_CONFIGS[model].to_dict()
    turns = row.sections.of({axis: config["text_config"][word] for axis, word in DELTA_NET})
    tensors = [np.random.default_rng(n).random((turns.size(n), 3)) for n in range(2)]
    joined = np.empty((turns.total, 3))
    for target, source in turns.boxes(range(turns.total), None):
        rows, of = (slice(box[ROWS].start, box[ROWS].stop) for box in (target, source))
        joined[rows] = tensors[source[TENSOR].start][of]
    there, back = (
        HOOK_FNS[model](config, MAXTEXT, scan_layers=True, saving_to_hf=saving)[
            f"params-decoder-layers-layer_0-{row.maxtext.replace('.', '-')}"
        ]
        for saving in (False, True)
    )
    assert np.array_equal(there(tuple(tensors)), joined.T)
    assert all(map(np.array_equal, back(joined.T), tensors))


FP8 = SimpleNamespace(**vars(MAXTEXT), weight_dtype="float8_e4m3fn", weight_block_size=128)


def pairs(model, *, scan):
    """All kinds of tensors of the FP8 tree, from Hugging Face to MaxText."""
    config = HF_MODEL_CONFIGS[model].to_dict()
    config = {"text_config": config["text_config"], "quantization_config": {"weight_block_size": [128, 128]}}
    family = next(family for family in FAMILIES if family.name == "qwen3_5_moe")
    sides = Sides(family=family, tree=maxtext(), hf=PER_EXPERT, maxtext=maxtext().native[0], scan=scan, to_maxtext=True)
    return [pair for pair in pairs_of(TREES["qwen3_5_moe"][0], sides, config) if pair.part != "bias"]


def flat(names):
    return [name for each in names for name in flat(each)] if isinstance(names, list | tuple) else [names]


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("model", ["qwen3.5-35b-a3b-fp8", "qwen3.5-397b-a17b-fp8"])
def test_fp8_weights_and_scales_have_the_names_of_maxtext(model, scan):
    wanted = PARAM_MAPPING[model](HF_MODEL_CONFIGS[model].to_dict(), FP8, scan_layers=scan)
    wanted = {name.removeprefix("params-").replace("-", "."): set(flat(names)) for name, names in wanted.items()}
    found = {}
    for pair in pairs(model, scan=scan):
        for name in names_of(pair):
            place = pair.target.key.render({"t": 0, **pair.source.key.parse(name)}).removeprefix("params.params.")
            found.setdefault(place, set()).add(name)
    assert found == wanted


def test_scales_take_the_turns_of_maxtext():
    model = "qwen3.5-35b-a3b-fp8"
    (pair,) = (
        each for each in pairs(model, scan=False) if "layers_{l*4}.attention.in_proj_qkvz.kernel_scale" in each.target.key.text
    )
    turns = pair.turns
    tensors = [np.random.default_rng(n).random((turns.size(n), 16)) for n in range(2)]
    joined = np.empty((turns.total, 16))
    for target, source in turns.boxes(range(turns.total), None):
        rows, of = (slice(box[ROWS].start, box[ROWS].stop) for box in (target, source))
        joined[rows] = tensors[source[TENSOR].start][of]
    config = HF_MODEL_CONFIGS[model].to_dict()
    there, back = (
        HOOK_FNS[model](config, FP8, scan_layers=False, saving_to_hf=saving)[
            "params-decoder-layers_0-attention-in_proj_qkvz-kernel_scale"
        ]
        for saving in (False, True)
    )
    assert np.array_equal(there(tuple(tensors)), joined.T)
    assert all(map(np.array_equal, back(joined.T), tensors))
