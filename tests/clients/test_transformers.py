"""The client that matters most: what we prefuse, transformers loads, and it computes the same logits.

The models are tiny and made by transformers itself, one for each model_type of our table; nothing here shares a line with it.
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import convert
from layouts.errors import ConvertError, PlanError
from layouts.tables.families import FAMILIES, NOT_GATED

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from huggingface_hub.errors import StrictDataclassError  # noqa: E402

from tests.clients import tiny_models  # noqa: E402

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("default")]

TYPES = [kind for family in FAMILIES if family.format == "hf" for kind in family.model_types]
CASES = [kind for kind in (*TYPES, *tiny_models.EXTRA) if kind not in (*tiny_models.SKIPPED, *tiny_models.ALIASES)]
IDS = torch.arange(34).reshape(2, 17) * 7 % 160


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A tiny model on disk, as it is published (`original`) and as transformers holds it (`held`)."""

    case: str
    kind: type
    original: Path
    held: Path
    experts: list[tuple[str, dict[str, np.ndarray]]]

    @property
    def fused(self) -> bool:
        return self.case.partition("-")[0] in tiny_models.PUBLISHED_FUSED


@pytest.fixture(scope="module", params=CASES)
def saved(request, tmp_path_factory) -> Saved:
    path = tmp_path_factory.mktemp(request.param)
    model = tiny_models.build(request.param)
    model.save_pretrained(path / "original", max_shard_size="200KB")
    model.save_pretrained(path / "held", save_original_format=False)
    experts = model_experts(model)
    return Saved(case=request.param, kind=type(model), original=path / "original", held=path / "held", experts=experts)


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().contiguous().view(torch.int16).numpy()


def model_experts(model: torch.nn.Module) -> list[tuple[str, dict[str, np.ndarray]]]:
    """What the model computes with, as bits."""
    return [(name, {role: bits(x) for role, x in arrays.items()}) for name, arrays in tiny_models.experts(model)]


def loaded(kind: type, path: Path) -> torch.nn.Module:
    model, info = kind.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[key], (key, info[key])
    return model.eval()


