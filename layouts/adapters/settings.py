"""`adapter_config.json`: the scale of each module, and what no form here can hold.

In: the parsed file. Out: `Settings`. Everything in it is input and is looked at before it is believed.

scale = alpha / r, or alpha / sqrt(r) with `use_rslora`, where r is the rank of one expert. Source: PEFT 0.21
`tuners/lora/config.py`, `layer.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layouts.adapters.patterns import Patterns
from layouts.disk.files import ADAPTER_FILES
from layouts.errors import InputError, PlanError

CONFIG = ADAPTER_FILES[0]
_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga", "true", "false")
"""`init_lora_weights` that leave the base as it is; the others (pissa, olora, corda, loftq) alter it when they are loaded."""
_REFUSED = {
    "use_dora": "DoRA: the norms of the merged weight would have to be computed",
    "use_qalora": "QALoRA pools the input",
    "fan_in_fan_out": "the base stores its weights transposed",
    "lora_bias": "B has a bias, which packed forms have no place for",
    "layer_replication": "layers of the base are repeated",
    "alora_invocation_tokens": "aLoRA is active for some tokens only",
    "arrow_config": "Arrow chooses among adapters",
    "use_bdlora": "its A or B is block diagonal by device",
    **dict.fromkeys(("kasa_config", "monteclora_config", "velora_config"), "a variant of LoRA with more than A and B"),
}
"""Settings that make the update something else than scale * B @ A."""
_LARGEST = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What B @ A is multiplied by."""

    alpha: float
    rank: int
    rslora: bool = False

    @property
    def factor(self) -> float:
        """The number: alpha / r, as every reader computes it."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def at(self, rank: int) -> Scale | None:
        """The same factor, to the last bit, for another rank; None where no alpha gives it."""
        if rank == self.rank:
            return self
        ratio: float = rank / self.rank
        if self.rslora:
            root = math.isqrt(max(rank, self.rank) // min(rank, self.rank))
            if root * root * min(rank, self.rank) != max(rank, self.rank):
                return None
            ratio = root if rank > self.rank else 1 / root
        alpha = self.alpha * ratio
        found = Scale(alpha=int(alpha) if float(alpha).is_integer() else alpha, rank=rank, rslora=self.rslora)
        whole = isinstance(found.alpha, int) or not isinstance(self.alpha, int) or not self.rslora
        return found if found.factor == self.factor and whole else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """An adapter's own words: `raw` is the whole file."""

    where: str
    rank: int
    alpha: float
    rslora: bool
    ranks: Patterns
    alphas: Patterns
    raw: Mapping[str, Any]

    @classmethod
    def of(cls, raw: Mapping[str, Any], where: str) -> Settings:
        """Look an `adapter_config.json` through.

        Raises:
            InputError: it lacks a rank or an alpha, or one of these is no number.
            PlanError: it is no LoRA, or a kind that is more than scale * B @ A.
        """
        _check_kind(raw, where)
        for key in ("rank_pattern", "alpha_pattern"):
            if not isinstance(raw.get(key) or {}, dict):
                raise InputError(f"{where}: {key} should be an object")
        ranks = {key: _rank(value, where, key) for key, value in (raw.get("rank_pattern") or {}).items()}
        alphas = {key: _alpha(value, where, key) for key, value in (raw.get("alpha_pattern") or {}).items()}
        return cls(
            where=where,
            rank=_rank(raw.get("r"), where, "r"),
            alpha=_alpha(raw.get("lora_alpha"), where, "lora_alpha"),
            rslora=raw.get("use_rslora") is True,
            ranks=Patterns.of(ranks, where),
            alphas=Patterns.of(alphas, where),
            raw=raw,
        )

    def rank_of(self, module: str) -> int:
        """The rank of a module."""
        return int(self.ranks.get(module, self.rank))

    def scale(self, module: str) -> Scale:
        """The scale of a module."""
        return Scale(alpha=self.alphas.get(module, self.alpha), rank=self.rank_of(module), rslora=self.rslora)


def _check_kind(raw: Mapping[str, Any], where: str) -> None:
    if str(raw.get("peft_type", "LORA")).upper() != "LORA":
        raise PlanError(f"{where}: peft_type is {raw['peft_type']!r}; only LORA adapters have A and B")
    for key, why in _REFUSED.items():
        if raw.get(key):
            raise PlanError(f"{where}: {key} is set ({why}), so that the update is not only scale * B @ A; merge it with PEFT")
    init = raw.get("init_lora_weights")
    if init not in _INITS:
        raise PlanError(
            f"{where}: init_lora_weights is {init!r}, which alters the base when it is loaded; convert it to plain LoRA with "
            "PEFT (save_pretrained, path_initial_model_for_weight_conversion) first"
        )
    if not isinstance(raw.get("use_rslora", False), bool | None):
        raise InputError(f"{where}: use_rslora should be true or false")


def _rank(value: Any, where: str, key: str) -> int:
    if type(value) is not int or not 0 < value <= _LARGEST:
        raise InputError(f"{where}: the rank {key} is {value!r}, and should be a number from 1; nothing else tells the scale")
    return value


def _alpha(value: Any, where: str, key: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > 1e30:
        raise InputError(f"{where}: the alpha {key} is {value!r}, and should be a number; nothing else tells the scale")
    return value  # type: ignore[no-any-return]
