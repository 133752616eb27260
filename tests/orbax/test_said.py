"""What was said of an input once, family and layout, and what was asked of an output, is known to every later command."""

import json
from contextlib import closing
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from einops import rearrange
from safetensors.numpy import load_file, save_file

import convert
from convert.cli import main
from convert.errors import InputError, PlanError
from convert.verifier.bits import formats
from convert.verifier.bits.across import formats_of, layers_of
from convert.verifier.bits.exact import compare_experts
from convert.verifier.bits.logical import Scope
from layouts.checkpoint import open_checkpoint
from layouts.orbax.reader import OrbaxReader
from layouts.tables.families import families_of, name_of
from scripts.make_checkpoint import make_checkpoint
from tests.tiny import tree

MANIFEST = "convert_manifest.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("said") / "in", family="qwen3_moe", shard=100_000)


@pytest.fixture(scope="module")
def unknown(source, tmp_path_factory) -> Path:
    """The same model under a name that no table has."""
    return said(source, tmp_path_factory.mktemp("unknown") / "in", model_type="somebodys_moe")


def said(source: Path, out: Path, **words: str) -> Path:
    """A copy whose `config.json` says something else."""
    out.mkdir()
    for file in (file for file in source.iterdir() if file.is_file()):
        (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text()) | words
    (out / "config.json").write_text(json.dumps(config))
    return out


