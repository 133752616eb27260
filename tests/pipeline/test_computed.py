"""Values that MaxText has others of, in memory: what `load` and `sync_plan` compute is what a conversion does."""

import json
import shutil
from typing import Any

import jax
import numpy as np
import pytest

import convert
from convert.errors import PlanError
from layouts.side_files import ORIGINALS
from tests import tiny
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


def files(path):
    """Without what differs from run to run: the databases of Orbax, and manifests, which say what was done."""
    found = tiny.tree(path)
    return {name: digest for name, digest in found.items() if "/d/" not in name and "manifest" not in name}


PLACES = {
    "mixtral": ("model.layers.1.self_attn.q_proj.weight", "params.params.decoder.layers.self_attention.query.kernel"),
    "gemma4": (EMBEDDING, "params.params.token_embedder.embedding"),
}


SAVED: list[Any] = [("mixtral", True, True)]
SLOWER = [
    ("mixtral", True, False),
    ("mixtral", False, True),
    ("mixtral", False, False),
    *(("gemma4", kept, not kept) for kept in (True, False)),
]
SAVED += [pytest.param(*each, marks=pytest.mark.slow) for each in SLOWER]


@pytest.mark.parametrize(("model", "kept", "changed"), SAVED)
def test_what_is_saved_from_memory_is_what_the_command_makes(model, kept, changed, tmp_path):
    """Both ways; without the originals too, which whoever wrote the tree may not have kept."""
    word, (name, leaf) = RULES[model], PLACES[model]
    hf, tree = save(tmp_path / "hf", "BF16", model, *([EMBEDDING] if model == "gemma4" else [])), tmp_path / "tree"
    convert.prefuse(hf, tree, to="orbax", compute=word)
    if not kept:
        shutil.rmtree((tree / ORIGINALS).parent)
    as_tree, as_hf = {"names": "maxtext", "layout": "concat"}, {"names": "hf", "layout": "native"}
    commands = {"hf": convert.split, "orbax": convert.prefuse}
    for source, other, to, names, place in ((hf, tree, "hf", as_tree, leaf), (tree, hf, "orbax", as_hf, name)):
        params = convert.load(source, **names, compute=word)
        if changed:
            params = jax.tree.map_with_path(lambda at, x, to=place: x * 3 if ".".join(k.key for k in at) == to else x, params)
        report = convert.save(params, out := tmp_path / f"saved-{to}", like=source, **names, compute=word)
        assert bool(report.plan.computed) == changed
        assert changed or files(out) == files(source)
        verdict = convert.verify(source, out, gemm=False)
        assert verdict.equal is not changed, str(verdict)
        assert convert.verify(out).equal
        if changed:
            convert.save(params, mine := tmp_path / f"mine-{to}", like=other)
            commands[to](mine, made := tmp_path / f"made-{to}", to=to, compute=word)
            one, two = bits(dotted(convert.load(out))), bits(dotted(convert.load(made)))
            assert tiny.same(one, two)
            assert to == "hf" or (out / ORIGINALS).read_bytes() == (made / ORIGINALS).read_bytes()
