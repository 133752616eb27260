"""Any container of parameters as names and leaves, and the same container again with other leaves.

In: a tree. Out: its leaves by dotted names; a new tree. It never changes the one that it is given.

Mappings of any kind gain and lose keys: nested, flat with dots or slashes, flat with tuples. Modules of `flax.nnx` are
cloned, and their attributes replaced. All else that JAX knows as a tree keeps its fields: lists, named tuples, TrainState.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from convert.errors import PlanError
from convert.memory.leaves import Leaf, is_module, leaf_of

ROOT = "params"
"""How every name begins: what stands at the top of a tree has a place, too."""
Path = tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A leaf of a tree: its keys, the node, and the array in it, if there is one."""

    path: Path
    node: Any
    leaf: Leaf | None

    @property
    def is_empty(self) -> bool:
        """Whether it only keeps a place: None, or a node without children such as `optax.MaskedNode`."""
        return self.leaf is None and _children(self.node) == []


def flatten(root: Any) -> dict[str, Held]:
    """All leaves by name.

    Raises:
        PlanError: two have one name.
    """
    found: dict[str, Held] = {}
    for path, node in _leaves(root, ()):
        name = ".".join((ROOT, *(word for key in path for word in _words(key))))
        if name in found:
            raise PlanError(f"{name}: two leaves have this name, {found[name].path} and {path}; rename one")
        found[name] = Held(path=path, node=node, leaf=leaf_of(node))
    return found


def dotted(path: Iterable[Any]) -> str:
    """A path of JAX's as the name of a leaf, without `ROOT`."""
    return ".".join(word for entry in path for word in _words(_key(entry)))


def rebuilt(root: Any, held: Mapping[str, Held], made: Mapping[Sequence[str], Mapping[str, Any]]) -> Any:
    """The tree with some leaves replaced: `made` has the names of what goes, with the names and values of what comes.

    Raises:
        PlanError: a container has no place for it.
    """
    gone = {held[name].path for names in made for name in names}
    new: dict[Path, list[tuple[Path, Any]]] = {}
    for names, values in made.items():
        for name, value in values.items():
            path = held[names[0]].path
            at, rest = _place(name, path, int if _counts(root, path) else str)
            new.setdefault(at, []).append((rest, value))
    touched = {path[:depth] for path in gone for depth in range(len(path) + 1)}
    return _Changes(gone=frozenset(gone), new=new, touched=frozenset(touched)).applied(root, ())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Changes:
    """`gone` are leaves, `new` is what comes before a child: the keys below the child's parent, and the value."""

    gone: frozenset[Path]
    new: Mapping[Path, list[tuple[Path, Any]]]
    touched: frozenset[Path]

    def applied(self, node: Any, path: Path) -> Any:
        """A node with all changes below it."""
        children = _children(node)
        if not children or (path not in self.touched and not isinstance(node, Mapping)):
            return node
        if is_module(node):
            return self._module(node, path)
        found: dict[Any, Any] = {}
        for key, child in children:
            here = (*path, key)
            for rest, value in self.new.get(here, ()):
                _put(found, rest, value)
            if here in self.gone:
                continue
            kept = self.applied(child, here)
            if here not in self.touched or _children(kept) != []:
                _put(found, (key,), kept)
        return _closed(node, [key for key, _ in children], found)

    def _module(self, node: Any, path: Path) -> Any:
        from flax import nnx

        clone = nnx.clone(node)
        for at, values in self.new.items():
            if at[: len(path)] == path:
                parent = _walk(clone, at[len(path) : -1])
                for rest, value in values:
                    _set(parent, rest, value)
        for gone in (gone for gone in self.gone if gone[: len(path)] == path):
            _delete(_walk(clone, gone[len(path) : -1]), gone[-1])
        return clone


def _leaves(node: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    children = _children(node)
    if not children:
        yield path, node
        return
    for key, child in children:
        yield from _leaves(child, (*path, key))


def _children(node: Any) -> list[tuple[Any, Any]] | None:
    """Keys and children, in their order; None for a leaf."""
    if leaf_of(node) is not None:
        return None
    if isinstance(node, Mapping):
        return list(getattr(node, "raw_mapping", node).items())  # nnx.State makes a State of each mapping that is looked at
    entries = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)[0]
    if any(not path for path, _ in entries):
        return None
    return [(_key(path[0]), child) for path, child in entries]


