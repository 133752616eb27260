"""One digest for one model in every layout and format; another for whatever differs in a bit, a name, a type or a shape."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import xxhash
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import convert
from convert.cli import main
from convert.commit.manifest import seal_of
from convert.content import content_of
from convert.errors import InputError, PlanError
from convert.options import Choices, Verification
from convert.planning.planner import make_plan
from convert.verifier.content.sides import contents
from convert.verifier.stand import _content
from layouts.checkpoint import open_checkpoint
from layouts.windows import Windows
from scripts.make_checkpoint import make_checkpoint
from tests.layouts.test_companions import BLOCKS, FP8, FP8_PARTS, checkpoint
from tests.layouts.test_kinds import config as kinds
from tests.layouts.test_kinds import published
from tests.layouts.test_mixed import idle
from tests.tiny import HF, MemoryReader, cut, memory, restore, run, store_again

E, K, N, LAYERS = 4, 8, 4, 3
ROOT = Path(__file__).parents[2]
LAYOUTS = {"per-shard": 4, "fused-moe": 1}
CODES = {"bfloat16": "BF16", "float32": "F32", "float16": "F16"}


def of(path: Path, **options) -> str:
    return convert.digest(path, **options).model.sha256


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("content")
    sizes = {"experts": E, "embed": K, "mlp": N, "layers": LAYERS}
    make_checkpoint(root / "in", family="qwen3_moe", values="random", **sizes)
    for scan in (True, False):
        convert.reformat(root / "in", root / f"tree {scan}", to="orbax", scan=scan)
    return root


def by_hand(path: Path) -> tuple[str, str]:
    """The rule of README once more, without any code of the tool."""
    lines, fast = [], []
    for file in path.glob("*.safetensors"):
        for name, array in load_file(file).items():
            parts = name.split(".")
            if "experts" in parts:
                word = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}[parts[-2]]
                name = [["model.layers", int(parts[2])], int(parts[5]), word, ""]
            for found, digest in ((lines, hashlib.sha256), (fast, xxhash.xxh3_128)):
                what = [name, CODES[array.dtype.name], list(array.shape), digest(array.tobytes()).hexdigest()]
                found.append(json.dumps(what, separators=(",", ":")))
    texts = [
        "".join(f"{line}\n" for line in [form, *sorted(found)]).encode()
        for form, found in (("moe-content-1", lines), ("moe-content-xxh3-1", fast))
    ]
    return hashlib.sha256(texts[0]).hexdigest(), xxhash.xxh3_128_hexdigest(texts[1])


def test_it_is_what_readme_says(root, capsys):
    wanted, fast = by_hand(root / "in")
    assert of(root / "in") == wanted
    assert main(["--digest", str(root / "in"), "--quiet"]) == 0
    assert capsys.readouterr().out == f"sha256:{wanted}  {root / 'in'}\nxxh3:{fast}  {root / 'in'}\n"
    assert main(["--digest", str(root / "in"), "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)["result"]["digests"][str(root / "in")]
    tensors = {name: array for file in (root / "in").glob("*.safetensors") for name, array in load_file(file).items()}
    model = {"sha256": wanted, "xxh3": fast, "tensors": len(tensors), "bytes": sum(array.nbytes for array in tensors.values())}
    assert found == {"model": model, "state": None, "terms": "the names and axes of Hugging Face"}


class Reader:
    """A checkpoint in memory with all that reading asks for."""

    def __init__(self, inner):
        self.inner, self.windows = inner, Windows()

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def unit(self, name):
        return None

    def extent(self, name):
        return None


def in_memory(reader) -> str:
    return contents(Reader(reader), options=Verification())[0].model.sha256


@pytest.mark.parametrize(
    "family", [f for f in HF if f.name != "hunyuan" and f.kinds == 1], ids=lambda f: f.name
)  # einops has no -g
def test_every_family_has_one_digest_in_all_layouts(family):
    versions = {"transformers_version": f"{family.changed_in - 1}.0"} if family.changed_in else {}
    reader = memory(family, e=3, n=128, layers=(1,))
    reader.config |= versions
    wanted, same = in_memory(reader), []
    for layout, shards in LAYOUTS.items():
        with suppress(PlanError):  # that is the layout it is in
            same.append(in_memory(run(reader, "prefuse", layout=layout, shards=shards)) == wanted)
    assert all(same)
    assert len(same) >= len(LAYOUTS) - 1


def test_both_kinds_of_experts_belong_to_it():
    source = MemoryReader(published(widths=(4, 4)), config=kinds())
    fused = run(source, "prefuse")
    assert in_memory(fused) == in_memory(source)
    plan, back = make_plan(source, Path("out"), "prefuse"), make_plan(fused, Path("out"), "split")
    digest = contents(Reader(source), options=Verification())[0].model.xxh3
    assert made_anyway(source, fused, plan) == made_anyway(fused, source, back) == digest
    text, images = (f"model.layers.1.mlp.{word}.experts.wi" for word in ("text_moe", "vision_moe"))
    fused.arrays[text], fused.arrays[images] = fused.arrays[images], fused.arrays[text]
    assert in_memory(fused) != in_memory(source)


def test_rows_of_experts_that_are_the_identity_belong_to_it():
    source, other = idle(4), idle(4)
    wanted = in_memory(source)
    assert in_memory(run(source, "prefuse")) == wanted
    name = "model.layers.11.mlp.experts.gate_up_proj"
    other.arrays[name] = other.arrays[name].copy()
    other.arrays[name][-1, 0, 0] += 1
    assert in_memory(other) != wanted


@pytest.mark.parametrize("words", [{"to": "hf"}, {"to": "hf", "split": True}, {"to": "hf", "prefuse": True}], ids=str)
def test_between_formats_conversions_make_no_such_digests(root, words):
    plan = convert.plan(root / "tree True", "out", **words)
    assert content_of(plan, {target.spec.name: "0" for target in plan.targets}) is None


def made_anyway(reader, other, plan) -> str | None:
    """The digest that a conversion has of those that it makes anyway, which are of what it reads and of what it writes."""
    sources = {f"source:{name}": xxhash.xxh3_128_hexdigest(array.tobytes()) for name, array in reader.arrays.items()}
    written = {name: xxhash.xxh3_128_hexdigest(array.tobytes()) for name, array in other.arrays.items()}
    found = content_of(plan, sources | written)
    return found and found["model"]["xxh3"]


@pytest.mark.parametrize("family", [f for f in HF if f.name != "hunyuan" and f.kinds == 1], ids=lambda family: family.name)
def test_conversions_have_it_of_digests_that_they_make_anyway(family):
    """Both ways, or not at all: of experts that nobody stores one by one, there is none."""
    reader = memory(family, e=3, n=128, layers=(1,))
    reader.config |= {"transformers_version": f"{family.changed_in - 1}.0"} if family.changed_in else {}
    plan = make_plan(reader, Path("out"), "prefuse", Choices(layout="per-shard", shards=2))
    fused = run(reader, "prefuse", layout="per-shard", shards=2)
    back = made_anyway(fused, reader, make_plan(fused, Path("out"), "split"))
    stored = family.native[0]
    apart = ("{e}" in stored["wi"].key, stored["wi"].pattern, stored["wo"].pattern) == (True, "n k", "k n")
    wanted = contents(Reader(reader), options=Verification())[0].model.xxh3 if apart else None
    assert (made_anyway(reader, fused, plan), back) == (wanted, wanted)


@pytest.mark.parametrize("layout", ["concat", "transformers", "per-shard", "vllm", "lane"])
def test_scales_belong_to_it(layout):
    reader = checkpoint(FP8_PARTS, FP8, config=BLOCKS)
    choices = {"layout": layout, **({"shards": 2} if layout == "per-shard" else {})}
    fused = run(reader, "prefuse", **choices)
    fused.tensors = {t.spec.name: t.spec for t in make_plan(reader, Path("out"), "prefuse", Choices(**choices)).targets}
    assert in_memory(fused) == in_memory(reader)
    plan = make_plan(reader, Path("out"), "prefuse", Choices(**choices))
    assert made_anyway(reader, fused, plan) in (contents(Reader(reader), options=Verification())[0].model.xxh3, None)
    scale = next(name for name in reader.arrays if name.endswith("scale_inv"))
    reader.arrays[scale] = reader.arrays[scale] ^ 1
    assert in_memory(fused) != in_memory(reader)


TREES = {
    "scanned": {},
    "unscanned": {"scan": False},
    "axis 0": {"scan_axis": 0},
    "fused": {"layout": "concat"},
    "per-shard": {"layout": "per-shard", "shards": 2},
}


@pytest.mark.parametrize("name", TREES)
def test_a_maxtext_tree_has_that_of_hugging_face(root, name):
    out, choices = root / name, TREES[name]
    call = convert.prefuse if "layout" in choices else convert.reformat
    call(root / "in", out, to="orbax", **choices)
    assert of(out) == of(root / "in")
    (out / "config.json").unlink()
    found = convert.digest(out)
    assert found.model.sha256 != of(root / "in")
    assert found.terms == "the tree's own names and axes"


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("word", ["num_hidden_layers", "num_experts"])
@pytest.mark.parametrize("count", [2, 10**9])
def test_what_config_json_says_is_compared_before_it_is_counted(root, tmp_path, scan, word, count):
    """Or a small file would make us list a billion names."""
    shutil.copytree(root / f"tree {scan}", tmp_path / "tree")
    config = json.loads((tmp_path / "tree" / "config.json").read_text())
    (tmp_path / "tree" / "config.json").write_text(json.dumps(config | {word: count}))
    with suppress(InputError, PlanError):
        assert convert.digest(tmp_path / "tree").terms == "the tree's own names and axes"


def test_chunks_across_all_layers_and_little_memory_change_nothing(root):
    convert.reformat(root / "in", root / "chunks", to="orbax")
    with closing(open_checkpoint(root / "chunks")) as reader:
        item = reader.item
    store_again(item, cut(2, 2))
    assert of(root / "chunks", memory="100MiB") == of(root / "in")


def test_two_trees_that_say_nothing_are_told_by_their_own_names(root, tmp_path):
    """A tree with moments: fused and split are one model and one state."""
    rng = np.random.default_rng(0)
    sizes = {"wi_0": (E, LAYERS, K, N), "wi_1": (E, LAYERS, K, N), "wo": (E, LAYERS, N, K)}
    block = {name: jax.numpy.asarray(rng.standard_normal(shape), "float32") for name, shape in sizes.items()}
    weights = {"params": {"decoder": {"layers": {"moe_block": block}, "norm": jax.numpy.ones(K)}}}
    tree = {"params": weights, "opt_state": {"mu": weights, "nu": weights}, "step": 5}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "tree", args=ocp.args.PyTreeSave(tree))
    convert.prefuse(tmp_path / "tree", tmp_path / "fused", content=True)
    one, other = convert.digest(tmp_path / "tree"), convert.digest(tmp_path / "fused")
    assert one.model == other.model
    assert one.model.tensors == 3 * (3 * E * LAYERS + 1) + 1
    assert "config.json: not there" in one.told(tmp_path)
    for verdict in (
        convert.verify(tmp_path / "tree", tmp_path / "fused", content=True, self_test=True, gemm=False),
        convert.verify(tmp_path / "fused", content=True),
    ):
        assert next(level for level in verdict.levels if level.name == "content").state == "equal"
        assert verdict.outcome == "EQUAL"


def test_training_state_has_a_digest_of_its_own(root, tmp_path):
    convert.reformat(root / "in", tmp_path / "bare", to="orbax")
    with closing(open_checkpoint(tmp_path / "bare")) as reader:
        restored = restore(reader.item)
    tree = {**restored, "opt_state": {"mu": jax.tree.map(np.asarray, restored["params"])}, "step": 5}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "tree", args=ocp.args.PyTreeSave(tree))
    shutil.copy(root / "in" / "config.json", tmp_path / "tree")
    convert.prefuse(tmp_path / "tree", tmp_path / "fused")
    found = [convert.digest(tmp_path / name) for name in ("tree", "fused")]
    assert [each.model.sha256 for each in found] == [of(root / "in")] * 2
    assert found[0].state == found[1].state
    assert found[0].state is not None
    verdict = convert.verify(tmp_path / "tree", tmp_path / "fused", content=True, self_test=True, gemm=False)
    assert verdict.self_test[0].seen == ("exact", "content")
    assert verdict.equal
    assert "training state" in found[0].told(tmp_path / "tree")


def gate_and_up(t):
    one, other = (f"model.layers.1.mlp.experts.2.{word}_proj.weight" for word in ("gate", "up"))
    t[one], t[other] = t[other], t[one]


def experts(t):
    one, other = (f"model.layers.1.mlp.experts.{e}.gate_proj.weight" for e in (0, 1))
    t[one], t[other] = t[other], t[one]


def layers(t):
    one, other = (f"model.layers.{number}.mlp.gate.weight" for number in (0, 1))
    t[one], t[other] = t[other], t[one]


def a_type(t):
    t["model.norm.weight"] = t["model.norm.weight"].view("f2")


def a_shape(t):
    t["lm_head.weight"] = t["lm_head.weight"].reshape(t["lm_head.weight"].shape[::-1])


def a_name(t):
    t["model.other.weight"] = t.pop("lm_head.weight")


def one_more(t):
    t["model.empty"] = np.zeros((0, 3), "f4")


def a_look_alike(t):
    """A tensor that is called as the list calls a slice of an expert."""
    t['["model.layers",1],2,"gate",""'] = t["model.norm.weight"]


@pytest.mark.parametrize("change", [gate_and_up, experts, layers, a_type, a_shape, a_name, one_more, a_look_alike])
def test_whatever_is_changed_changes_it(root, tmp_path, change):
    shutil.copytree(root / "in", tmp_path / "changed")
    tensors = {name: array for file in (root / "in").glob("*.safetensors") for name, array in load_file(file).items()}
    change(tensors)
    for file in (tmp_path / "changed").glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, tmp_path / "changed" / "model.safetensors")
    assert of(tmp_path / "changed") != of(root / "in")


def test_any_bit_of_any_tensor_changes_it(root, tmp_path):
    """Also through a fused layout, at the first and the last byte of each tensor."""
    convert.prefuse(root / "in", tmp_path / "fused", layout="per-shard", shards=2)
    seen = {of(tmp_path / "fused")}
    with closing(open_checkpoint(tmp_path / "fused")) as reader:
        places = {name: (reader.extent(name).start, spec.nbytes, reader.where(name)) for name, spec in reader.tensors.items()}
    count = 0
    for name, (offset, nbytes, shard) in places.items():
        with (tmp_path / "fused" / shard).open("r+b") as file:
            file.seek(offset)
            first = file.read(1)
            file.seek(offset)
            file.write(bytes([first[0] ^ 1]))
            file.flush()
            seen.add(of(tmp_path / "fused"))
            file.seek(offset)
            file.write(first)
        count += bool(nbytes) and bool(name)
    assert len(seen) == 1 + count
    assert of(tmp_path / "fused") == of(root / "in")


def test_damaged_padding_has_none(root, tmp_path):
    convert.prefuse(root / "in", tmp_path / "fused", layout="per-shard", shards=2)
    file = next(f for f in (tmp_path / "fused").glob("*.safetensors") if any(n.endswith(".wi") for n in load_file(f)))
    tensors = load_file(file)
    wi = next(name for name in tensors if name.endswith(".wi"))
    tensors[wi] = tensors[wi].copy()
    tensors[wi][..., -1] = 1
    with safe_open(file, "np") as before:
        save_file(tensors, file, before.metadata())
    with pytest.raises(InputError, match=r"expert 0, gate and up: there is more than zeros .*; it is damaged"):
        convert.digest(tmp_path / "fused")


def test_usage(capsys):
    assert main(["--digest"]) == 2
    assert main(["--digest", "/nowhere", "--quiet"]) == 3
    assert main(["--digest", "a", "--report", "r.html"]) == 2
    assert capsys.readouterr().err.count("\n") == 3


MADE = {
    "prefuse": lambda a, b: convert.prefuse(a, b, layout="per-shard", shards=2, content=True),
    "to orbax": lambda a, b: convert.reformat(a, b, to="orbax", content=True),
}


@pytest.mark.parametrize("way", MADE)
def test_a_manifest_that_has_it_proves_the_output_alone(root, tmp_path, way, capsys):
    out = tmp_path / "out"
    told = str(MADE[way](root / "in", out))
    held = json.loads((out / "convert_manifest.json").read_text())["content"]
    assert held == convert.digest(root / "in").to_dict()
    assert f"content  sha256:{held['model']['sha256']}" in told
    assert MADE[way](root / "in", out).proof  # once more: nothing to do
    assert main(["--verify", str(out), "--quiet"]) == 0
    assert "content   not run    (--content compares" in capsys.readouterr().out
    assert main(["--verify", str(out), "--quiet", "--content"]) == 0
    assert re.search("content   equal", capsys.readouterr().out)


def test_only_digests_that_both_have_are_named(root, tmp_path):
    """A conversion makes xxh3 anyway: then nothing is said of sha256, which was compared with nothing."""
    convert.prefuse(root / "in", tmp_path / "out", layout="vllm")
    alone = convert.verify(tmp_path / "out")
    assert alone.equal
    assert "content   not run    (--content compares" in str(alone)  # what was not looked at is said
    assert "--content compares" in alone.to_dict()["not_run"]["content"]
    level = next(level for level in convert.verify(tmp_path / "out", content=True).levels if level.name == "content")
    assert level.state == "equal"
    assert f"xxh3:{convert.digest(root / 'in').model.xxh3}" in level.covered
    assert "sha256" not in level.covered
    held = {"model": {"xxh3": "0", "tensors": 3}, "state": None, "terms": "t"}
    assert _content(held, {**held, "model": {"sha256": "0"}}).state == "not run"


def test_a_manifest_with_another_content_is_a_difference(root, tmp_path, capsys):
    """A bit that was flipped before the digests of the output were made: only the content of the input can tell."""
    convert.prefuse(root / "in", tmp_path / "out", content=True)
    text = json.loads((tmp_path / "out" / "convert_manifest.json").read_text())
    text["content"]["model"]["sha256"] = "0" * 64
    (tmp_path / "out" / "convert_manifest.json").write_text(json.dumps({**text, "xxh3_128": seal_of(text)}))
    assert main(["--verify", str(tmp_path / "out"), "--quiet", "--content"]) == 1
    out = capsys.readouterr().out
    assert "content   DIFFERENT" in out
    assert "manifest  equal" in out
    with pytest.raises(convert.OutputError, match="has another content digest than content=True gives now, or none"):
        convert.prefuse(root / "in", tmp_path / "out", content=True)


@pytest.mark.parametrize("action", [convert.prefuse, pytest.param(convert.split, marks=pytest.mark.slow)])
def test_a_digest_that_was_made_anyway_is_not_believed(root, tmp_path, action, capsys):
    source, out = root / "in", tmp_path / "out"
    if action is convert.split:
        convert.prefuse(root / "in", source := tmp_path / "fused")
    action(source, out)
    text = json.loads((out / "convert_manifest.json").read_text())
    assert action(source, out).to_dict()["content_xxh3"] == text["content"]["model"]["xxh3"]
    text["content"]["model"]["xxh3"] = "0" * 32
    (out / "convert_manifest.json").write_text(json.dumps({**text, "xxh3_128": seal_of(text)}))
    assert main(["--verify", str(out), "--quiet", "--content"]) == 1
    assert "the digest of the model is xxh3:" in capsys.readouterr().out
    with pytest.raises(convert.OutputError, match="its manifest has another content digest"):
        action(source, out)


@pytest.mark.parametrize("content", [[], {}, {"model": {"sha256": 3}, "state": None, "terms": "t"}, "sha256"])
def test_a_manifest_whose_content_is_none_is_refused(root, tmp_path, content):
    convert.prefuse(root / "in", tmp_path / "out")
    text = json.loads((tmp_path / "out" / "convert_manifest.json").read_text())
    (tmp_path / "out" / "convert_manifest.json").write_text(json.dumps({**text, "content": content}))
    with pytest.raises(InputError, match="not a manifest of this version"):
        convert.verify(tmp_path / "out")


CHILD = """
import sys, convert
print(convert.digest(sys.argv[1], memory=int(sys.argv[2])).model.sha256)
assert "jax" not in sys.modules
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_too_little_memory_is_said(root, tmp_path, capsys):
    convert.prefuse(root / "in", tmp_path / "out")
    assert main(["--digest", str(tmp_path / "out"), "--memory", "97MiB", "--quiet"]) == 2
    assert "--memory=97MiB is too little: to hash the largest slice" in capsys.readouterr().err
    verdict = convert.verify(root / "in", tmp_path / "out", content=True, gemm=False, memory="97MiB")
    assert verdict.outcome == "INCOMPLETE"
    assert "too little" in str(verdict)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["concat", "transformers", "tree"])
def test_memory_is_bounded_whatever_the_size(tmp_path, layout):
    make_checkpoint(tmp_path / "in", family="qwen3_moe", experts=3, embed=2048, mlp=8192, layers=2, vocab=40_000)
    if layout == "tree":
        convert.reformat(tmp_path / "in", tmp_path / "out", to="orbax")
    else:
        convert.prefuse(tmp_path / "in", tmp_path / "out", layout=layout)
    memory = 256 << 20
    found = []
    for path in (tmp_path / "in", tmp_path / "out"):
        command = [sys.executable, "-c", CHILD, str(path), str(memory)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        digest, peak = done.stdout.split()
        assert int(peak) < memory
        found.append(digest)
    assert found[0] == found[1]
