"""What is said of an input or an output that it does not apply to is an error, not dropped in silence; with exact words."""

import json

import pytest

from convert.cli import main
from convert.errors import did_you_mean
from scripts.make_checkpoint import make_checkpoint
from tests.adapters.tiny import adapter, whole

IN_CONCAT = "none of its experts is in layout 'concat'; they are as family {family} keeps them. Do without --source-layout"
IN_VAIN = {
    "--prefuse hf out --scan-axis 0": (2, "--scan-axis is for MaxText trees; this is hf to hf"),
    "--prefuse hf out --no-scan": (2, "--no-scan is for the way to Orbax (--to=orbax); this is hf to hf"),
    "--prefuse orbax out --no-scan": (2, "--no-scan is for the way to Orbax (--to=orbax); this is orbax to orbax"),
    "--to orbax hf out --params-only": (2, "--params-only is for the way to Hugging Face (--to=hf); this is hf to orbax"),
    "--prefuse hf out --drop-optimizer": (2, "--drop-optimizer is for an Orbax input; this is hf to hf"),
    "--prefuse hf out --keep-chunks": (2, "--keep-chunks is for Orbax to Orbax; this is hf to hf"),
    "--prefuse hf out --align 64": (2, "layout 'concat' pads no shards; --align is for --layout=per-shard or --layout=lane"),
    "--prefuse orbax out --max-shard-size 1MB": (2, "--max-shard-size is for safetensors, and out will be Orbax"),
    "--to orbax hf out --max-shard-size 1MB": (2, "--max-shard-size is for safetensors, and out will be Orbax"),
    "--prefuse hf out --source-layout concat": (4, IN_CONCAT.format(family="qwen3_moe")),
    "--to orbax hf out --source-layout concat": (4, IN_CONCAT.format(family="qwen3_moe")),
    "--prefuse orbax out --source-layout concat": (4, IN_CONCAT.format(family="maxtext")),
    "--verify hf hf --no-gemm --source-layout-b concat": (4, IN_CONCAT.format(family="qwen3_moe")),
    "--verify hf hf --no-gemm --source-layout concat": (4, IN_CONCAT.format(family="qwen3_moe")),
    "--verify hf orbax --no-gemm --source-layout concat": (4, IN_CONCAT.format(family="maxtext")),
    "--verify hf made --no-gemm --source-layout vllm": (4, "neither that nor what it was made of is 'vllm'"),
    "--verify hf made --no-gemm --source-layout nope": (2, "no layout is called 'nope'; known: concat"),
    "--verify hf made --no-gemm --source-layout-b nope": (2, "no layout is called 'nope'; known: concat"),
    "--verify hf made --no-gemm --family mixtral": (4, "made: its record says that it is of family 'qwen3_moe'"),
    "--verify hf made --no-gemm --scan-axis 0": (2, "--scan-axis is for MaxText trees, and none is one of hf, made"),
    "--verify hf made --dry-run --scan-axis 0": (2, "--scan-axis is for MaxText trees, and none is one of hf, made"),
    "--verify made --source-layout vllm": (4, "neither that nor what it was made of is 'vllm'"),
    "--verify made --family mixtral": (4, "made: its record says that it is of family 'qwen3_moe'"),
    "--verify made --scan-axis 0": (2, "--scan-axis is for MaxText trees"),
    "--verify adapter adapter --scan-axis 0": (2, "--scan-axis is for checkpoints; adapters are compared as a whole"),
    "--verify adapter adapter --source-layout vllm": (2, "--source-layout is for checkpoints"),
    "--verify adapter adapter --family-b olmoe": (2, "--family-b is for checkpoints"),
    "--digest hf --source-layout concat": (4, IN_CONCAT.format(family="qwen3_moe")),
    "--digest hf orbax --source-layout vllm": (4, "orbax: none of its experts is in layout 'vllm'"),
    "--digest hf hf --scan-axis 1": (2, "--scan-axis is for MaxText trees"),
    "--digest adapter --source-layout vllm": (2, "--source-layout is for checkpoints, and adapter is an adapter"),
    "--inspect hf --scan-axis 0": (2, "--scan-axis is for MaxText trees, and hf is none"),
    "--inspect adapter --source-layout vllm": (2, "--source-layout is for checkpoints, and adapter is an adapter"),
    "--inspect made --family mixtral": (4, "made: its record says that it is of family 'qwen3_moe'"),
    "--prefuse made out --family mixtral": (4, "made: its record says that it is of family 'qwen3_moe'"),
    "--prefuse hf a.txt/out": (
        2,
        "a.txt/out: {here}/a.txt is no directory, so nothing can be made in it; choose another output",
    ),
    "--prefuse hf a.txt/b/out --dry-run": (2, "{here}/a.txt is no directory, so nothing can be made in it"),
    "--to orbax hf a.txt/out": (2, "{here}/a.txt is no directory, so nothing can be made in it"),
    "--prefuse hf out --memory 1": (2, "--memory=1 is too little: one worker and the plan need"),
    "--verify hf hf --memory 1": (2, "--memory=1 is too little: to compare the smallest part of an expert of model.layers.0."),
    "--to maxtext hf out": (2, "'maxtext' is none of hf, orbax (did you mean orbax?)"),
    "--prefuse hf out --to HF": (2, "(did you mean hf?)"),
    "--prefuse hf out --dequantize bfloat16": (2, "(did you mean bf16?)"),
    "--prefuse hf out --layout hf": (2, "no layout is called 'hf' (did you mean transformers?)"),
    "--prefuse hf out --layout CONCAT": (2, "no layout is called 'CONCAT' (did you mean concat?)"),
    "--verify hf hf --backend megablocks": (2, "no backend is called 'megablocks' (did you mean megablox?)"),
}
"""Commands -> the exit code, and what is said."""
APPLIES = (
    "--prefuse hf out --source-layout per-expert",
    "--prefuse orbax out --scan-axis 1",
    "--prefuse hf out --layout per-shard --shards 2 --align 64",
    "--prefuse hf out --layout lane --align 128",
    "--prefuse orbax out --keep-chunks",
)
OF_ONE = (
    "--verify hf made --no-gemm --source-layout concat",
    "--verify hf made --no-gemm --family qwen3_moe",
    "--verify made --source-layout per-expert",
    "--digest hf made --source-layout concat",
    "--digest hf hf made --source-layout concat",
    "--digest hf orbax --scan-axis 1",
    "--inspect orbax --scan-axis 1",
)
"""What is said of all sides at once and is true of one of them."""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    path = tmp_path_factory.mktemp("in")
    make_checkpoint(path / "hf", family="qwen3_moe", experts=2, layers=1)
    make_checkpoint(path / "orbax", family="qwen3_moe", format="orbax", experts=2, layers=1)
    assert main(["--prefuse", str(path / "hf"), str(path / "made"), "--quiet"]) == 0
    adapter(path / "adapter", whole("per-expert"))
    (path / "a.txt").touch()
    return path


