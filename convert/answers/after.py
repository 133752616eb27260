"""What to do once a conversion is done: the command that proves it, and how its output is loaded.

In: a report, and what the user said. Out: commands and sentences. It looks at no file.
"""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from convert.answers.tables import made_for
from convert.options import Choices
from convert.options.keywords import Verifying, options_of
from convert.options.option import complete, named
from convert.planning.choices import comparable
from convert.planning.planner import Plan
from layouts.adapters.forms import FORMS
from layouts.checkpoint import FORMATS
from layouts.language.layout import ROLES
from layouts.matching.packing import WEIGHTS
from layouts.tables.targets import TARGETS

_HOW = ("jobs", "memory", "mesh", "content")
"""How to work, not what a checkpoint is: no proof needs to be told."""


def next_steps(report: Any, given: Mapping[str, Any]) -> dict[str, str | None]:
    """`verify`, the command that compares input and output, or looks at the output where they are not to be equal; and `load`.

    Of several processes the first one says it.
    """
    if getattr(report, "process", (0, 1))[0]:
        return {"verify": None, "load": None}
    return {"verify": _verify(report.plan, given), "load": _load(report.plan)}


def _verify(plan: Any, given: Mapping[str, Any]) -> str:
    choices = complete(Choices, {each.name: given[each.name] for each in named(Choices) if each.name in given})
    if not comparable(getattr(plan, "computed", None), choices):
        return shlex.join(["convert", "--verify", _word(plan.out)])
    words = ["convert", "--verify", _word(plan.source), _word(plan.out)]
    for each in options_of(Verifying):
        if each.name in given and each.name not in _HOW:
            words += [each.flag, str(given[each.name])]
    if hasattr(plan, "targets") and not (_are_floats(plan) and _has_jax()):
        words.append("--no-gemm")
    return shlex.join(words)


def _word(path: Path) -> str:
    """A path as a command takes it: one that begins with a dash would be an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def _are_floats(plan: Plan) -> bool:
    """Whether there is a GEMM that takes the experts: none takes integers, packed or not."""
    weights = (first for first, _ in plan.targets.forms if first.role in ROLES and first.part in WEIGHTS)
    return all(not target.packed and target.spec.dtype.startswith(("F", "BF")) for target in weights)


def _has_jax() -> bool:
    with suppress(ModuleNotFoundError):
        return importlib.util.find_spec("jax") is not None
    return False


def _load(plan: Any) -> str:
    """In this tool's own words, and who else loads it, or takes its tensors from other code."""
    if not hasattr(plan, "targets"):
        return f"form {plan.layout}: {FORMS[plan.layout].text}"
    here = f"convert.load({str(plan.out)!r}) in JAX"
    if plan.layout in TARGETS:
        return "; ".join(filter(None, (here, made_for(plan.layout, plan.format))))
    original = "the base" if plan.action == "merge" else "the original"
    return f"{here}; loaded by {FORMATS[plan.format].loaders.format(original=original)}"