def concat_experts(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """`wi`, `wo` and their biases of a `concat` checkpoint, by the place of the experts."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for file in path.glob("*.safetensors"):
        for name, tensor in safetensors_torch.load_file(file).items():
            if (role := name.rpartition(".")[2]) in ("wi", "wo", "wi_bias", "wo_bias"):
                found.setdefault(name.removesuffix(role), {})[role] = bits(tensor)
    return found


def test_every_model_type_has_a_test_or_a_reason():
    """A model_type that is new in our table, or in transformers, must be looked at."""
    reasons = tiny_models.SKIPPED.keys() | tiny_models.ALIASES.keys()
    assert not reasons - set(TYPES), "reasons for model types that our table does not have"
    assert set(tiny_models.ALIASES.values()) <= set(CASES)
    assert not reasons & set(CASES)
    assert {kind for kind in TYPES if kind not in buildable()} == reasons


def test_every_gated_moe_of_transformers_is_here():
    """The other way round: modeling files with gated experts whose model types we have never heard of."""
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        if ".gate_up_proj = nn.Parameter(" in path.read_text():
            configs = "".join(config.read_text() for config in path.parent.glob("configuration_*.py"))
            kinds = set(re.findall(r'\bmodel_type(?:: str)? = "([^"]+)"', configs)) & buildable()
            assert kinds & {*TYPES}
            assert all(re.search("vision|audio|encoder", kind) for kind in kinds.difference(TYPES)), kinds


def test_every_config_that_counts_experts_is_here():
    """Types without a modeling file of their own are seen, too; all that are missing are shown."""
    missing = {}
    for kind in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
        try:
            stated = transformers.AutoConfig.for_model(kind).to_dict()
        except (ValueError, StrictDataclassError):
            continue  # its defaults contradict one another
        if kind not in (*TYPES, *NOT_GATED) and (counts := {n for n in _expert_counts(stated) if n > 1}):
            missing[kind] = counts
    assert not missing


def _expert_counts(stated) -> list[int]:
    own = [n for word, n in stated.items() if re.search("num_(local_)?experts$|n_routed_experts", str(word)) and n]
    return own + [n for part in stated.values() if isinstance(part, dict) for n in _expert_counts(part)]


def buildable() -> set[str]:
    """Model types that transformers has a model class for."""
    configs = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    return {kind for kind in configs if any(kind in auto._model_mapping._model_mapping for auto in tiny_models.AUTO)}


@pytest.mark.parametrize("alias", tiny_models.ALIASES)
def test_alias(alias, tmp_path):
    """The same names of tensors under another model_type; transformers itself cannot load it."""
    case = tiny_models.ALIASES[alias]
    model = tiny_models.build(case)
    model.save_pretrained(tmp_path / "original", max_shard_size="200KB")
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    (tmp_path / "original" / "config.json").write_text(json.dumps(config | {"model_type": alias}))
    if case in tiny_models.REFUSED:
        with pytest.raises(ConvertError, match=tiny_models.REFUSED[case]):
            convert.prefuse(tmp_path / "original", tmp_path / "concat")
        return
    convert.prefuse(tmp_path / "original", tmp_path / "concat")
    same_experts(concat_experts(tmp_path / "concat"), model_experts(model))


def refuse(saved: Saved, tmp_path: Path) -> bool:
    """Whether this is a case that we refuse; checks that we do."""
    if saved.case not in tiny_models.REFUSED:
        return False
    with pytest.raises(ConvertError, match=tiny_models.REFUSED[saved.case]):
        convert.prefuse(saved.original, tmp_path / "refused")
    return True


def test_transformers_loads_what_we_prefuse(saved, tmp_path):
    """Published per expert: fused for transformers. Published fused: there and back."""
    if refuse(saved, tmp_path):
        return
    out = tmp_path / "out"
    if saved.fused:
        with pytest.raises(PlanError, match="nothing to prefuse"):
            convert.prefuse(saved.original, out, layout="transformers")
        convert.prefuse(saved.original, tmp_path / "fused")
        convert.split(tmp_path / "fused", out)
    else:
        convert.prefuse(saved.original, out, layout="transformers")
        names = json.loads((out / "convert_manifest.json").read_text())["tensors"]
        assert any(name.endswith(".gate_up_proj") for name in names)
        assert not any(re.search(r"experts\.\d+\.", name) for name in names if not name.startswith("vision"))
    ours, theirs = loaded(saved.kind, out), loaded(saved.kind, saved.original)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    logits = [tiny_models.forward(model, IDS).numpy() for model in (ours, theirs)]
    assert np.isfinite(logits[0]).all()
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("layout", ["concat", "transformers"])
def test_split_gives_back_the_files(saved, tmp_path, layout):
    if refuse(saved, tmp_path) or (saved.fused and layout == "transformers"):
        return
    convert.prefuse(saved.original, tmp_path / "fused", layout=layout)
    convert.split(tmp_path / "fused", tmp_path / "again")
    for file in saved.original.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_concat_is_what_the_model_computes_with(saved, tmp_path):
    """Not a word of our table: the model's own parameters, cut as its forward function cuts them."""
    if refuse(saved, tmp_path):
        return
    convert.prefuse(saved.original, tmp_path / "concat")
    same_experts(concat_experts(tmp_path / "concat"), saved.experts)


def test_fused_on_disk_gives_the_same_concat(saved, tmp_path):
    """`save_original_format=False`: what transformers holds, written as it is."""
    if refuse(saved, tmp_path):
        return
    convert.prefuse(saved.held, tmp_path / "refused")
    convert.prefuse(saved.held, tmp_path / "concat")
    same_experts(concat_experts(tmp_path / "concat"), saved.experts)


def same_experts(found, expected) -> None:
    """Blocks are paired by the number of their layer and by what is in them: names differ between disk and memory."""
    left = {name: (layer(name), arrays) for name, arrays in expected}
    assert left
    assert found
    for name, arrays in found.items():
        here = [key for key, (number, _) in left.items() if number == layer(name)]
        match = [key for key in here if np.array_equal(left[key][1]["wi"], arrays["wi"])]
        assert match, f"{name} has the experts of no block of layer {layer(name)}"
        _, wanted = left.pop(match[0])
        assert arrays.keys() == wanted.keys()
        for role, array in arrays.items():
            np.testing.assert_array_equal(array, wanted[role], err_msg=f"{name}{role}")
    # Dots 3 Note has experts in its vision tower too: copied where published, under names that no other family has
    assert not [name for name in left if "vision" not in name], "blocks that were not fused"


def layer(name: str) -> int:
    return int(re.search(r"\.(\d+)\.", f".{name}")[1])


@pytest.mark.parametrize("n", [40, 32], ids=["", "square"])
def test_qwen3_vl_moe_as_published(n, tmp_path):
    """Published as (E, K, 2N); transformers 5 writes (E, 2N, K) under the same names. The version in config.json tells them."""
    model = tiny_models.build("qwen3_vl_moe" if n == 40 else "qwen3_vl_moe-square")
    model.save_pretrained(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "published")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    (tmp_path / "published" / "config.json").write_text(json.dumps(config | {"transformers_version": "4.57.0.dev0"}))
    for file in (tmp_path / "published").glob("*.safetensors"):
        tensors = safetensors_torch.load_file(file)
        turned = {name: x.mT.contiguous() if ".experts." in name else x for name, x in tensors.items()}
        safetensors_torch.save_file(turned, file, {"format": "pt"})
    experts = model_experts(model)
    for source in ("new", "published"):
        convert.prefuse(tmp_path / source, tmp_path / f"{source}-concat")
        same_experts(concat_experts(tmp_path / f"{source}-concat"), experts)
    convert.prefuse(tmp_path / "published", tmp_path / "fused", layout="transformers")
    logits = [tiny_models.forward(loaded(type(model), tmp_path / path), IDS).numpy() for path in ("fused", "new")]
    np.testing.assert_array_equal(*logits)


SHARED = Path(__file__).resolve().parents[3] / "shared" / "checkpoints"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the team's shared checkpoints are not part of the repository")
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen3_moe_square_tied"])
def test_reference_logits_of_the_shared_checkpoints(name, tmp_path):
    reference = np.load(SHARED / name / "reference_logits.npz")
    convert.prefuse(SHARED / name, tmp_path / "fused", layout="transformers")
    kind, ids = transformers.AutoModelForCausalLM, torch.tensor(reference["input_ids"])
    found = [tiny_models.forward(loaded(kind, path), ids).numpy() for path in (tmp_path / "fused", SHARED / name)]
    np.testing.assert_array_equal(*found)
    # The reference was computed on another machine, whose float32 kernels round otherwise; swapped halves differ by 3 to 5.
    np.testing.assert_allclose(found[0], reference["logits_f32"], rtol=0, atol=1e-4)
