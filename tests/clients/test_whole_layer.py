"""Our whole MoE layer (route, gate and up, activation, down, unpermute) against transformers' own, for every model type.

A hook takes what transformers' layer is called with and what it returns, with its shared experts silenced; our router, from the
published checkpoint and its `config.json` alone, must send the same tokens to the same experts with the same weights, and our
layer must return the same. Routers' settings are not the defaults, and the corrections of scores are not zero.
"""

import contextlib
import re

import numpy as np
import pytest

from convert.verifier.bits.logical import blocks
from convert.verifier.gemms.backends import BACKENDS
from convert.verifier.gemms.operands import load
from convert.verifier.gemms.probes import Setting
from convert.verifier.gemms.routing import OTHERS, activation_of, routing_of
from convert.verifier.gemms.whole import add_experts, pieces, routed
from layouts.checkpoint import open_checkpoint
from layouts.matching.describe import describe
from layouts.tables.families import FAMILIES

torch = pytest.importorskip("torch")

from tests.clients import tiny_models  # noqa: E402

pytestmark = pytest.mark.clients

TYPES = [kind for family in FAMILIES if family.format == "hf" for kind in family.model_types]
CASES = [kind for kind in TYPES if kind not in (*tiny_models.SKIPPED, *tiny_models.ALIASES, *tiny_models.REFUSED)]
UNKNOWN = [case for case in CASES if case.removesuffix("_text") in OTHERS]
SETTINGS = {
    "n_group": 3, "norm_topk_prob": False, "moe_router_logit_softcapping": 0.7, "routed_scaling_factor": 1.75,
    "router_scaling_factor": 1.75, "moe_routed_scaling_factor": 1.75, "moe_router_scaling_factor": 1.75, "route_scale": 1.75,
}  # fmt: skip
"""What configs say of routers, where they have a place for it."""
OVERRIDES = {
    "deepseek_v2": {"norm_topk_prob": True},  # which it does not look at
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
}
IDS = torch.arange(34).reshape(2, 17) * 7 % 160


@pytest.fixture
def build(monkeypatch):
    """Builds a tiny model with settings of our own."""
    monkeypatch.setattr(tiny_models, "SMALL", tiny_models.SMALL | SETTINGS)
    monkeypatch.setattr(tiny_models, "OVERRIDES", tiny_models.OVERRIDES | OVERRIDES)

    def built(case):
        model = tiny_models.build(case).float()
        for name, buffer in model.named_buffers():
            if name.endswith(("correction_bias", "expert_bias")):
                buffer.normal_(std=0.3)
        return model

    return built


def calls(model):
    """What each MoE layer was given and returned without its shared experts, in the order of the calls."""
    layers = {name.partition(".experts")[0] for name, _ in tiny_models.experts(model)}
    found = []

    def hook(module, args, kwargs, out):
        out = out[0] if isinstance(out, tuple) else out
        out = out - module.bias if type(module).__name__ == "JetMoeMoE" else out
        found.append((next(iter([*args, *kwargs.values()])), out))

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if name in layers:
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            elif name.rpartition(".")[2].startswith("shared_"):
                stack.callback(module.register_forward_hook(lambda module, args, out: torch.zeros_like(out)).remove)
            elif name.rpartition(".")[0] in layers and name.endswith("norm"):  # A.X K1 normalises what the layer returns
                stack.callback(module.register_forward_hook(lambda module, args, out: args[0]).remove)
        tiny_models.forward(model, IDS)
    return [tuple(each.reshape(-1, pair[0].shape[-1]).detach().numpy() for each in pair) for pair in found]


@pytest.mark.parametrize("case", [case for case in CASES if case not in UNKNOWN])
def test_the_layer_is_transformers(case, build, tmp_path):
    model = build(case)
    model.save_pretrained(tmp_path)
    theirs = calls(model)
    with contextlib.closing(open_checkpoint(tmp_path)) as reader:
        # a model that is given text alone runs neither its talker nor its vision encoder, nor experts of the second kind
        other = re.compile("talker|vision|kind 1")
        found = blocks(reader, describe(reader))
        layers = [block for place, block in found.items() if not other.search(f"{place} {block.label}")]
        assert len(theirs) == len(layers) > 0
        setting = Setting(backend=BACKENDS["ragged_dot"], activation=activation_of(reader.config))
        for number, ((x, wanted), block) in enumerate(zip(theirs, layers, strict=True)):
            to = routed(block, routing_of(reader.config, block.experts), x)
            # a token's id says which experts it goes to, or the router's weight is published (K, E), which is not read
            if (case, number) in (("deepseek_v4", 0), ("ernie4_5_vl_moe", 0)):
                assert to.router == "random routers"
                continue
            assert to.router == "the checkpoint's routers"
            ours = np.zeros_like(x)
            every = range(block.experts)
            add_experts(ours, pieces(to, every, 32), load(block, every), setting, (32, 32))
            np.testing.assert_allclose(ours, wanted, rtol=2e-4, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("case", UNKNOWN)
def test_a_router_that_is_not_described(case, build, tmp_path):
    build(case).save_pretrained(tmp_path)
    with contextlib.closing(open_checkpoint(tmp_path)) as reader:
        for block in blocks(reader, describe(reader)).values():
            routing = routing_of(reader.config, block.experts)
            assert "own is not described" in str(routing)
            x = np.ones((3, block.groups["wi", ""].total("k")), np.float32)
            assert routed(block, routing, x).router == "random routers"