def stored_as(source: Path, out: Path, pattern: str, down: str) -> Path:
    """The same model with the experts of a layer in one tensor each, by NumPy and einops alone."""
    out.mkdir()
    every = {name: array.view("u2") for file in source.glob("*.safetensors") for name, array in load_file(file).items()}
    found = {name: array for name, array in every.items() if ".experts." not in name}
    for layer in sorted({name.partition(".experts.")[0] for name in every if ".experts." in name}):
        w = {
            word: np.stack([every[f"{layer}.experts.{e}.{word}_proj.weight"] for e in range(12)])
            for word in ("gate", "up", "down")
        }
        found[f"{layer}.experts.gate_up_proj"] = rearrange(np.stack([w["gate"], w["up"]]), f"g e n k -> {pattern}")
        found[f"{layer}.experts.down_proj"] = rearrange(w["down"], f"e k n -> {down}")
    tensors = {name: np.ascontiguousarray(array).view(ml_dtypes.bfloat16) for name, array in found.items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    return out


def files(path: Path) -> dict[str, str]:
    return {name: digest for name, digest in tree(path).items() if name != MANIFEST}


def tensors(path: Path) -> dict[str, bytes]:
    return {name: array.tobytes() for file in path.glob("*.safetensors") for name, array in load_file(file).items()}


def wi_of(path: Path) -> np.ndarray:
    with ocp.PyTreeCheckpointer() as checkpointer:
        item = checkpointer.restore(path / "0" / "items")
    return np.asarray(item["params"]["params"]["decoder"]["layers"]["moe_block"]["wi"])


@pytest.mark.parametrize(
    ("words", "pattern", "n"),
    [
        ({"layout": "per-shard", "shards": 4}, "s g n", 128),
        ({"layout": "per-shard", "shards": 5, "align": 8}, "s g n", 8),
        ({"layout": "per-shard", "shards": 5, "align": "maxtext"}, "s g n", 256),
        ({"layout": "interleaved"}, "n g", 40),
        ({"layout": "gmm-ep"}, "g n", 128),
    ],
)
def test_a_layout_of_kernels_is_written_at_once_and_leads_back(source, tmp_path, words, pattern, n):
    convert.prefuse(source, tmp_path / "out", to="orbax", **words)
    shards = words.get("shards", 1)
    every = {name: array for file in source.glob("*.safetensors") for name, array in load_file(file).items()}
    halves = [every[f"model.layers.2.mlp.experts.7.{word}_proj.weight"].view("u2").T for word in ("gate", "up")]
    parts = np.stack(halves).reshape(2, 64, shards, 40 // shards)
    padded = np.pad(parts, [(0, 0), (0, 0), (0, 0), (0, n - parts.shape[-1])])
    wanted = rearrange(padded, f"g k s n -> k ({pattern})" if shards > 1 else f"g k 1 n -> k ({pattern})")
    np.testing.assert_array_equal(wi_of(tmp_path / "out")[7, 2].view("u2"), wanted)
    verdict = convert.verify(source, tmp_path / "out", gemm=False)
    assert verdict.equal, verdict
    with closing(open_checkpoint(source)) as hf, closing(open_checkpoint(tmp_path / "out")) as laid:
        left, right = layers_of(formats_of(hf, laid), Scope())  # what the probes are made from
        assert not compare_experts(left, right, lambda _: None, Scope()).differences
    convert.split(tmp_path / "out", tmp_path / "again", to="hf")
    assert files(tmp_path / "again") == files(source)
    convert.split(tmp_path / "out", tmp_path / "tree")
    convert.reformat(tmp_path / "tree", tmp_path / "last", to="hf")
    assert files(tmp_path / "last") == files(source)


def test_a_tree_that_is_laid_anew_is_verified_against_the_original(source, tmp_path):
    convert.prefuse(source, tmp_path / "tree", to="orbax")
    convert.prefuse(tmp_path / "tree", tmp_path / "laid", layout="per-shard", shards=4)
    convert.prefuse(source, tmp_path / "once", to="orbax", layout="per-shard", shards=4)
    assert convert.verify(source, tmp_path / "laid", gemm=False).equal
    assert convert.verify(tmp_path / "laid", tmp_path / "once", gemm=False).equal
    convert.reformat(tmp_path / "laid", tmp_path / "again", to="hf")
    assert files(tmp_path / "again") == files(source)


def test_per_shard_leads_from_the_tree_to_the_other_format_with_its_shards(source, tmp_path):
    """`--shards` and `--align` were not heard on this way, and there was no plan."""
    convert.prefuse(source, tmp_path / "tree", to="orbax")
    convert.prefuse(tmp_path / "tree", tmp_path / "hf", to="hf", layout="per-shard", shards=4, align=16)
    wi = load_file(next((tmp_path / "hf").glob("*.safetensors")))["model.layers.0.mlp.experts.wi"]
    assert wi.shape == (12, 64, 4 * 2 * 16)
    assert convert.verify(source, tmp_path / "hf", gemm=False).equal


@pytest.mark.parametrize(("at", "word"), [(3, "differs"), (100, "more than zeros behind")])
def test_a_bit_and_what_is_in_the_padding_are_found(source, tmp_path, monkeypatch, at, word):
    convert.prefuse(source, tmp_path / "out", to="orbax", layout="per-shard", shards=4)
    read = OrbaxReader.read

    def changed(self, name, *given):
        found = np.array(read(self, name, *given))
        if name.endswith(".wi"):
            found[..., at] ^= 1
        return found

    monkeypatch.setattr(OrbaxReader, "read", changed)
    verdict = convert.verify(source, tmp_path / "out", gemm=False)
    assert not verdict.equal
    assert word in verdict.levels[0].differences[0]


def test_large_tensors_are_compared_strip_by_strip(source, tmp_path, monkeypatch):
    """Halves of a `wi` were compared whole with a strip of Hugging Face's: a false difference above 64 MiB."""
    monkeypatch.setattr(formats, "_LARGE", 1000)
    convert.prefuse(source, tmp_path / "out", to="orbax")
    convert.prefuse(source, tmp_path / "laid", to="orbax", layout="per-shard", shards=4)
    for name in ("out", "laid"):
        assert convert.verify(source, tmp_path / name, gemm=False).equal


def test_the_family_is_said_once(unknown, tmp_path):
    """To MaxText, fused and not, and back: nobody says it again, and who does is understood."""
    with pytest.raises(PlanError, match="say so with family="):
        convert.plan(unknown, tmp_path / "fused", prefuse=True, to="orbax")
    convert.prefuse(unknown, tmp_path / "fused", to="orbax", family="qwen3_moe")
    convert.split(tmp_path / "fused", tmp_path / "tree")
    convert.prefuse(tmp_path / "tree", tmp_path / "later", family="qwen3_moe", layout="per-shard", shards=4)
    for name in ("fused", "tree", "later"):
        assert convert.verify(unknown, tmp_path / name, gemm=False).equal
        convert.reformat(tmp_path / name, tmp_path / f"{name}-hf", to="hf")
        assert files(tmp_path / f"{name}-hf") == files(unknown)
    assert convert.verify(tmp_path / "fused", tmp_path / "later", gemm=False, family="qwen3_moe").equal
    convert.prefuse(unknown, tmp_path / "hf", family="qwen3_moe")
    assert convert.verify(tmp_path / "hf", tmp_path / "later", gemm=False).equal
    convert.reformat(tmp_path / "hf", tmp_path / "of-hf", to="orbax")
    assert convert.verify(unknown, tmp_path / "of-hf", gemm=False).equal
    (tmp_path / "fused" / MANIFEST).unlink()
    convert.split(tmp_path / "fused", tmp_path / "last", to="hf", family="qwen3_moe")
    with pytest.raises(PlanError, match="made of a checkpoint of family qwen3_moe; do without family='deepseek_v3'"):
        convert.plan(tmp_path / "fused", tmp_path / "x", split=True, family="deepseek_v3")
    assert tensors(tmp_path / "last") == tensors(unknown)


def test_experts_come_back_one_by_one(unknown, tmp_path):
    """Also where the manifest is lost, which has the files that they were in."""
    convert.prefuse(unknown, tmp_path / "fused", family="qwen3_moe")
    assert convert.verify(unknown, tmp_path / "fused", gemm=False).equal
    convert.split(tmp_path / "fused", tmp_path / "again")
    assert files(tmp_path / "again") == files(unknown)
    (tmp_path / "fused" / MANIFEST).unlink()
    convert.split(tmp_path / "fused", tmp_path / "last")
    assert tensors(tmp_path / "last") == tensors(unknown)


LAYOUTS = {
    "fused-out-in": ("e (g n) k", "e k n"),
    "fused-in-out": ("e k (g n)", "e n k"),
    "fused-interleaved": ("e k (n g)", "e n k"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_the_layout_is_said_once(source, tmp_path, layout, to):
    """Shapes and names are no help: llama4 stores the one of these, and the input is another."""
    given = stored_as(source, tmp_path / "in", *LAYOUTS[layout])
    convert.prefuse(given, tmp_path / "fused", to=to, source_layout=layout)
    names = ["fused"]
    if to == "orbax":
        assert convert.verify(source, tmp_path / "fused", gemm=False).equal
        convert.reformat(given, tmp_path / "tree", to="orbax", source_layout=layout)
        names.append("tree")
    for name in names:
        assert convert.verify(given, tmp_path / name, gemm=False).equal
        assert convert.verify(given, tmp_path / name, gemm=False, source_layout=layout).equal
        back = convert.split if name == "fused" else convert.reformat
        for number, words in enumerate(({}, {"source_layout": layout})):
            back(tmp_path / name, tmp_path / f"{name}-{number}", to="hf", **words)
            assert files(tmp_path / f"{name}-{number}").items() >= files(given).items()
    with pytest.raises(PlanError, match="do without source_layout="):
        convert.plan(tmp_path / "fused", tmp_path / "x", split=True, source_layout="projection-first")


def test_what_was_said_stands_before_what_the_table_has(tmp_path):
    """Gate and up in turn have the names and shapes of those side by side; verify believed the table."""
    rng = np.random.default_rng(0)
    shapes = {"gate_up_proj": (4, 8, 12), "down_proj": (4, 6, 8)}
    place = "model.layers.0.feed_forward.experts"
    (tmp_path / "in").mkdir()
    save_file({f"{place}.{n}": rng.standard_normal(s, "f4") for n, s in shapes.items()}, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text('{"model_type": "llama4_text", "num_local_experts": 4}')
    convert.prefuse(tmp_path / "in", tmp_path / "out", source_layout="fused-interleaved")
    for words in ({}, {"source_layout": "fused-interleaved"}):
        assert convert.verify(tmp_path / "in", tmp_path / "out", gemm=False, **words).equal
        assert convert.verify(tmp_path / "out", tmp_path / "in", gemm=False, **words).equal
    convert.prefuse(tmp_path / "in", tmp_path / "other")
    assert convert.verify(tmp_path / "in", tmp_path / "other", gemm=False).equal
    assert not convert.verify(tmp_path / "in", tmp_path / "other", gemm=False, source_layout="fused-interleaved").equal


def test_every_command_that_reads_takes_both(unknown, tmp_path, capsys):
    names, words = [str(unknown), str(tmp_path / "tree")], ["--family", "qwen3_moe", "--source-layout", "per-expert", "--quiet"]
    assert main(["--to", "orbax", *names, *words]) == 0
    assert main(["--prefuse", names[1], str(tmp_path / "fused"), *words]) == 0
    assert main(["--split", str(tmp_path / "fused"), str(tmp_path / "split"), *words]) == 0
    for name in ("tree", "fused", "split"):
        assert main(["--verify", names[0], str(tmp_path / name), "--no-gemm", *words]) == 0
    assert main(["--to", "hf", names[1], str(tmp_path / "again"), *words]) == 0
    assert main(["--verify", names[0], str(tmp_path / "again"), "--no-gemm", *words]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("origin", [1, {"family": "maxtext"}, {"family": ["x"]}, {"layout": "../x"}, {"layout": {}}])
def test_a_record_that_no_table_knows_is_damaged(source, tmp_path, origin):
    convert.reformat(source, tmp_path / "tree", to="orbax")
    for file in (tmp_path / "tree").rglob("*"):
        if file.is_file() and b'"moe_layout"' in (text := file.read_bytes()):
            document = json.loads(text)
            for holder in (document, document.get("custom_metadata")):
                if isinstance(holder, dict) and "moe_layout" in holder:
                    holder["moe_layout"]["hf"] = origin
            file.write_text(json.dumps(document))
    (tmp_path / "tree" / MANIFEST).unlink()
    for words in ({"prefuse": True}, {"to": "hf"}):
        with pytest.raises(InputError, match="damaged: hf is"):
            convert.plan(tmp_path / "tree", tmp_path / "x", **words)


def test_every_layout_of_every_family_has_a_name():
    assert all(name_of(native, family) for family in families_of("hf") for native in family.native)


def stacked(source, out, key, turned=False):
    """The experts of each projection in one tensor, as MLX and Tunix have them, under a key of their own."""
    found = {n: a for file in source.glob("*.safetensors") for n, a in load_file(file).items()}
    experts = {}
    for name in sorted((n for n in found if ".experts." in n), key=lambda n: int(n.split(".")[5])):
        array, words = found.pop(name), name.split(".")
        experts.setdefault(key.format(words[2], words[6]), []).append(array.T if turned else array)
    out.mkdir()
    found |= {name: np.ascontiguousarray(np.stack(each)) for name, each in experts.items()}
    save_file(found, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    return out


def test_what_mlx_has_beside_the_experts_has_a_place_in_the_tree(source, tmp_path):
    given = stacked(source, tmp_path / "in", "model.layers.{}.mlp.switch_mlp.{}.weight")
    convert.prefuse(given, tmp_path / "tree", to="orbax")
    assert convert.verify(given, tmp_path / "tree", gemm=False).equal
    convert.split(tmp_path / "tree", tmp_path / "again", to="hf")
    first, second = (load_file(next(path.glob("*.safetensors"))) for path in (given, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(array.tobytes() == second[name].tobytes() for name, array in first.items())


def test_a_layout_with_a_place_of_its_own_goes_there_in_two_steps(source, tmp_path):
    given = stacked(source, tmp_path / "in", "model.layers.{}.mlp.{}", turned=True)
    with pytest.raises(PlanError, match=r"mlp.*is a place of its own.*within the format first"):
        convert.prefuse(given, tmp_path / "tree", to="orbax", source_layout="tunix")
    convert.prefuse(given, tmp_path / "fused", source_layout="tunix")
    convert.reformat(tmp_path / "fused", tmp_path / "tree", to="orbax")
    assert convert.verify(source, tmp_path / "tree", gemm=False).equal
