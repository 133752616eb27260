"""MaxText itself says to how many columns it pads the experts: `--align maxtext` is asked against its own function.

It needs Python 3.12 and is not among our dependencies: `pip install -e '.[maxtext]'`, then `pytest -m clients`.
"""

import pytest

from layouts.language.pattern import Pattern
from layouts.tables.families import FAMILIES
from layouts.tables.targets import target
from tests.layouts.test_layouts import WIDTHS

vllm = pytest.importorskip("maxtext.integration.vllm.convert_utils")

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("shards", range(1, 17))
def test_maxtext_pads_as_align_maxtext_does(shards):
    wi = target("per-shard", FAMILIES[0], shards=shards, align="maxtext")["wi"]
    for n in (width for width in WIDTHS if width % shards == 0):
        stored = Pattern(wi.pattern).expand(3).shape({"e": 1, "k": 2, "g": 2, "s": shards, "n": n // shards})
        assert stored[-1] == 2 * vllm.compute_padded_moe_mlp_dim(n, shards), (n, shards)
