"""Mixtral, whose queries MaxText has over the root of the head width, and Gemma 4, whose embedding it has times another root.

By the user's word, named, by MaxText's rule, and back to the original bytes.
"""

import json
import math
import os
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import xxhash
from safetensors.numpy import load_file, save_file

import convert
from convert.answers.after import next_steps
from convert.cli import main
from convert.commit.manifest import NAME, SEAL, seal_of
from convert.errors import InputError, OutputError, PlanError
from layouts.checkpoint import open_checkpoint
from layouts.side_files import ORIGINALS
from tests.planning.models import D, H, K, reader

Q = "model.layers.1.self_attn.q_proj.weight"
KERNEL = "params.params.decoder.layers.self_attention.query.kernel"
FOLDER = ORIGINALS.partition("/")[0]
LAYERS = 3
TYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}


def save(where: Path, code: str = "BF16", model: str = "mixtral", odd_in: str = Q) -> Path:
    """Every value of a byte's worth of mantissas among the queries, and what does not scale: zeros, infinities, subnormals."""
    dtype, arrays = np.dtype(TYPES[code]), reader(model).arrays
    rng = np.random.default_rng(1)
    odd = np.array([0, -0.0, np.inf, -np.inf, 1, -3, np.finfo(np.float32).tiny], np.float32)
    where.mkdir()
    found = {name: rng.standard_normal(array.shape, np.float32).astype(dtype) for name, array in arrays.items()}
    with np.errstate(all="ignore"):
        found[odd_in].reshape(-1)[: odd.size] = odd.astype(dtype)
    save_file(found, where / "model.safetensors")
    (where / "config.json").write_text(json.dumps(reader(model).config))
    return where


def by_maxtext(array: np.ndarray, *, back: bool = False) -> np.ndarray:
    """`scale_query_layer` of MaxText 0.2.5 `param_mapping.py`, for heads of width D."""
    factor = np.dtype("float32").type(np.sqrt(D) if back else 1 / np.sqrt(D))
    with np.errstate(all="ignore"):
        return (array * factor).astype(array.dtype)


