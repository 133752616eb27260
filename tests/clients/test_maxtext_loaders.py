"""MaxText's trainer restores our trees by names and exact shapes, and its models then compute the logits of transformers.

What `test_maxtext` runs loads models with `from_pretrained`, which turns and pads what does not fit. Needs what that needs.
"""

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("maxtext")

from flax import nnx
from maxtext.common import checkpointing
from maxtext.utils import maxtext_utils_nnx, model_creation_utils

import convert
from tests.clients import test_maxtext as models

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]


def trained(config, *, mesh, model_mode):
    """A model with the parameters that its trainer restores (`load_parameters_path`)."""
    create, abstract = model_creation_utils.create_nnx_abstract_model(config, mesh, None, model_mode, jax.random.key(0))
    model = maxtext_utils_nnx.create_nnx_sharded_model(abstract, create, mesh=mesh)
    wanted = checkpointing._abstract_params(nnx.state(model))
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), wanted)
    nnx.update(model, checkpointing.load_params_from_path(config.load_parameters_path, wanted, 96))
    return model


@pytest.mark.parametrize("case", ["qwen3_moe-sparse", "deepseek_v3"])
@pytest.mark.parametrize("axis", [1, 0, None])
def test_the_trainer_restores_what_we_write(case, axis, tmp_path, monkeypatch):
    monkeypatch.setitem(models.tiny_models.SMALL, "num_hidden_layers", 4)  # not as many MoE layers as anything else
    stated, ids, wanted = models.make(case, tmp_path)
    convert.prefuse(tmp_path / "in", tmp_path / "tree", to="orbax", scan=axis is not None, scan_axis=axis)
    monkeypatch.setattr(model_creation_utils, "from_pretrained", trained)
    found = models.logits(case, stated, tmp_path / "tree", ids, axis, fused=True)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
