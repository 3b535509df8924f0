"""Trees to lists and back, quickly: what every call of a jitted function does first and last.

The same containers as torch's own pytree, and None, which holds nothing. That takes 80 µs for the
state of a small model, to flatten, hash, compare and rebuild; an epoch of linear regression takes
200.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from fdl._dtensor import Spread, apart, is_spread, together
from fdl.tree import Tree
from fdl.tree._paths import dotted

LEAF = None
NONE = (type(None), 0)  # None has no leaves, as in JAX


def flatten(tree: Tree) -> tuple[list[Any], Hashable]:
    """List the leaves of a tree, and describe its structure by nested tuples.

    Of a leaf that is spread over processes, the part of this one is listed.

    >>> flatten({"a": [1, 2], "b": ()})[0]
    [1, 2]
    """
    leaves: list[Any] = []
    return leaves, _flatten(tree, leaves)


def _flatten(tree: Tree, leaves: list[Any]) -> Hashable:
    kind: Any = type(tree)
    if kind is Tensor:
        leaves.append(tree)
        return LEAF
    if kind is dict:
        return (kind, tuple(tree), *[_flatten(part, leaves) for part in tree.values()])
    if kind is list or kind is tuple or (issubclass(kind, tuple) and hasattr(kind, "_fields")):
        return kind, len(tree), *[_flatten(part, leaves) for part in tree]
    if tree is None:
        return NONE
    if is_spread(tree):
        part, how = apart(tree)
        leaves.append(part)
        return how
    more, spec = pytree.tree_flatten(tree)
    leaves += more
    return LEAF if spec.is_leaf() else spec


def unflatten(leaves: Iterable[Any], structure: Hashable) -> Tree:
    """Rebuild a tree.

    >>> unflatten(*flatten({"a": [1, 2], "b": ()}))
    {'a': [1, 2], 'b': ()}
    """
    return _unflatten(iter(leaves), structure, together)


def _unflatten(
    leaves: Iterator[Any], structure: Any, together: Callable[[Any, Spread], Any]
) -> Tree:
    if structure is LEAF:
        return next(leaves)
    if type(structure) is Spread:
        return together(next(leaves), structure)
    if type(structure) is not tuple:
        return pytree.tree_unflatten([next(leaves) for _ in range(structure.num_leaves)], structure)
    if structure == NONE:
        return None
    kind, keys, *children = structure
    parts = [
        next(leaves) if child is LEAF else _unflatten(leaves, child, together) for child in children
    ]
    if kind is dict:
        return dict(zip(keys, parts, strict=True))
    return parts if kind is list else tuple(parts) if kind is tuple else kind(*parts)


def paths(structure: Hashable) -> list[str]:
    """List the dotted path of each leaf.

    >>> paths(flatten({"a": [1, 2], "b": ()})[1])
    ['a.0', 'a.1']
    """
    zeros = iter(int, 1)  # without end
    whole = _unflatten(zeros, structure, lambda zero, _: zero)
    pairs = pytree.tree_flatten_with_path(whole)[0]
    return [dotted(path) for path, leaf in pairs if leaf is not None]


def form(leaves: Sequence[Tensor]) -> tuple[Any, ...]:
    """List what a program depends on: other values run the same one, other forms do not."""
    return tuple((t.shape, t.stride(), t.dtype, t.device) for t in leaves)
