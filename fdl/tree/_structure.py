"""Flatten trees quickly: a state is flattened several times in every eager update.

The containers are those of torch's pytree, which takes several times as long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn import Parameter

from fdl.tree._paths import Tree

LEAF = None
_LEAVES = frozenset((Tensor, Parameter, type(None), int, float, bool, str))


def flatten(tree: Tree) -> tuple[list[Any], Any]:
    """Return the leaves of a tree, and its structure, with the order of keys.

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
    return kind, keys, [_flatten(part, leaves) for part in parts]


def unflatten(leaves: Sequence[Any], structure: Any) -> Tree:
    """Rebuild a tree: the inverse of `flatten`.

    >>> unflatten(*flatten({"a": [1, None], "b": ()}))
    {'a': [1, None], 'b': ()}
    """
    return _unflatten(iter(leaves), structure)


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