def _key(entry: Any) -> Any:
    return next(getattr(entry, word) for word in ("key", "idx", "name") if hasattr(entry, word))


def _words(key: Any) -> list[str]:
    """A key as the parts of a dotted name: flat trees join them by dots, by slashes, or as a tuple."""
    if isinstance(key, tuple):
        return [word for part in key for word in _words(part)]
    return str(key).replace("/", ".").split(".")


def _counts(node: Any, path: Path) -> bool:
    """Whether numbers are integers in the keys of mappings here, as in `nnx.State`."""
    for key in path:
        if any(type(part) is int for part in (key if isinstance(key, tuple) else (key,) if isinstance(node, Mapping) else ())):
            return True
        node = dict(_children(node) or ())[key]
    return False


def _place(name: str, path: Path, number: type) -> tuple[Path, Path]:
    """Where a new name goes: the path of the child that it comes before, and its keys below that child's parent."""
    words = name.split(".")[1:]
    depth = 0
    while depth < len(path) - 1 and words[: len(head := _words(path[depth]))] == head and len(words) > len(head):
        words, depth = words[len(head) :], depth + 1
    like = path[depth]
    if isinstance(like, str) and ("/" in like or "." in like):
        return path[: depth + 1], (("/" if "/" in like else ".").join(words),)
    keys = tuple(number(word) if word.isdecimal() else word for word in words)
    return path[: depth + 1], (keys,) if isinstance(like, tuple) else keys


def _put(found: dict[Any, Any], keys: Path, value: Any) -> None:
    key, *rest = keys
    if rest:
        below = found.setdefault(key, {})
        if not isinstance(below, dict):
            raise PlanError(f"{key} is taken, and {'.'.join(map(str, keys))} has to go there; rename it")
        _put(below, tuple(rest), value)
    elif isinstance(found.get(key), dict) and isinstance(value, Mapping):
        found[key] |= value
    elif key in found:
        raise PlanError(f"{key} is there already, and is what the experts become; rename it")
    else:
        found[key] = value


def _closed(node: Any, keys: list[Any], found: dict[Any, Any]) -> Any:
    """A container like this one, with these children."""
    if isinstance(node, dict):
        new = copy.copy(node)  # a default dict keeps its default
        new.clear()
        new.update(found)
        return new
    if isinstance(node, Mapping):
        return type(node)(found)  # type: ignore[call-arg]
    if not found.keys() & set(keys) and isinstance(node, list | tuple):
        return found  # a list of experts that became one
    if list(found) != keys:
        lost = [str(key) for key in keys if key not in found]
        raise PlanError(
            f"a {type(node).__name__} has its fields once and for all, so {', '.join(lost)} cannot become "
            f"{', '.join(str(key) for key in found if key not in keys) or 'anything else'} in it; hold the experts in a mapping"
        )
    structure = jax.tree.structure(node, is_leaf=lambda child: child is not node)
    return jax.tree.unflatten(structure, list(found.values()))


def _walk(node: Any, keys: Path) -> Any:
    for key in keys:
        node = getattr(node, key) if isinstance(key, str) and not isinstance(node, Mapping) else node[key]
    return node


def _set(parent: Any, keys: Path, value: Any) -> None:
    if len(keys) > 1 or isinstance(parent, Sequence):
        raise PlanError(f"a {type(parent).__name__} has no place for {'.'.join(map(str, keys))}; use its nnx.State")
    if isinstance(parent, Mapping):
        parent[keys[0]] = value  # type: ignore[index]
    else:
        setattr(parent, keys[0], value)


def _delete(parent: Any, key: Any) -> None:
    if isinstance(parent, Mapping):
        del parent[key]  # type: ignore[attr-defined]
    elif hasattr(parent, key):  # a module that stands in two places is met twice
        delattr(parent, key)