@pytest.mark.parametrize("command", IN_VAIN)
def test_what_is_said_in_vain_is_an_error(command, here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    code, words = IN_VAIN[command]
    try:
        found = main([*command.split(), "--quiet"])
    except SystemExit as stopped:
        found = stopped.code
    told = " ".join(capsys.readouterr().err.split())
    assert (found, words.format(here=here) in told) == (code, True), told
    assert {path.name for path in here.iterdir()} == {"hf", "orbax", "made", "adapter", "a.txt"}


@pytest.mark.parametrize("command", OF_ONE)
def test_what_is_true_of_one_side_is_taken(command, here, monkeypatch):
    monkeypatch.chdir(here)
    assert main([*command.split(), "--quiet"]) == 0


@pytest.mark.parametrize("command", APPLIES)
def test_what_applies_is_taken(command, here, monkeypatch):
    monkeypatch.chdir(here)
    assert main([*command.split(), "--quiet", "--dry-run"]) == 0


@pytest.mark.parametrize("said", [7, "much", -1, {"a": 1}])
def test_an_index_that_states_another_size_is_a_line_of_the_plan(said, tmp_path, capsys):
    make_checkpoint(tmp_path / "in", family="qwen3_moe", experts=2, layers=1, shard=20_000)
    index = tmp_path / "in" / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    sound = found["metadata"]["total_size"]
    for size in (said, sound):
        index.write_text(json.dumps(found | {"metadata": {"total_size": size}}))
        assert main(["--prefuse", str(index.parent), str(tmp_path / "out"), "--dry-run", "--quiet"]) == 0
        told = " ".join(capsys.readouterr().out.split())
        assert (f"states total_size {size}, and its tensors have {sound} bytes" in told) == (size != sound), told


def test_a_word_of_others_is_known_only_where_there_is_what_it_means():
    assert did_you_mean("maxtext", ("hf", "orbax")) == " (did you mean orbax?)"
    assert did_you_mean("MaxText", ("concat", "vllm")) == " (did you mean concat?)"
    assert not did_you_mean("maxtext", ("qwen3_moe", "olmoe"))