def reseal(where: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest, and its digest of itself with it."""
    found = json.loads((where / NAME).read_text())
    change(found)
    (where / NAME).write_text(json.dumps(found | {SEAL: seal_of(found)}))


def files(where: Path) -> dict[str, bytes]:
    return {name: (where / name).read_bytes() for name in ("config.json", "model.safetensors")}


def queries(where: Path) -> np.ndarray:
    with closing(open_checkpoint(where)) as tree:
        spec = tree.tensors[KERNEL]
        return tree.read(KERNEL, (slice(None),) * len(spec.shape)).view(TYPES[spec.dtype])


@pytest.mark.parametrize("code", ["BF16", "F32", pytest.param("F16", marks=pytest.mark.slow)])
def test_queries_are_those_of_maxtext_there_and_back(code, tmp_path):
    source = save(tmp_path / "in", code)
    report = convert.prefuse(source, tmp_path / "tree", to="orbax", compute="query-scale")
    words = f"convert --verify {source} {tmp_path / 'tree'}"  # run below, as the card's commands are
    assert next_steps(report, {"compute": "query-scale"})["verify"] in (words, f"{words} --no-gemm")
    card = (tmp_path / "tree" / "README.md").read_text()
    assert "`convert --split --to hf --compute query-scale OUT BACK`" in card
    assert "`convert --verify IN OUT` compares all bits, computed ones with the originals or by their rule" in card
    hf, found = load_file(source / "model.safetensors"), queries(tmp_path / "tree")
    for layer in range(LAYERS):
        wanted = by_maxtext(hf[f"model.layers.{layer}.self_attn.q_proj.weight"]).T.reshape(K, H, D)
        assert np.array_equal(found[:, layer].view(np.uint8), np.ascontiguousarray(wanted).view(np.uint8))
    report = convert.split(tmp_path / "tree", tmp_path / "again", to="hf", compute="query-scale")
    assert "values are not computed back" in report.plan.remarks[-1]
    assert files(tmp_path / "again") == files(source)
    verdict = convert.verify(source, tmp_path / "tree", gemm=False)
    assert verdict.equal
    assert "(query-scale) were compared by that rule, and with the originals that the tree keeps" in str(verdict)
    assert convert.verify(tmp_path / "tree").equal


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("axis", [None, pytest.param(0, marks=pytest.mark.slow)])
def test_gemma_goes_there_and_back(scan, axis, tmp_path):
    name = "model.language_model.embed_tokens.weight"
    source = save(tmp_path / "in", "BF16", "gemma4", name)
    with pytest.raises(PlanError, match="the embedding times the root of the embed width in this model"):
        convert.prefuse(source, tmp_path / "tree", to="orbax")
    convert.prefuse(source, tmp_path / "tree", to="orbax", scan=scan, scan_axis=axis, compute="embedding-scale")
    with closing(open_checkpoint(tmp_path / "tree")) as tree:
        found = tree.read("params.params.token_embedder.embedding", (slice(None), slice(None)))
    embedding = load_file(source / "model.safetensors")[name]
    with np.errstate(all="ignore"):  # `pad_hf_embedding_layer` of MaxText 0.2.5 `param_mapping.py`
        wanted = (embedding * np.dtype("float32").type(K**0.5)).astype(embedding.dtype)
    assert np.array_equal(found, wanted.view(found.dtype))
    assert convert.verify(source, tmp_path / "tree", gemm=False).equal
    convert.split(tmp_path / "tree", tmp_path / "again", to="hf", compute="embedding-scale")
    assert files(tmp_path / "again") == files(source)


@pytest.mark.parametrize("code", ["BF16", *(pytest.param(code, marks=pytest.mark.slow) for code in ("F16", "F32"))])
def test_without_originals_queries_are_computed_back(code, tmp_path):
    source, tree = save(tmp_path / "in", code), tmp_path / "tree"
    convert.prefuse(source, tree, to="orbax", compute="query-scale")
    hf = load_file(source / "model.safetensors")
    (tree / ORIGINALS).unlink()
    report = convert.split(tree, tmp_path / "again", to="hf", compute="query-scale")
    assert f"values are computed back, and bits may not come back: no originals are kept ({ORIGINALS})" in report.plan.remarks
    assert report.notes[0] == "values are computed, so the tensors are in 1 new ones"
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == hf.keys()
    for name, array in hf.items():
        wanted = by_maxtext(by_maxtext(array), back=True) if name.endswith("q_proj.weight") else array
        assert again[name].tobytes() == wanted.tobytes(), name
    for one in (source, tmp_path / "again"):
        verdict = convert.verify(one, tree, gemm=False)
        assert "(query-scale) were compared by that rule, which makes one of some neighbours" in str(verdict)
        assert {level.name: level.differences for level in verdict.levels}["others"] == ()
    assert f"{ORIGINALS} is missing" in str(convert.verify(tree))


def test_a_trained_tree_is_computed_back(tmp_path):
    """What is kept is no longer the original of what the tree holds."""
    source = save(tmp_path / "in")
    convert.prefuse(source, tmp_path / "tree", to="orbax", compute="query-scale")
    params = convert.load(tmp_path / "tree")
    attention = params["params"]["params"]["decoder"]["layers"]["self_attention"]["query"]
    attention["kernel"] = np.array(attention["kernel"])
    attention["kernel"][0, 1, 0, 0] += 1
    convert.save(params, tmp_path / "tuned", like=tmp_path / "tree")
    report = convert.split(tmp_path / "tuned", tmp_path / "again", to="hf", compute="query-scale")
    assert f"{KERNEL} is not what the rule makes of its original in {ORIGINALS}" in report.plan.remarks[-1]
    assert "times" in str(report.plan.computed)
    verdict = convert.verify(tmp_path / "again", tmp_path / "tuned", gemm=False)
    assert {level.name: level.differences for level in verdict.levels}["others"] == ()


def neighbour(source: Path) -> Path:
    """Change one query so that MaxText has the same of it."""
    arrays = load_file(source / "model.safetensors")
    other = (arrays[Q].view(np.uint16) ^ 1).view(arrays[Q].dtype)
    at = tuple(np.argwhere(by_maxtext(arrays[Q]) == by_maxtext(other))[-1])
    arrays[Q][at] = other[at]
    save_file(arrays, source / "model.safetensors")
    return source


def test_what_is_kept_is_compared_bit_for_bit(tmp_path):
    source, tree = save(tmp_path / "in"), tmp_path / "tree"
    convert.prefuse(source, tree, to="orbax", compute="query-scale")
    neighbour(source)
    verdict = convert.verify(source, tree, gemm=False)
    assert f"{Q} differs" in str(verdict)
    with pytest.raises(OutputError, match=f"was made from another input: {re.escape(KERNEL)} differs"):
        convert.prefuse(source, tree, to="orbax", compute="query-scale")


def test_a_changed_original_is_noticed(tmp_path):
    tree = tmp_path / "tree"
    convert.prefuse(save(tmp_path / "in"), tree, to="orbax", compute="query-scale")
    data = bytearray((tree / ORIGINALS).read_bytes())
    data[-1] ^= 1
    (tree / ORIGINALS).write_bytes(data)
    assert f"{ORIGINALS}: {KERNEL}" in str(convert.verify(tree))
    with pytest.raises(InputError, match="is not what was written; restore the file, or remove it"):
        convert.split(tree, tmp_path / "again", to="hf", compute="query-scale")
    save_file({KERNEL: np.zeros(3, np.float32)}, tree / ORIGINALS)
    with pytest.raises(InputError, match="and the tree has no such tensor"):
        convert.split(tree, tmp_path / "again", to="hf", compute="query-scale")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(("written", "said"), [(True, "is not what was written"), (False, "1 of 3 with the originals")])
def test_bit_for_bit_is_said_of_originals_that_were_looked_at(written, said, tmp_path):
    """One array's original is another number, which the rule does not make into what the tree has: it proves nothing."""
    source, tree = save(tmp_path / "in"), tmp_path / "tree"
    convert.prefuse(source, tree, to="orbax", scan=False, compute="query-scale")
    originals = load_file(tree / ORIGINALS)
    for name in sorted(originals)[1:]:
        originals[name].view(np.uint16)[-1, -1, -1] ^= 1 << 14
    save_file(originals, tree / ORIGINALS)
    if not written:
        (tree / "convert_manifest.json").unlink()
    verdict = convert.verify(source, tree, gemm=False)
    assert verdict.equal is not written
    assert said in str(verdict)
    assert "keeps, bit for bit" not in str(verdict)


def test_an_interrupted_run_goes_on(tmp_path):
    source = save(tmp_path / "in")
    convert.prefuse(source, tmp_path / "whole", to="orbax", compute="query-scale")
    seen = 0

    def stop(nbytes: int) -> None:
        nonlocal seen
        seen += nbytes
        if seen > queries(tmp_path / "whole").nbytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.prefuse(source, tmp_path / "tree", to="orbax", compute="query-scale", progress=stop)
    assert not (tmp_path / "tree").exists()
    (kept,) = tmp_path.glob(f"tree.partial-*/new/{ORIGINALS}")
    os.utime(kept, (1, 1))
    assert convert.prefuse(source, tmp_path / "tree", to="orbax", compute="query-scale").resumed == 0, "none of the tree's"
    assert (tmp_path / "tree" / ORIGINALS).stat().st_mtime == 1
    assert (tmp_path / "tree" / ORIGINALS).read_bytes() == (tmp_path / "whole" / ORIGINALS).read_bytes()
    assert convert.verify(tmp_path / "tree").equal


@pytest.mark.parametrize("name", [ORIGINALS, f"{FOLDER}/model.safetensors", FOLDER])
def test_nothing_else_has_a_place_where_originals_are_kept(name, tmp_path):
    source = save(tmp_path / "in")
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_bytes(b"")
    with pytest.raises(PlanError, match=f"{name}: no place for it, because a tree keeps its own originals in {FOLDER}/"):
        convert.prefuse(source, tmp_path / "tree", to="orbax", compute="query-scale", copy_all=True)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_lies_beside_originals_is_not_opened(tmp_path):
    source, tree = save(tmp_path / "in"), tmp_path / "tree"
    convert.prefuse(source, tree, to="orbax", compute="query-scale")
    for name in ("config.json", "model.safetensors.index.json", "convert_manifest.json", "model.safetensors"):
        (tree / FOLDER / name).write_bytes(b"[]")
    convert.split(tree, tmp_path / "again", to="hf", compute="query-scale")
    assert files(tmp_path / "again") == files(source)
    assert convert.verify(source, tree, gemm=False).equal


@pytest.mark.parametrize("resealed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_originals_that_hold_another_tensor_are_refused(resealed, tmp_path):
    """It would be taken in the place of the tree's, and nothing would say so."""
    source, tree, other = save(tmp_path / "in"), tmp_path / "tree", KERNEL.replace("query", "key")
    convert.prefuse(source, tree, to="orbax", compute="query-scale")
    with closing(open_checkpoint(tree)) as reader:
        spec = reader.tensors[other]
    zeros = np.zeros(spec.shape, TYPES[spec.dtype])
    save_file(load_file(tree / ORIGINALS) | {other: zeros}, tree / ORIGINALS)
    if resealed:
        digest = xxhash.xxh3_128_hexdigest(zeros.tobytes())
        entry = {"dtype": spec.dtype, "shape": list(spec.shape), "xxh3_128": digest}
        size = {"size": (tree / ORIGINALS).stat().st_size}
        reseal(tree, lambda found: (found["originals"].update({other: entry}), found["files"].update({ORIGINALS: size})))
    words = rf"{ORIGINALS}: it holds {re.escape(other)}, which is not computed"
    for back in (convert.split, lambda *args, to, compute: convert.load(tree, names=to, layout="native", compute=compute)):
        with pytest.raises(InputError, match=words):
            back(tree, tmp_path / "again", to="hf", compute="query-scale")
    assert not (tmp_path / "again").exists()


def test_originals_that_are_gone_are_not_said_to_be_equal(tmp_path):
    tree = tmp_path / "tree"
    convert.prefuse(save(tmp_path / "in"), tree, to="orbax", compute="query-scale")
    assert "and 1 original of computed ones, xxh3-128" in str(convert.verify(tree))
    (tree / ORIGINALS).unlink()
    reseal(tree, lambda found: found["files"].pop(ORIGINALS))
    digests = {level.name: level for level in convert.verify(tree).levels}["digests"]
    assert digests.differences == (f"{ORIGINALS} is missing, and the manifest has digests of it",)
    assert "computed" not in digests.covered
    assert digests.compared == len(json.loads((tree / NAME).read_text())["tensors"])
    save_file({}, tree / ORIGINALS)
    report = convert.split(tree, tmp_path / "again", to="hf", compute="query-scale")
    assert f"may not come back: {ORIGINALS} has no original of {KERNEL}" in report.plan.remarks[-1]


def test_it_needs_the_word_and_is_named(tmp_path, capsys):
    source, out = save(tmp_path / "in"), tmp_path / "tree"
    assert main(["--prefuse", str(source), str(out), "--to", "orbax", "--quiet"]) == 4
    said = capsys.readouterr().err
    assert "would change values; with --compute=query-scale" in said
    assert not out.exists()
    assert main(["--prefuse", str(source), str(out), "--to", "orbax", "--compute", "query-scale", "--dry-run"]) == 0
    said, rule = capsys.readouterr().out, f"query-scale: times {1 / math.sqrt(D):.9g} in float32"
    assert f"computed, not only moved: {rule}" in said
    assert "model.layers.{l}.self_attn.q_proj.weight  x3" in said
    assert f"kept in {ORIGINALS} for the way back: 1 tensors" in said
    convert.prefuse(source, out, to="orbax", compute="query-scale")
    manifest = json.loads((out / "convert_manifest.json").read_text())
    assert manifest["computed"].startswith(rule)
    assert manifest["record"]["hf"]["computed"] == "query-scale"
    assert manifest["originals"].keys() == {KERNEL}
    assert manifest["files"][ORIGINALS] == {"size": (out / ORIGINALS).stat().st_size}
    with pytest.raises(PlanError, match="compute='query-scale'"):
        convert.split(out, tmp_path / "again", to="hf")
    assert "nothing to do" in str(convert.prefuse(source, out, to="orbax", compute="query-scale"))


@pytest.mark.parametrize(("scan", "axis"), [(True, 0), (False, None)])
def test_other_forms_hold_the_same(scan, axis, tmp_path):
    source = save(tmp_path / "in")
    convert.reformat(source, tmp_path / "tree", to="orbax", scan=scan, scan_axis=axis, compute="query-scale")
    convert.prefuse(tmp_path / "tree", tmp_path / "fused")
    assert convert.verify(source, tmp_path / "fused", gemm=False).equal
    assert convert.verify(tmp_path / "fused").equal
    convert.split(tmp_path / "fused", tmp_path / "again", to="hf", compute="query-scale")
    assert files(tmp_path / "again") == files(source)


def test_a_wrong_query_is_found(tmp_path):
    source, out = save(tmp_path / "in", "F32"), tmp_path / "tree"
    convert.prefuse(source, out, to="orbax", compute="query-scale")
    arrays = load_file(source / "model.safetensors")
    arrays[Q].view("u4")[-1, -1] ^= 1 << 3
    save_file(arrays, source / "model.safetensors")
    verdict = convert.verify(source, out, gemm=False)
    assert not verdict.equal
    assert f"{Q} differs" in str(verdict)


def test_a_type_that_is_not_computed_is_refused(tmp_path):
    source = save(tmp_path / "in")
    arrays = load_file(source / "model.safetensors")
    arrays[Q] = arrays[Q].astype(np.float64)
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        arrays[name] = arrays[name].astype(np.float64)
    save_file(arrays, source / "model.safetensors")
    with pytest.raises(PlanError, match="is F64; query-scale is computed of BF16, F16, F32"):
        convert.prefuse(source, tmp_path / "tree", to="orbax", compute="query-scale")


def test_orbax_restores_the_tree_as_if_nothing_lay_beside_it(tmp_path):
    tree = tmp_path / "tree"
    convert.prefuse(save(tmp_path / "in", "F32"), tree, to="orbax", compute="query-scale")
    with ocp.CheckpointManager(tree, item_names=("items",), item_handlers={"items": ocp.PyTreeCheckpointHandler()}) as manager:
        assert manager.all_steps() == [0]
        found = manager.restore(0)["items"]
    kernel = np.asarray(found["params"]["params"]["decoder"]["layers"]["self_attention"]["query"]["kernel"])
    assert kernel.tobytes() == queries(tree).tobytes()
