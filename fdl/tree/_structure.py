"""Flatten trees quickly: an eager update flattens the parameters and the state several times.

The containers are those of torch's pytree, which takes several times as long. For the structures
that come up again and again, functions are generated that unpack and build such a tree at once, as
the standard library does for its dataclasses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn import Parameter

Tree = Any
LEAF = None
_LEAVES = frozenset((Tensor, Parameter, type(None), int, float, bool, str))


def flatten(tree: Tree) -> tuple[list[Any], Any]:
    """Return the leaves of a tree, and its structure, which equals that of trees like it.

    >>> flatten({"a": [1, None], "b": ()})[0]
    [1, None]
    """
    if torch.compiler.is_compiling():
        return pytree.tree_flatten(tree)  # which Dynamo knows
    for code in _codes:
        leaves = code.take(tree)
        if leaves is not None:
            return leaves, code
    leaves = []
    structure = _flatten(tree, leaves)
    if len(leaves) in SIZES:
        _remember(structure)
    return leaves, structure


def _flatten(tree: Tree, leaves: list[Any]) -> Any:
    kind: Any = type(tree)
    if kind in _LEAVES:
        leaves.append(tree)
        return LEAF
    keys: Any
    if kind is dict:
        keys, parts = tuple(tree), tree.values()
    elif kind is list or kind is tuple or pytree.is_namedtuple_class(kind):
        keys, parts = len(tree), tree
    else:
        more, spec = pytree.tree_flatten(tree)
        leaves += more
        return LEAF if spec.is_leaf() else spec
    if _LEAVES.issuperset(map(type, parts)):
        leaves.extend(parts)
        return kind, keys, None
    return kind, keys, tuple([_flatten(part, leaves) for part in parts])


def unflatten(leaves: Iterable[Any], structure: Any) -> Tree:
    """Rebuild a tree: the inverse of `flatten`.

    >>> unflatten(*flatten({"a": [1, None], "b": ()}))
    {'a': [1, None], 'b': ()}
    """
    return (
        structure.build(leaves) if type(structure) is _Code else _unflatten(iter(leaves), structure)
    )


def _unflatten(leaves: Iterator[Any], structure: Any) -> Tree:
    if structure is LEAF:
        return next(leaves)
    if type(structure) is not tuple:
        return pytree.tree_unflatten(islice(leaves, structure.num_leaves), structure)
    kind, keys, children = structure
    if kind is dict:
        if children is None:
            return dict(zip(keys, leaves, strict=False))  # which takes a key before a leaf
        return dict(zip(keys, [_unflatten(leaves, child) for child in children], strict=True))
    if children is None:
        parts = list(islice(leaves, keys))
    else:
        parts = [_unflatten(leaves, child) for child in children]
    return parts if kind is list else tuple(parts) if kind is tuple else kind(*parts)


class _Code(NamedTuple):
    """Functions generated for a structure."""

    take: Callable[[Tree], list[Any] | None]  # the leaves, or None if the structure is another
    build: Callable[[Iterable[Any]], Tree]


SIZES = range(16, 2049)  # of trees for which functions are generated
OFTEN = 32  # times that such a tree has to be flattened; twice as many after every KEPT structures
KEPT = 8
_codes: tuple[_Code, ...] = ()
_times: Counter[Any] = Counter()
_generated = 0


def _remember(structure: Any) -> None:
    """Count a structure, and generate functions for one that is frequent."""
    global _codes, _generated
    if not is_plain(structure):
        return
    if len(_times) > 8 * KEPT:
        _times.clear()
    _times[structure] += 1
    if _times[structure] >= OFTEN << _generated // KEPT:
        _times.pop(structure, None)
        _generated += 1
        _codes = (generate(structure), *_codes)[:KEPT]


def is_plain(structure: Any, depth: int = 0) -> bool:
    """Return True for dicts with strings as keys, sequences and leaves, not nested too deeply.

    >>> is_plain(flatten({"a": [1, None], "b": ()})[1]), is_plain(flatten({3: 1})[1])
    (True, False)
    """
    if structure is LEAF or type(structure) is _Code:
        return True
    if type(structure) is not tuple or depth > 20:
        return False
    kind, keys, children = structure
    if kind is dict and not {str}.issuperset(map(type, keys)):
        return False
    return all(is_plain(child, depth + 1) for child in children or ())


def generate(structure: Any) -> _Code:
    """Generate the functions for a structure of dicts with strings as keys, sequences and leaves.

    >>> code = generate(flatten({"a": [1, None], "b": ()})[1])
    >>> code.take({"a": [3, 4], "b": ()}), code.take({"a": [3], "b": ()}), code.build([5, 6])
    ([3, 4], None, {'a': [5, 6], 'b': ()})
    """
    numbers, unpacking, leaves = count(), ["def take(t):"], []
    names: dict[str, Any] = {"LEAVES": _LEAVES}

    def visit(node: Any, name: str) -> str:
        """Write what unpacks a node, and return the expression that builds it."""
        if node is LEAF:
            leaves.append(name)
            return name
        kind, keys, children = node
        names[f"kind_{name}"], names[f"keys_{name}"] = kind, keys
        parts = [f"x{next(numbers)}" for _ in (keys if kind is dict else range(keys))]
        own, values = ("tuple", f"{name}.values()") if kind is dict else ("len", name)
        unpacking.append(f" if type({name}) is not kind_{name} or {own}({name}) != keys_{name}:")
        unpacking.append(f"  return None\n [{', '.join(parts)}] = {values}")
        built = [visit(*each) for each in zip(children or [LEAF] * len(parts), parts, strict=True)]
        inside = ", ".join(built)
        if kind is dict:
            inside = ", ".join(f"{k!r}: {x}" for k, x in zip(keys, built, strict=True))
            return f"{{{inside}}}"
        if kind is tuple:
            return f"({inside},)" if built else "()"
        return f"[{inside}]" if kind is list else f"kind_{name}({inside})"

    built, taken = visit(structure, "t"), f"[{', '.join(leaves)}]"
    unpacking.append(f" leaves = {taken}")
    unpacking.append(" return leaves if LEAVES.issuperset(map(type, leaves)) else None")
    building = ["def build(leaves):", f" {taken} = leaves", f" return {built}"]
    exec("\n".join(unpacking + building), names)
    return _Code(names["take"], names["build"])
