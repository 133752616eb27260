"""`--inspect` says what a checkpoint is and what could be done with it; its word is what the actions then do."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import convert
from convert.cli import main
from layouts.hf import HFReader
from scripts.make_checkpoint import make_checkpoint
from tests.adapters.tiny import adapter, whole
from tests.tiny import tree

L, E, K, N = 3, 12, 64, 40


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("inspect")
    for kind in ("hf", "orbax"):
        make_checkpoint(root / kind, family="qwen3_moe", format=kind, experts=E, embed=K, mlp=N, layers=L)
        convert.prefuse(root / kind, root / f"{kind}-fused")
    make_checkpoint(root / "mixtral", family="mixtral", experts=E, embed=K, mlp=N, layers=L)
    convert.prefuse(root / "hf", root / "padded", layout="per-shard", shards=4)
    convert.reformat(root / "hf", root / "maxtext", to="orbax")
    return root


WANTED = {
    "hf": ("hf", "qwen3_moe", "model_type 'qwen3_moe' in config.json", "per-expert", ()),
    "mixtral": ("hf", "mixtral", "model_type 'mixtral' in config.json", "per-expert-w123", ()),
    "hf-fused": ("hf", "qwen3_moe", "the record of this tool", "concat", ("config.json", "convert_manifest.json", "1 header")),
    "padded": (
        "hf",
        "qwen3_moe",
        "the record of this tool",
        "per-shard",
        ("config.json", "convert_manifest.json", "1 header"),
    ),
    "orbax": ("orbax", "maxtext", "the structure of the tree", "maxtext", ()),
    "orbax-fused": ("orbax", "maxtext", "the record of this tool", "concat", ("convert_manifest.json",)),
}


@pytest.mark.parametrize("name", WANTED)
def test_it_says_what_is_there(places, name):
    found = convert.inspect(places / name)
    assert (found.format, found.family, found.told_by, found.layout, found.recorded) == WANTED[name]
    assert [(each.layers, each.experts, each.embed, each.mlp, each.dtype) for each in found.blocks] == [(L, E, K, N, "BF16")]
    assert found.problem is None
    assert found.nbytes == sum(found.dtypes.values())
    assert found.quantisation is None


@pytest.mark.parametrize("name", [*WANTED, "maxtext"])
@pytest.mark.parametrize("action", ["prefuse", "split"])
def test_what_it_says_of_an_action_is_what_the_action_does(places, name, action, tmp_path):
    said = getattr(convert.inspect(places / name), action)
    try:
        report = getattr(convert, action)(places / name, tmp_path / "out")
    except convert.PlanError as problem:
        refused = str(problem).removeprefix(f"{places / name}: ")
    else:
        refused = said
        plan = report.plan
        experts = sum(target.role in ("wi", "wo") for target in plan.targets)
        assert said.startswith(f"writes {'layout concat' if action == 'prefuse' else 'gate and up apart, as they were'}: ")
        assert f": {experts} expert tensors, {len(plan.targets) - experts} others copied, " in said
    assert said == refused


def test_it_reads_headers_only_and_touches_nothing(places, monkeypatch):
    before = tree(places / "hf")
    monkeypatch.setattr(HFReader, "read", None)
    monkeypatch.setattr(HFReader, "extent", None)
    assert convert.inspect(places / "hf").blocks
    assert tree(places / "hf") == before


@pytest.mark.parametrize("name", WANTED)
def test_people_read_it_in_100_columns(places, name, capsys, monkeypatch):
    monkeypatch.chdir(places)
    assert main(["--inspect", name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 for line in lines)
    words = [line.split(" ")[0] for line in lines if line[0] != " "]
    usual = ["checkpoint", "format", "tensors", "family", "layout", "experts", "quantised", "complete", "beside"]
    assert words[: len(usual) + 2] == [*usual, "--prefuse", "--split"]
    assert f"L={L} layers, E={E}, K={K}, N={N}, BF16" in "\n".join(lines)
    assert f"'{convert.inspect(name).blocks[0].axes}'" in "\n".join(lines), "axes stay in one line"


def test_kinds_of_blocks_are_apart_and_scales_are_named(tmp_path):
    """Two layers of 2 experts, of which those of the second one are larger, with scales."""
    made = {}
    for layer, mlp in ((0, 8), (1, 16)):
        for expert in (0, 1):
            for word, shape in (("gate_proj", (mlp, 4)), ("up_proj", (mlp, 4)), ("down_proj", (4, mlp))):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{word}.weight"
                made[name] = np.ones(shape, np.float32)
                made[f"{name}_scale_inv"] = np.ones((1, 1), np.float32)
    save_file(made, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe", "quantization_config": {"quant_method": "fp8"}}')
    found = convert.inspect(tmp_path)
    assert found.problem is None
    assert [(each.layers, each.embed, each.mlp, each.companions) for each in found.blocks] == [
        (1, 4, 8, ("scale_inv",)),
        (1, 4, 16, ("scale_inv",)),
    ]
    assert found.quantisation == "fp8 (config.json), experts with scale_inv"


def test_where_experts_cannot_be_told_the_rest_is_said(tmp_path, capsys):
    save_file({"model.layers.0.mlp.gate_proj.weight": np.ones((4, 4), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    assert main(["--inspect", str(tmp_path)]) == 4
    printed = capsys.readouterr()
    assert "tensors      1, 64 B: F32 64 B" in printed.out
    assert "family       not told" in printed.out
    assert "a dense model has nothing to fuse" in printed.err
    assert main(["--inspect", str(tmp_path), "--json"]) == 4
    told = json.loads(capsys.readouterr().out)
    assert told["exit_code"] == told["result"]["problem"]["exit_code"] == 4


def test_what_the_user_says_counts(places, tmp_path):
    named = convert.inspect(places / "hf", family="qwen3_moe", source_layout="per-expert")
    assert (named.told_by, named.recorded) == ("--family", ("--source-layout",))
    with pytest.raises(convert.UsageError, match="zigzag"):
        convert.inspect(places / "hf", source_layout="zigzag")


def test_an_adapter_says_what_could_be_done_with_it(tmp_path):
    adapter(tmp_path / "in", whole("per-expert"))
    found = convert.inspect(tmp_path / "in")
    assert found.format == "adapter"
    assert found.prefuse == f"writes form packed (this is form per-expert), {found.prefuse.rpartition(', ')[2]}"
    assert found.split.startswith("cannot: ") or "nothing to" in found.split


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--inspect"], "--inspect takes one checkpoint; found 0 paths"),
        (["--inspect", "a", "b"], "--inspect takes one checkpoint; found 2 paths"),
        (["--inspect", "a", "--layout", "concat"], "--layout is for --prefuse, not for --inspect"),
        (["inspect", "a"], "did you mean: convert --inspect a"),
    ],
)
def test_wrong_words(words, said, capsys):
    assert main(words) == 2
    assert said in capsys.readouterr().err


PARTS = {
    "weight_scale": ((N, K // 16), np.uint8),
    "weight_scale_2": ((), np.float32),
    "weight_zero_point": ((N, K // 32), np.int32),
}


@pytest.mark.parametrize("word", ["weight", "weight_packed"])
def test_packed_weights_are_blocks_and_their_companions_are_none(word, tmp_path):
    arrays = {}
    for layer, e, g in np.ndindex(L, 2, 3):
        at = f"model.layers.{layer}.mlp.experts.{e}.{('gate_proj', 'up_proj', 'down_proj')[g]}"
        shape = (K, N // 2) if g == 2 else (N, K // 2)
        arrays[f"{at}.{word}"] = np.zeros(shape, np.uint8)
        arrays |= {f"{at}.{part}": np.zeros(sizes, kind) for part, (sizes, kind) in PARTS.items()}
    save_file(arrays, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "hidden_size": K}))
    (blocks,) = convert.inspect(tmp_path).blocks
    assert (blocks.layers, blocks.experts, blocks.packed) == (L, 2, True)
    assert {"scale", "scale_2", "zero_point"} <= set(blocks.companions)
