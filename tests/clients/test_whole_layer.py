"""Our whole MoE layer (route, gate and up, activation, down, unpermute) against transformers' own, for every model type.

A hook takes what transformers' experts are called with and what they return; our router, from the published checkpoint and its
`config.json` alone, must send the same tokens to the same experts with the same weights, and our layer must return the same.
"""

import contextlib

import numpy as np
import pytest

from convert.verifier.backends import BACKENDS
from convert.verifier.logical import blocks
from convert.verifier.operands import load
from convert.verifier.probes import Setting
from convert.verifier.routing import activation_of, routing_of
from convert.verifier.whole import add_experts, routed
from layouts.checkpoint import open_checkpoint
from layouts.describe import describe

torch = pytest.importorskip("torch")

import tiny_models  # noqa: E402

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("default")]

CASES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
IDS = torch.arange(34).reshape(2, 17) * 7 % 160
RAGGED_DOT = BACKENDS["ragged_dot"]


def calls(model):
    """What each module called `experts` was given and returned, in the order of the calls."""
    found = []

    def hook(module, args, kwargs, out):
        found.append(([*args, *kwargs.values()], out))

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if name.endswith("experts") and any(p.ndim == 3 for p in module.parameters(recurse=False)):
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        tiny_models.forward(model, IDS)
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_layer_is_transformers(case, tmp_path):
    model = tiny_models.build(case).float()
    model.save_pretrained(tmp_path, save_original_format=True)
    theirs = calls(model)
    reader = open_checkpoint(tmp_path)
    layers = list(blocks(reader, describe(reader)).values())
    assert len(theirs) == len(layers) > 0
    setting = Setting(backend=RAGGED_DOT, activation=activation_of(reader.config))
    for (args, out), block in zip(theirs, layers, strict=True):
        x, k = args[0], block.groups["wi", ""].total("k")
        to = routed(block, routing_of(reader.config, block.experts), x.reshape(-1, k).detach().numpy())
        assert to.router == "the checkpoint's routers"
        ours = np.zeros_like(to.x)
        add_experts(ours, to, load(block, range(block.experts)), range(block.experts), setting)
        wanted = out.reshape(-1, k).detach().numpy()
        np.testing.assert_allclose(ours, wanted, rtol=2e-4, atol=2e-5 * np.abs(wanted).max())
    reader.close()
