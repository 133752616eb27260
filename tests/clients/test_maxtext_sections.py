"""MaxText's own converter joins and takes apart what takes turns as the table of sections says, in the sizes of Qwen3.5."""

from types import SimpleNamespace

import numpy as np
import pytest

from layouts.language.sections import ROWS, TENSOR
from layouts.tables.maxtext_rows import APART, DELTA_NET

pytest.importorskip("torch")
pytest.importorskip("maxtext")
HF_MODEL_CONFIGS = pytest.importorskip("maxtext.checkpoint_conversion.utils.hf_model_configs").HF_MODEL_CONFIGS
HOOK_FNS = pytest.importorskip("maxtext.checkpoint_conversion.utils.param_mapping").HOOK_FNS

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
