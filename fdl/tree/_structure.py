"""Flatten trees quickly: a state is flattened several times in every eager update.

The containers are those of torch's pytree, which takes several times as long.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn import Parameter

from fdl.tree._paths import Tree

LEAF = None
_LEAVES = frozenset((Tensor, Parameter, type(None), int, float, bool, str))


def flatten(tree: Tree) -> tuple[list[Any], Hashable]:
    """Return the leaves of a tree, and its structure, which tells the order of keys as well.

    >>> flatten({"a": [1, None], "b": ()})[0]
    [1, None]
    """
    if torch.compiler.is_compiling():
        return pytree.tree_flatten(tree)  # which Dynamo knows
    leaves: list[Any] = []
    return leaves, _flatten(tree, leaves)


def _flatten(tree: Tree, leaves: list[Any]) -> Any:
    kind: Any = type(tree)
    if kind in _LEAVES:
        leaves.append(tree)
        return LEAF
    if kind is dict:
        keys, parts = tuple(tree), tree.values()
    elif kind is list or kind is tuple or pytree.is_namedtuple_class(kind):
        keys, parts = len(tree), tree
    else:
        more, spec = pytree.tree_flatten(tree)
        leaves += more
        return LEAF if spec.is_leaf() else spec
    # A list of leaves alone needs no list of their structures.
    if _LEAVES.issuperset(map(type, parts)):
        leaves.extend(parts)
        return kind, keys
    return kind, keys, *[_flatten(part, leaves) for part in parts]


def unflatten(leaves: Sequence[Any], structure: Hashable) -> Tree:
    """Rebuild a tree: the inverse of `flatten`.

    >>> unflatten(*flatten({"a": [1, None], "b": ()}))
    {'a': [1, None], 'b': ()}
    """
    return _unflatten(iter(leaves), structure)


def _unflatten(leaves: Iterator[Any], structure: Any) -> Tree:
    if structure is LEAF:
        return next(leaves)
    if type(structure) is not tuple:
        return pytree.tree_unflatten([next(leaves) for _ in range(structure.num_leaves)], structure)
    kind, keys, *children = structure
    if kind is dict:
        if not children:  # zip takes a key first, so it takes no leaf too many
            return dict(zip(keys, leaves, strict=False))
        return {
            key: _unflatten(leaves, child) for key, child in zip(keys, children, strict=True)
        }
    size = range(keys)
    parts = (
        [_unflatten(leaves, child) for child in children]
        if children
        else [next(leaves) for _ in size]
    )
    return parts if kind is list else tuple(parts) if kind is tuple else kind(*parts)
