"""How many layers and experts a tree has, and where they are, by the words of `config.json`. Pure.

In: a tree and `config.json`. Out: its parts, the stacks of each with their places, or an error that names the word. It never
looks at a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from layouts.errors import PlanError
from layouts.quantisation import block_of
from layouts.tables.maxtext import Stack, Tree

_MOST = 64
"""Blocks or layers of one kind that have a subtree each; published models have one, or three."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The text of a model, or an `encoder` by its word: its tree and its words. MaxText can leave an encoder out, as a whole.

    `block` are the rows of weights, and the columns, that have one scale, if `config.json` says that they are quantised so.
    """

    tree: Tree
    config: Mapping[str, Any]
    wrapped: tuple[str, str] = ("", "")
    encoder: str = ""
    block: tuple[int, int] | None = None

    def named(self, name: str) -> str:
        """What the checkpoint calls a tensor of the table."""
        before, instead = self.wrapped
        return instead + name.removeprefix(before) if name.startswith(before) else name

    @property
    def heads(self) -> dict[str, int]:
        """Sizes of axes that no shape tells."""
        stated = ((axis, _stated(self.config, word)) for axis, word in self.tree.heads)
        return {axis: size for axis, size in stated if size is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """The layers of a stack: how many, and where in Hugging Face. Those of one `block` are there together, or not at all.

    `total` are those of all stacks that take turns with it.
    """

    stack: Stack
    count: int
    total: int = 0
    hf: str
    block: str = ""


def parts_of(tree: Tree, config: Mapping[str, Any]) -> Iterator[Part]:
    """The text of a model, and its encoders."""
    block = block_of(config)
    inner = config.get(tree.within)
    config = inner if isinstance(inner, Mapping) else config
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        yield Part(tree=tree, config=config, block=block)
        return
    yield Part(tree=tree, config=text, wrapped=tree.wrapped, block=block)
    for word, encoder in tree.encoders:
        if isinstance(stated := config.get(word), Mapping):
            yield Part(tree=encoder, config=stated, encoder=word)


def layers_of(part: Part) -> Iterator[Layers]:
    """The stacks that are there.

    Raises:
        PlanError: `config.json` does not say how many layers there are.
    """
    for stack in part.tree.stacks:
        if stack.copies:
            yield from _copies(part, stack, stack.copies)
            continue
        first, last = _number(part.config, stack.first), _number(part.config, stack.last)
        if first is None or last is None:
            words = " and ".join(word for word in (stack.first, stack.last) if isinstance(word, str))
            raise PlanError(f"config.json does not say {words} in numbers, and so not how many layers there are")
        layers, total = range(first + stack.slot, last, stack.step), last - first
        if stack.run > 1 and total % stack.step:
            raise PlanError(
                f"{total} layers ({stack.last}) do not make whole cycles of {stack.step}, and MaxText has only such"
            )
        for each in _of_kind(stack, layers, part.config):
            slot = _numbered(each.start, stack)
            one = replace(stack, single=stack.single.replace("{n}", slot))
            yield Layers(stack=one, count=len(each), total=total, hf=part.named(f"{stack.hf}.{slot}."))


def mtp_places(tree: Tree, config: Mapping[str, Any]) -> tuple[str, ...]:
    """How the names of blocks that predict further tokens begin in Hugging Face."""
    text = next(parts_of(tree, config))
    return (*(text.named(place) for place in tree.mtp), *(layers.hf for layers in layers_of(text) if layers.block))


def expert_count(config: Mapping[str, Any]) -> int:
    """How many experts there are.

    Raises:
        PlanError: `config.json` does not say it, or says two numbers.
    """
    words = ("num_experts", "num_local_experts", "n_routed_experts")
    stated = {int(config[word]) for word in words if type(config.get(word)) is int}
    if len(stated) != 1:
        raise PlanError(f"config.json should state the number of experts once; found {sorted(stated)}")
    return stated.pop()


def _copies(part: Part, stack: Stack, word: str) -> Iterator[Layers]:
    count, first = part.config.get(word) or 0, _number(part.config, stack.first)
    if type(count) is not int or not 0 <= count <= _MOST:
        raise PlanError(f"{word} is {str(count)[:80]} in config.json; it should be a number up to {_MOST}")
    for m in range(1, count + 1):
        rows = tuple(replace(row, maxtext=_copy(row.maxtext, m)) for row in stack.rows)
        one = replace(
            stack, single=_copy(stack.single, m), rows=rows, experts=_copy(stack.experts, m) if stack.experts else None
        )
        hf = part.named(f"{stack.hf}.{(first or 0) + m - 1}.")
        yield Layers(stack=one, count=1, hf=hf, block=one.single)


def _stated(config: Mapping[str, Any], word: str) -> int | None:
    """The number under a word; with `*` in it, the one that all below say who say one."""
    above, several, last = word.partition(".*.")
    below = config.get(above) if several else None
    each = below.values() if isinstance(below, Mapping) else ()
    found = [one.get(last) for one in each if isinstance(one, Mapping) and last in one] if several else [config.get(word)]
    return found[0] if found and type(found[0]) is int and found.count(found[0]) == len(found) else None


def _copy(text: str, m: int) -> str:
    return text.replace("{m}", str(m))


def _numbered(first: int, stack: Stack) -> str:
    """The slot of the layers from `first` on: `{l}`, `{l*4+1}` for 1, 5, 9, or `{l*4+p}` with runs of several."""
    offset = "p" if stack.run > 1 else first or ""
    return f"{{l{f'*{stack.step}' if stack.step > 1 else ''}{f'+{offset}' if offset else ''}}}"


def _number(config: Mapping[str, Any], word: int | str) -> int | None:
    name, counts, value = word.partition("=") if isinstance(word, str) else ("", "", "")
    found = config.get(name) if name else word
    if isinstance(found, list):
        found = found.count(value) if counts else len(found)
    return found if type(found) is int and found >= 0 else None


def _of_kind(stack: Stack, layers: range, config: Mapping[str, Any]) -> Iterator[range]:
    """Those of these layers that the stack has: all, or none, or one by one, each of which is then a stack of its own.

    Raises:
        PlanError: `config.json` does not say of what kind they are, or that they are of several.
    """
    word, values = stack.when or ("", ())
    kinds = config.get(word)
    if isinstance(kinds, list) and len(kinds) >= layers.stop:
        if stack.scanned is None:
            if len(layers) > _MOST:
                raise PlanError(f"config.json says {stack.last} {len(layers)}; it should be a number up to {_MOST}")
            yield from (range(at, at + 1) for at in layers if kinds[at] in values)
            return
        if (odd := next((at for at in layers if kinds[at] not in values), None)) is not None:
            found = str(kinds[odd])[:80]
            raise PlanError(f"{word} of layer {odd} is {found} in config.json, and MaxText stacks {values[0]} there")
    elif stack.when and type(kinds) is not int:
        raise PlanError(f"config.json does not say {word}, which says what kind of layers there are")
    elif stack.when and kinds not in values:
        return
    if layers:
        yield layers
