"""Values that MaxText has others of, in memory: what `load` and `sync_plan` compute is what a conversion does."""

import json

import jax
import numpy as np
import pytest

import convert
from convert.errors import PlanError, UsageError
from tests.orbax.test_computed import save
from tests.pipeline.test_load import bits, dotted

RULES = {"mixtral": "query-scale", "gemma4": "embedding-scale"}
SUBNORMAL = 0x0080
"""The bits of the least normal bfloat16; XLA makes zeros of what is smaller."""
EMBEDDING = "model.language_model.embed_tokens.weight"


@pytest.mark.parametrize("model", ["mixtral", pytest.param("gemma4", marks=pytest.mark.slow)])
def test_load_and_sync_compute_what_a_conversion_does(model, tmp_path):
    word = RULES[model]
    source = save(tmp_path / "in", "BF16", model, *([EMBEDDING] if model == "gemma4" else []))
    convert.prefuse(source, tmp_path / "tree", to="orbax", compute=word)
    with pytest.raises(PlanError, match=f"compute='{word}'"):
        convert.load(source, names="maxtext", layout="concat")
    wanted = bits(dotted(convert.load(tmp_path / "tree")))
    loaded = convert.load(source, names="maxtext", layout="concat", compute=word)
    config = json.loads((source / "config.json").read_text())
    plain = convert.load(source)
    options = {"names": "maxtext", "layout": "concat", "source_names": "hf", "config": config}
    synced = jax.jit(convert.sync_plan(plain, loaded, **options, compute=word))(plain)
    for found, without in ((loaded, 0), (synced, SUBNORMAL)):
        have = bits(dotted(found))
        assert have.keys() == wanted.keys()
        differ = {name: array[array != wanted[name]] for name, array in have.items()}
        assert {name for name, array in differ.items() if ((array & 0x7FFF) >= without).any()} == set()
    again = bits(convert.load(tmp_path / "tree", names="hf", layout="native", compute=word))
    assert all(np.array_equal(array, again[name]) for name, array in bits(plain).items())  # by the originals
    with pytest.raises(UsageError, match="is not computed back from memory"):
        convert.save(loaded, tmp_path / "out", like=source, names="maxtext", layout="concat", compute=word)
