"""Dotted paths, the names of the leaves of a tree, and globs on them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import torch
import torch.utils._pytree as pytree

from fdl._checks import as_tuple, check_dict
from fdl._torch_compat import assume_constant_result
from fdl.tree._structure import flatten, is_plain, unflatten

Tree = Any
Where = str | Sequence[str] | Callable[[str, Any], bool]


def flatten_dict(tree: Tree) -> dict[str, Any]:
    """Return a dict from the dotted path of each leaf to the leaf; a lone leaf has the path `''`.

    Keys may be paths themselves, as in `dict(module.named_parameters())`, which stays as it is.

    Raises:
        ValueError: two leaves have one path; or a dict key is empty, or has an empty part between
            dots.
        TypeError: a dict key is not a string.

    >>> flatten_dict({"conv": [{"weight": 1}, 2], "fc.bias": 3})
    {'conv.0.weight': 1, 'conv.1': 2, 'fc.bias': 3}
    """
    if not torch.compiler.is_compiling():
        leaves, structure = flatten(tree)
        if is_plain(structure):
            return dict(zip(_paths(structure, len(leaves)), leaves, strict=True))
    pairs, _ = pytree.tree_flatten_with_path(tree)
    flat = {dotted(entries): leaf for entries, leaf in pairs}
    if len(flat) < len(pairs):
        _raise_shared_path([dotted(entries) for entries, _ in pairs])
    return flat


@lru_cache(64)
def _paths(structure: Any, count: int) -> tuple[str, ...]:
    """List the dotted paths of all `count` leaves of a structure."""
    pairs, _ = pytree.tree_flatten_with_path(unflatten(range(count), structure))
    paths = tuple(dotted(entries) for entries, _ in pairs)
    if len(set(paths)) < count:
        _raise_shared_path(paths)
    return paths


def _raise_shared_path(paths: Sequence[str]) -> None:
    twice = sorted({path for path in paths if paths.count(path) > 1})
    raise ValueError(
        f"tree: two leaves have the path {twice[0]!r}, as a key with dots beside nested keys; "
        "rename one"
    )


def named_children(tree: Tree) -> list[tuple[str, Tree]]:
    """List the names and the children of a container of any kind that torch's pytree knows.

    >>> named_children({"b": [1, 2], "a": 3})
    [('b', [1, 2]), ('a', 3)]
    """
    pairs, _ = pytree.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)
    return [(dotted(entries), child) for entries, child in pairs]


def is_mapping(tree: Tree) -> bool:
    """Return True for a mapping that torch's pytree knows, such as a dict or a TensorDict.

    >>> import types
    >>> is_mapping({}), is_mapping(types.MappingProxyType({}))  # the latter is not registered
    (True, False)
    """
    return isinstance(tree, Mapping) and not pytree.tree_is_leaf(tree)


def as_dicts(tree: Tree) -> Tree:
    """Replace mappings by dicts, except those of Python: a TensorDict cannot hold every leaf.

    >>> as_dicts({"w": [OrderedDict(b=1)]})
    {'w': [OrderedDict([('b', 1)])]}
    """
    if not torch.compiler.is_compiling() and is_plain(flatten(tree)[1]):
        return tree  # as nearly every tree
    kind = type(tree)
    if kind in (dict, OrderedDict):
        return kind((key, as_dicts(child)) for key, child in tree.items())
    if kind in (list, tuple):
        return kind(as_dicts(child) for child in tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return kind(*(as_dicts(child) for child in tree))
    if is_mapping(tree):
        return {name: as_dicts(child) for name, child in named_children(tree)}
    return tree


def in_order(tree: Tree) -> Tree:
    """Sort the keys of every dict in a tree, and those of other mappings, which become dicts.

    Trees are equal in whatever order their dicts were filled, but several processes have to send
    leaves, and add over leaves, in the same order.

    >>> in_order({"w": 0, "b": [{"y": 1, "x": 2}]})
    {'b': [{'x': 2, 'y': 1}], 'w': 0}
    """
    if type(tree) in (dict, OrderedDict):
        return type(tree)((key, in_order(tree[key])) for key in sorted(tree))
    if is_mapping(tree):
        return in_order(dict(named_children(tree)))
    if type(tree) in (list, tuple):
        return type(tree)(in_order(child) for child in tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(in_order(child) for child in tree))
    return tree


def sorted_order(tree: Tree) -> list[int]:
    """List the numbers of the leaves in the order of sorted keys, in which JAX has them.

    >>> sorted_order({"w": 0.5, "b": [0.1, 0.2]})
    [1, 2, 0]
    """
    leaves, structure = flatten(as_dicts(tree))
    return flatten(in_order(unflatten(range(len(leaves)), structure)))[0]


def dotted(entries: Sequence[Any]) -> str:
    """Convert torch's key path to a dotted path.

    >>> dotted([pytree.MappingKey("conv"), pytree.SequenceKey(0)])
    'conv.0'
    """
    return ".".join(_part(entry) for entry in entries)


def _part(entry: Any) -> str:
    if isinstance(entry, pytree.SequenceKey):
        return str(entry.idx)
    if isinstance(entry, pytree.GetAttrKey):
        return entry.name
    return check_key("tree", entry.key)


def join(path: str, name: str | int) -> str:
    """Append the name of a child, or a path below it, to the path of its container.

    >>> join("conv.0", "weight"), join("", 3), join("conv", "")
    ('conv.0.weight', '3', 'conv')
    """
    return f"{path}.{name}" if path and name != "" else f"{path}{name}"


def check_key(caller: str, key: Any, where: str = "") -> str:
    """Raise unless a dict key is a dotted path, or one part of it; return the key.

    >>> check_key("save", "fc.", " at the top")
    Traceback (most recent call last):
    ValueError: save: a dict key must have a name before and after each dot, got 'fc.' at the top
    """
    if not isinstance(key, str):
        raise TypeError(
            f"{caller}: a dict key must be a str, got {key!r}{where}; write it as {str(key)!r}"
        )
    if not key:
        raise ValueError(f"{caller}: a dict key must not be empty, got ''{where}")
    if not all(key.split(".")):
        raise ValueError(
            f"{caller}: a dict key must have a name before and after each dot, got {key!r}{where}"
        )
    return key


def unflatten_dict(flat: Mapping[str, Any], like: Tree = None) -> Tree:
    """Rebuild a tree from dotted paths: nested dicts, or the structure of `like` if given.

    The single path `''` gives a tree that is one leaf.

    Raises:
        ValueError: the paths are not those of `like` (each is listed), or a path is both a leaf and
            a container, or has an empty part.
        TypeError: a path is not a string.

    >>> unflatten_dict({"fc.0.weight": 1, "fc.0.bias": 2})
    {'fc': {'0': {'weight': 1, 'bias': 2}}}
    >>> unflatten_dict({"1": "b", "0": "a"}, like=[0, 0])
    ['a', 'b']
    """
    check_dict("tree.unflatten_dict", "flat", flat, "a dict from paths to leaves")
    if like is not None:
        wanted = flatten_dict(like)
        lines = [f"{path}: missing" for path in wanted.keys() - flat.keys()]
        lines += [f"{path}: unexpected" for path in flat.keys() - wanted.keys()]
        if lines:
            raise ValueError(
                "tree.unflatten_dict: the paths are not those of `like`:\n  "
                + "\n  ".join(sorted(lines))
            )
        return unflatten([flat[path] for path in wanted], flatten(like)[1])
    if flat.keys() == {""}:
        return flat[""]
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *branches, last = check_key("tree.unflatten_dict", path).split(".")
        node = tree
        for depth, branch in enumerate(branches, start=1):
            node = node.setdefault(branch, {})
            if not isinstance(node, dict):
                other = ".".join(branches[:depth])
                raise ValueError(f"tree.unflatten_dict: cannot place {path!r}: {other!r} is a leaf")
        if last in node:
            raise ValueError(f"tree.unflatten_dict: cannot place {path!r}: leaves are below it")
        node[last] = leaf
    return tree


def select(tree: Tree, where: Where, caller: str) -> dict[str, bool]:
    """Return for each path whether `where` selects it.

    Args:
        tree: any tree.
        where: a glob on dotted paths (`*` also matches dots: `*.bias`, `conv.*`), several globs, or
            a predicate `(path, leaf) -> bool`.
        caller: prefix of error messages.

    Raises:
        ValueError: a glob matches no path, which is most likely a misspelling.

    >>> select({"fc": {"weight": 0, "bias": 0}}, "*.bias", "caller")
    {'fc.weight': False, 'fc.bias': True}
    """
    flat = flatten_dict(tree)
    if callable(where):
        return {path: bool(where(path, leaf)) for path, leaf in flat.items()}
    what = "a glob, several globs, or a function (path, leaf) -> bool"
    globs = (where,) if isinstance(where, str) else as_tuple(caller, "where", where, what)
    for glob in globs:
        if not any(_matches(path, glob) for path in flat):
            raise ValueError(f"{caller}: {glob!r} matches no path; the paths are {list(flat)}")
    return {path: any(_matches(path, glob) for glob in globs) for path in flat}


@assume_constant_result  # Dynamo would trace into fnmatch, and warn about its cache
def _matches(path: str, glob: str) -> bool:
    return fnmatchcase(path, glob)
