"""Saving: what was loaded becomes the files that it came from, byte for byte, and new values stand where the old ones stood."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
import scripts.make_checkpoint as made
from convert.options import Choices
from convert.pipeline.back import reversed_plan
from convert.planning.across.plan import make_cross_plan
from tests import tiny
from tests.memory.test_foreign import Foreign
from tests.pipeline.test_load import LAYOUTS, OLMOE, PLAIN, WI, cut
from tests.planning.models import reader

BESIDE = [("qwen3_moe", True), *(pytest.param(name, False, marks=pytest.mark.slow) for name in ("gpt_oss", "qwen3_5_moe"))]

MANIFEST = "convert_manifest.json"


def files(path):
    found = tiny.tree(path)
    found.pop(MANIFEST, None)
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("a") / "hf", tiny.tensors(OLMOE), tiny.config(OLMOE))


@pytest.mark.parametrize("layout", [None, "native", *LAYOUTS])
def test_the_same_files_again(source, tmp_path, layout):
    options = LAYOUTS.get(layout, {})
    params = convert.load(source, layout=layout, sharding=cut, **options)
    report = convert.save(params, tmp_path / "out", like=source, layout=layout, **options)
    assert files(tmp_path / "out") == files(source)
    assert report.written
    assert "save" in str(report)
    assert convert.verify(tmp_path / "out").equal


def test_arrays_that_speak_dlpack(source, tmp_path):
    params = {name: Foreign(array) for name, array in convert.load(source, layout="concat").items()}
    convert.save(params, tmp_path / "out", like=source, layout="concat")
    assert files(tmp_path / "out") == files(source)


SOME = [pytest.param(f, marks=() if i % 6 == 0 else pytest.mark.slow, id=f.name) for i, f in enumerate(PLAIN)]


@pytest.mark.parametrize("family", SOME)
def test_every_family_becomes_its_own_files_again(family, tmp_path):
    """Of those without a name in config.json too: their own tensors tell."""
    source = tiny.checkpoint(tmp_path / "a", tiny.tensors(family, others=False), tiny.config(family), shards=2, extra=False)
    options = {"family": family.name}
    convert.save(convert.load(source, layout="concat", **options), tmp_path / "b", like=source, layout="concat", **options)
    assert files(tmp_path / "b") == files(source)


def test_a_prefused_checkpoint_is_saved_prefused(source, tmp_path):
    convert.prefuse(source, tmp_path / "fused", layout="interleaved")
    params = convert.load(tmp_path / "fused", layout="native")
    convert.save(params, tmp_path / "out", like=tmp_path / "fused", layout="native")
    assert files(tmp_path / "out") == files(tmp_path / "fused")
    convert.split(tmp_path / "out", tmp_path / "split")
    assert files(tmp_path / "split") == files(source)


@pytest.mark.parametrize(("layout", "scan"), [(None, True), ("per-shard", True), ("concat", False)])
def test_maxtexts_tree_becomes_hugging_faces_files_again(tmp_path, layout, scan):
    source = made.make_checkpoint(tmp_path / "hf", family="qwen3_moe")
    asked = {"names": "maxtext", "layout": layout, "scan": scan, **({"shards": 2} if layout == "per-shard" else {})}
    convert.save(convert.load(source, sharding=cut, **asked), tmp_path / "out", like=source, **asked)
    assert files(tmp_path / "out") == files(source)


@pytest.mark.parametrize("to_maxtext", [True, False])
def test_tensors_that_take_turns_in_one_are_given_back(to_maxtext):
    """Loaded by the names of the other format: the plan of one array of several tensors, and of several of one, reversed."""
    source = reader("qwen3_5_moe")
    if not to_maxtext:
        plan = make_cross_plan(source, Path(), "convert", Choices())
        arrays = {target.spec.name: tiny.fill(target, source) for target in plan.targets}
        source = tiny.MemoryReader(arrays, config=source.config, format="orbax")
    plan = make_cross_plan(source, Path(), "convert", Choices())
    held = tiny.MemoryReader({target.spec.name: tiny.fill(target, source) for target in plan.targets})
    back = {target.spec.name: tiny.fill(target, held) for target in reversed_plan(plan, source, Path()).targets}
    assert tiny.same(back, source.arrays)


@pytest.mark.parametrize(("model", "scan"), BESIDE)
def test_what_stands_beside_a_tree_is_kept_by_the_names_of_the_other_format(model, scan, tmp_path):
    """MaxText asks `_CHECKPOINT_METADATA` whether layers are stacked; what is made of the files again says the same."""
    tree = tmp_path / "tree"
    convert.reformat(hf_of(model, tmp_path / "hf"), tree, to="orbax", scan=scan)
    beside = (tree / "0" / "_CHECKPOINT_METADATA").read_text()
    (tree / "0" / "_CHECKPOINT_METADATA").write_text(beside.replace('"scan_layers"', '"lora": {"rank": 4}, "scan_layers"'))
    convert.save(convert.load(tree, names="hf"), tmp_path / "saved", like=tree, names="hf")
    verdict = convert.verify(tree, tmp_path / "saved", gemm=False)
    assert verdict.equal, str(verdict)
    convert.reformat(tmp_path / "saved", tmp_path / "again", to="hf")
    convert.reformat(tmp_path / "again", tmp_path / "once more", to="orbax", scan=scan)
    assert (tmp_path / "once more" / "0" / "_CHECKPOINT_METADATA").read_text() == beside


def test_a_tensor_that_maxtext_holds_once_is_given_back_twice(tmp_path):
    """The embedding of a block that predicts further tokens; one that is another is not dropped."""
    source = hf_of("deepseek_v32", tmp_path / "hf")
    convert.save(convert.load(source, names="maxtext"), tmp_path / "out", like=source, names="maxtext")
    assert files(tmp_path / "out") == files(source)
    arrays = load_file(source / "model.safetensors")
    arrays["model.layers.3.embed_tokens.weight"].view("u4").flat[0] ^= 1
    save_file(arrays, source / "model.safetensors")
    with pytest.raises(convert.PlanError, match=r"layers\.3\.embed_tokens\.weight .* is not what model\.embed_tokens"):
        convert.load(source, names="maxtext")


def hf_of(model, path):
    found = reader(model)
    return tiny.checkpoint(path, found.arrays, found.config, shards=1, extra=False)


def test_an_orbax_checkpoint_is_saved_as_orbax(tmp_path):
    source = made.make_checkpoint(tmp_path / "a", family="qwen3_moe", format="orbax", train_state=True)
    params = convert.load(source, layout="per-shard", shards=2)
    convert.save(params, tmp_path / "b", like=source, layout="per-shard", shards=2)
    verdict = convert.verify(source, tmp_path / "b", gemm=False)
    assert verdict.equal, str(verdict)
    assert convert.verify(tmp_path / "b").equal
    item = next(tmp_path.glob("b/**/_METADATA")).parent
    restored, original = tiny.restore(item), tiny.restore(next(tmp_path.glob("a/**/_METADATA")).parent)
    assert jax.tree.structure(restored) == jax.tree.structure(original)


def test_trained_values_stand_where_the_old_ones_stood(source, tmp_path):
    params = convert.load(source, layout="concat", sharding=cut)
    params[WI] = jnp.arange(params[WI].size, dtype="f4").reshape(params[WI].shape)
    convert.save(params, tmp_path / "out", like=source, layout="concat")
    found = {name: array for file in (tmp_path / "out").glob("*.safetensors") for name, array in load_file(file).items()}
    gate = np.asarray(params[WI])[3, :, : tiny.N]
    assert np.array_equal(found["model.layers.1.mlp.experts.3.gate_proj.weight"], gate.T)
    old = tiny.load(source)
    changed = {name for name in old if not np.array_equal(old[name], found[name].view("u4"))}
    assert changed == {name for name in old if "layers.1.mlp.experts." in name and "down" not in name}


def test_numpys_and_torchs_arrays_too(source, tmp_path):
    held = {name: np.asarray(array) for name, array in convert.load(source, layout="concat").items()}
    convert.save(held, tmp_path / "out", like=source, layout="concat")
    assert files(tmp_path / "out") == files(source)


def test_names_of_a_function(source, tmp_path):
    def short(name):
        return name.replace("model.layers.", "l")

    params = convert.load(source, layout="concat", names=short)
    convert.save(params, tmp_path / "out", like=source, layout="concat", names=short)
    assert files(tmp_path / "out") == files(source)


def lacking(params):
    return {name: array for name, array in params.items() if name != WI}


REFUSED = {
    "missing": (lacking, convert.PlanError, f"{WI} is not there"),
    "one more": (lambda p: {**p, "x": jnp.ones(2)}, convert.PlanError, r"x \(1 such leaves\) has no place"),
    "another shape": (lambda p: {**p, WI: p[WI][:, :, 1:]}, convert.PlanError, r"is float32 \(12, 6, 7\), and float32"),
    "another type": (lambda p: {**p, WI: p[WI].astype("bfloat16")}, convert.PlanError, "is bfloat16"),
    "no array": (lambda p: {**p, WI: 3}, convert.PlanError, f"{WI} is a int"),
    "no data": (jax.eval_shape, convert.UsageError, "it holds no data"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tree_that_is_not_as_it_was_loaded_is_refused(source, tmp_path, case):
    change, kind, said = REFUSED[case]
    params = convert.load(source, layout="concat")
    params = jax.eval_shape(lambda: params) if case == "no data" else change(params)
    with pytest.raises(kind, match=said):
        convert.save(params, tmp_path / "out", like=source, layout="concat")
    assert not list(tmp_path.iterdir())


def test_an_output_is_not_replaced_unless_asked(source, tmp_path):
    params = convert.load(source)
    convert.save(params, tmp_path / "out", like=source)
    with pytest.raises(convert.OutputError, match="exists already"):
        convert.save(params, tmp_path / "out", like=source)
    convert.save(params, tmp_path / "out", like=source, overwrite=True)
    with pytest.raises(convert.OutputError, match="contain one another"):
        convert.save(params, source, like=source, overwrite=True)


def test_another_tree_after_an_interruption_is_not_mixed_with_it(source, tmp_path):
    params = convert.load(source)

    def stop(done):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.save({name: array * 0 for name, array in params.items()}, tmp_path / "out", like=source, progress=stop)
    convert.save(params, tmp_path / "out", like=source)
    assert files(tmp_path / "out") == files(source)
