"""One model in any two layouts, of one format or of two, is the same; what is not the same is named, whatever its layout."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from einops import rearrange
from safetensors.numpy import load_file, save_file

import convert
from convert.cli import main
from convert.errors import PlanError, UsageError
from layouts.hf import HFReader
from layouts.orbax.reader import OrbaxReader
from scripts.make_checkpoint import make_checkpoint

E, K, N, LAYERS = 4, 32, 48, 3
SIZES = {"experts": E, "embed": K, "mlp": N, "layers": LAYERS}
PADDED = {"layout": "per-shard", "shards": 3, "align": 10}
HF = {
    "per-expert": None,
    "concat": {"layout": "concat"},
    "transformers": {"layout": "transformers"},
    "flashinfer": {"layout": "flashinfer"},
    "interleaved": {"layout": "interleaved"},
    "fused-moe": {"layout": "fused-moe"},
    "per-shard": PADDED,
}
TREES = {
    "split": None,
    "concat": {},
    "layers first": {"scan_axis": 0},
    "unscanned": {"scan": False},
    "interleaved": {"layout": "interleaved"},
    "gmm-ep": {"layout": "gmm-ep", "scan": False},
    "per-shard": PADDED,
}


@pytest.fixture(scope="module", params=["qwen3_moe", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def root(request, tmp_path_factory) -> Path:
    """The same model in every layout of both formats."""
    root = tmp_path_factory.mktemp(request.param)
    make_checkpoint(root / "hf per-expert", family=request.param, values="normal", **SIZES)
    for name, words in HF.items():
        if words:
            convert.prefuse(root / "hf per-expert", root / f"hf {name}", **words)
    for name, words in TREES.items():
        make = convert.reformat if words is None else convert.prefuse
        make(root / "hf per-expert", root / f"tree {name}", to="orbax", **(words or {}))
    return root


def test_every_layout_of_the_one_format_is_compared_with_every_layout_of_the_other(root):
    for hf in HF:
        for tree in TREES:
            verdict = convert.verify(root / f"hf {hf}", root / f"tree {tree}", gemm=False)
            assert verdict.equal, verdict
            assert f"of {LAYERS - (root.name.startswith('deepseek'))} MoE layers, {E} of {E} experts" in verdict.counts
            assert verdict.counts.endswith(", 0 skipped")


WI = {HFReader: r"\.mlp\.experts\.(.*gate_proj|gate_up_proj|wi|w13)", OrbaxReader: r"(moe_block|MoeBlock_0)\.wi"}


@pytest.mark.parametrize("side", WI)
def test_one_bit_of_any_layout_is_found_across_formats(root, monkeypatch, side):
    """In gate or up; both tensors are named."""
    read = side.read

    def changed(self, tensor, *given):
        found = np.array(read(self, tensor, *given))
        if re.search(WI[side], tensor) and "shared" not in tensor:
            found.reshape(-1)[0] ^= 1
        return found

    monkeypatch.setattr(side, "read", changed)
    for hf, tree in zip(HF, TREES, strict=True):
        verdict = convert.verify(root / f"hf {hf}", root / f"tree {tree}", gemm=False)
        assert [level.name for level in verdict.levels if level.differences] == ["exact"], verdict
        assert " differs from params.params.decoder." in verdict.levels[0].differences[0]


@pytest.mark.slow
def test_grouped_gemms_run_a_fused_layout_against_another_across_formats(root):
    if root.name.startswith("qwen3"):
        verdict = convert.verify(root / "hf transformers", root / "tree per-shard")
        assert verdict.equal, verdict
        (level,) = (level for level in verdict.levels if level.name == "gemm")
        assert "'e (g n) k' against 'e l k (s=3 g n%10)'" in level.covered


def bare(source: Path, out: Path, key: str, pattern: str, down: str) -> Path:
    """The same model as somebody else stores it, who leaves no record, by NumPy and einops alone."""
    out.mkdir()
    every = {name: array.view("u2") for file in source.glob("*.safetensors") for name, array in load_file(file).items()}
    found = {name: array for name, array in every.items() if ".experts." not in name}
    for layer in sorted({name.partition(".experts.")[0] for name in every if ".experts." in name}):
        halves, wo = (
            np.stack([[every[f"{layer}.experts.{e}.{w}_proj.weight"] for e in range(E)] for w in words])
            for words in (("gate", "up"), ("down",))
        )
        wi = rearrange(halves, "g e (s n) k -> s g e n k", s=3) if "s" in pattern else halves
        found[f"{layer}.experts.{key}"] = rearrange(wi, f"{'s ' if 's' in pattern else ''}g e n k -> {pattern}")
        found[f"{layer}.experts.{'wo' if key == 'wi' else 'down_proj'}"] = rearrange(wo[0], f"e k n -> {down}")
    tensors = {name: np.ascontiguousarray(array).view(ml_dtypes.bfloat16) for name, array in found.items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    return out


def forget(tree: Path) -> Path:
    """A tree as MaxText writes it: without our record and manifest."""
    for file in tree.rglob("*"):
        if file.is_file() and b'"moe_layout"' in (text := file.read_bytes()):
            document = json.loads(text)
            for holder in (document, document.get("custom_metadata")):
                if isinstance(holder, dict):
                    holder.pop("moe_layout", None)
            file.write_text(json.dumps(document))
    (tree / "convert_manifest.json").unlink()
    return tree


BARE = {
    "concat": ("wi", "e k (g n)", "e n k"),
    "per-shard:3:8": ("wi", "e k (s g n)", "e n k"),
    "fused-out-in": ("gate_up_proj", "e (g n) k", "e k n"),
    "fused-in-out": ("gate_up_proj", "e k (g n)", "e n k"),
    "fused-interleaved": ("gate_up_proj", "e k (n g)", "e n k"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("plain")
    make_checkpoint(root / "in", family="qwen3_moe", **SIZES)
    for name, words in BARE.items():
        bare(root / "in", root / name, *words)
    for name, words in (("concat", {}), ("per-shard", PADDED)):
        convert.prefuse(root / "in", root / f"tree {name}", to="orbax", **words)
        forget(root / f"tree {name}")
    return root


@pytest.mark.parametrize("layout", BARE)
@pytest.mark.parametrize("tree", ["concat", "per-shard:3:10"])
def test_the_layout_of_either_side_is_said_where_no_record_says_it(plain, layout, tree):
    hf, other = plain / layout, plain / f"tree {tree.partition(':')[0]}"
    verdict = convert.verify(hf, other, gemm=False, source_layout=layout, source_layout_b=tree)
    assert verdict.equal, verdict
    assert convert.verify(other, hf, gemm=False, source_layout=tree, source_layout_b=layout).equal
    alike = convert.verify(hf, plain / "in", gemm=False, source_layout=layout, source_layout_b="per-expert")
    assert [level.state for level in alike.levels[:2]] == ["equal", "equal"]  # of files it has few
    if layout == tree:
        assert convert.verify(hf, other, gemm=False, source_layout=layout).equal


def test_what_is_said_of_one_side_is_not_believed_where_it_is_wrong(plain):
    wrong = convert.verify(
        plain / "fused-in-out", plain / "tree concat", gemm=False, source_layout="fused-interleaved", source_layout_b="concat"
    )
    assert [level.name for level in wrong.levels if level.differences] == ["exact"]
    for words, kind, told in (
        ({"source_layout_b": "nonsense"}, UsageError, "no layout is called 'nonsense'"),
        ({"source_layout": "nonsense", "source_layout_b": "concat"}, UsageError, "no layout is called 'nonsense'"),
        ({}, PlanError, "nothing says in which layout"),
    ):
        with pytest.raises(kind, match=told):
            convert.verify(plain / "in", plain / "tree concat", gemm=False, **words)


@pytest.mark.parametrize("other", ["in", "tree"])
def test_what_is_said_of_a_side_alone_has_to_agree_with_its_record(plain, tmp_path, other):
    for name, words in (("hf", {}), ("tree", {"to": "orbax"})):
        convert.prefuse(plain / "in", tmp_path / name, **words)
    one = plain / "in" if other == "in" else tmp_path / "tree"
    for side in (tmp_path / "hf", tmp_path / "tree"):
        assert convert.verify(one, side, gemm=False, source_layout_b="concat").equal
        with pytest.raises(PlanError, match="do without source_layout="):
            convert.verify(one, side, gemm=False, source_layout_b="interleaved")


def test_families_of_either_side_are_said_on_the_command_line(plain, tmp_path, capsys):
    for name, where in (("a", "in"), ("b", "concat")):
        (tmp_path / name).mkdir()
        for file in (file for file in (plain / where).iterdir() if file.is_file()):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        config = json.loads((plain / "in" / "config.json").read_text()) | {"model_type": f"somebodys_{name}"}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    call = ["--verify", str(tmp_path / "a"), str(tmp_path / "b"), "--no-gemm", "--quiet"]
    assert (
        main([*call, "--family", "qwen3_moe", "--source-layout-b", "concat", "--family-b", "olmoe"]) == 1
    )  # files: model_type
    text = capsys.readouterr().out
    assert text.count(" equal ") == 2
    assert "config.json: model_type" in text
    assert main(call) == 4  # names tell the family of the one, those of the other have two readings
    assert "somebodys_b" in capsys.readouterr().err


def test_a_tree_can_be_called_by_its_own_family(plain, tmp_path):
    convert.reformat(plain / "in", tmp_path / "tree", to="orbax", scan_axis=0)
    sides = plain / "in", forget(tmp_path / "tree")
    assert convert.verify(*sides, gemm=False, scan_axis=0).equal
    for words in ({"family_b": "maxtext-axis-0"}, {"family": "maxtext-axis-0"}):
        assert convert.verify(*sides, gemm=False, **words).equal
    with pytest.raises(PlanError, match="nobodys"):
        convert.verify(*sides, gemm=False, family_b="nobodys")


NORM, Q = (f"model.layers.1.{word}.weight" for word in ("input_layernorm", "self_attn.q_proj"))


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        (NORM, lambda array: array.view(np.float16), f"{NORM} is F16, and params.params.decoder.layers."),
        (NORM, lambda array: array[:-1], f"{NORM} differs from params.params.decoder.layers."),
        (NORM, lambda array: array[None], f"{NORM} has the shape (1, {K}), which is not of the form 'k'"),
        (Q, lambda array: array[:-1], f"{Q} has the shape "),
        (NORM, None, f"{NORM} is not in "),
    ],
)
def test_what_is_of_another_type_or_shape_is_found_across_formats(plain, tmp_path, name, change, told):
    """The same bits in another type are another model: formats were compared by their bits alone."""
    tensors = {n: array for file in (plain / "in").glob("*.safetensors") for n, array in load_file(file).items()}
    array = tensors.pop(name)
    if change:
        tensors[name] = np.ascontiguousarray(change(array))
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    (tmp_path / "in" / "config.json").write_bytes((plain / "in" / "config.json").read_bytes())
    verdict = convert.verify(tmp_path / "in", plain / "tree concat", gemm=False, source_layout="concat")
    (level,) = (level for level in verdict.levels if level.differences)
    assert level.name == "others"
    assert level.differences[0].startswith(told)


def test_experts_of_another_type_are_found_across_formats(plain, tmp_path):
    tensors = {n: array for file in (plain / "in").glob("*.safetensors") for n, array in load_file(file).items()}
    changed = {n: array.view(np.float16) if ".layers.1.mlp.experts." in n else array for n, array in tensors.items()}
    (tmp_path / "in").mkdir()
    save_file(changed, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    (tmp_path / "in" / "config.json").write_bytes((plain / "in" / "config.json").read_bytes())
    verdict = convert.verify(tmp_path / "in", plain / "tree concat", gemm=False, source_layout="concat")
    told = f"layer 1: wi is F16 with (E, K, N) {E, K, N} in one, BF16 {E, K, N} in the other"
    assert [(level.name, level.differences) for level in verdict.levels if level.differences] == [("exact", (told,))]


def test_what_is_too_much_in_a_tree_is_found(plain, tmp_path):
    """Its layers and experts were counted by `config.json` of the other side, so nobody looked at one more."""
    for name, sizes in (("layers", {"layers": LAYERS + 1}), ("experts", {"experts": E + 1})):
        for scan in (True, False):
            make_checkpoint(tmp_path / f"{name}{scan}", family="qwen3_moe", **SIZES | sizes)
            out = tmp_path / f"tree {name}{scan}"
            convert.prefuse(tmp_path / f"{name}{scan}", out, to="orbax", scan=scan)
            verdict = convert.verify(plain / "in", out, gemm=False)
            found = "\n".join(line for level in verdict.levels[:2] for line in level.differences)
            if name == "experts":
                assert f"wi is BF16 with (E, K, N) {E, K, N} in one, BF16 {E + 1, K, N} in the other" in found
            else:
                assert f"model.layers.{LAYERS}" in found or f"decoder.layers_{LAYERS}.moe_block.wi is only in" in found
                assert f"has {LAYERS + 1} layers (l), and config.json says {LAYERS}" in found or not scan
