"""Fast flattening of trees, and the signature of their leaves: the key of a program.

Supports the containers of torch's pytree; None is an empty tree. Every call of a jitted function
starts and ends here, so speed matters: torch's pytree takes 80 µs to flatten, hash, compare and
rebuild the state of a small model, and an epoch of linear regression takes 200 µs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import count
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl._dtensor import DTensorSpec, from_local, is_dtensor, to_local
from fdl.tree import Tree
from fdl.tree._checks import check_tensors
from fdl.tree._paths import dotted

LEAF = None
NONE = (type(None), 0)  # as in JAX, None has no leaves


def flatten(tree: Tree) -> tuple[list[Any], Hashable]:
    """Return the leaves of a tree, and its structure as nested tuples.

    A DTensor contributes its local tensor as a leaf, and its `DTensorSpec` to the structure.

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
    if is_dtensor(tree):
        local, dtensor_spec = to_local(tree)
        leaves.append(local)
        return dtensor_spec
    more, spec = pytree.tree_flatten(tree)
    leaves += more
    return LEAF if spec.is_leaf() else spec


def unflatten(leaves: Iterable[Any], structure: Hashable) -> Tree:
    """Rebuild a tree: the inverse of `flatten`.

    >>> unflatten(*flatten({"a": [1, 2], "b": ()}))
    {'a': [1, 2], 'b': ()}
    """
    return _unflatten(iter(leaves), structure, from_local)


def _unflatten(
    leaves: Iterator[Any], structure: Any, to_dtensor: Callable[[Any, DTensorSpec], Any]
) -> Tree:
    if structure is LEAF:
        return next(leaves)
    if type(structure) is DTensorSpec:
        return to_dtensor(next(leaves), structure)
    if type(structure) is not tuple:
        return pytree.tree_unflatten([next(leaves) for _ in range(structure.num_leaves)], structure)
    if structure == NONE:
        return None
    kind, keys, *children = structure
    parts = [
        next(leaves) if child is LEAF else _unflatten(leaves, child, to_dtensor)
        for child in children
    ]
    if kind is dict:
        return dict(zip(keys, parts, strict=True))
    return parts if kind is list else tuple(parts) if kind is tuple else kind(*parts)


def unordered(structure: Any) -> Hashable:
    """Return a structure that equals another's if only the order of keys in dicts differs.

    >>> _, there = flatten({"a": 1, "b": ()})
    >>> _, back = flatten({"b": (), "a": 1})
    >>> there == back, unordered(there) == unordered(back)
    (False, True)
    """
    if type(structure) is not tuple or structure == NONE:
        return cast(Hashable, structure)
    kind, keys, *children = structure
    parts = [unordered(child) for child in children]
    return kind, frozenset(zip(keys, parts, strict=True)) if kind is dict else (keys, *parts)


def positions(like: Hashable, structure: Hashable) -> list[int]:
    """Return for each leaf of one structure its index among the leaves of another.

    Args:
        like: a structure.
        structure: the same, but for the order of keys in dicts.

    >>> here, there = {"a": 1, "b": (2, 3)}, {"b": (2, 3), "a": 1}
    >>> positions(flatten(here)[1], flatten(there)[1])
    [2, 0, 1]
    """
    numbered = _unflatten(count(), structure, lambda i, _: i)
    return flatten(_arrange(numbered, like))[0]


def _arrange(tree: Any, like: Any) -> Tree:
    """Put the keys of the dicts in a tree into the order that a structure has."""
    if type(like) is not tuple or like == NONE:
        return tree
    kind, keys, *children = like
    if kind is dict:
        return {key: _arrange(tree[key], child) for key, child in zip(keys, children, strict=True)}
    return [_arrange(part, child) for part, child in zip(tree, children, strict=True)]


def paths(structure: Hashable) -> list[str]:
    """List the dotted path of each leaf.

    >>> paths(flatten({"a": [1, 2], "b": ()})[1])
    ['a.0', 'a.1']
    """
    zeros = iter(int, 1)  # infinite
    example = _unflatten(zeros, structure, lambda zero, _: zero)
    try:
        pairs = pytree.tree_flatten_with_path(example)[0]
    except ValueError:  # a class that was registered without paths
        return [str(i) for i in range(len(pytree.tree_leaves(example)))]
    return [dotted(path) for path, leaf in pairs if leaf is not None]


def argument_names(fn: Callable[..., Any], structure: Hashable) -> list[str]:
    """List the dotted path of each leaf of the arguments, below the names of parameters.

    >>> argument_names(lambda w, x: x, flatten((({"a": 1, "b": None}, 2), {}))[1])
    ['w.a', 'x']
    """
    args, kwargs = _unflatten(count(), structure, lambda number, _: number)
    try:
        pairs = pytree.tree_flatten_with_path(_by_parameter(fn, args, kwargs))[0]
    except ValueError:  # a class that was registered without paths
        return paths(structure)
    names = {number: dotted(path) for path, number in pairs if number is not None}
    return [names[number] for number in sorted(names)]


def _by_parameter(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tree:
    """Return the arguments of a function by the names of its parameters, if it has a signature."""
    try:
        return inspect.signature(fn).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # without a signature, or one that does not fit
        return args, kwargs


def runs_in_python(leaf: Any) -> bool:
    """Check for a tensor whose operations are defined in Python, such as a FakeTensor.

    >>> runs_in_python(torch.ones(1))
    False
    """
    if type(leaf) is Tensor or not isinstance(leaf, Tensor):
        return False
    return torch._C._dispatch_keys(leaf).has(torch._C.DispatchKey.Python)


def signature(leaves: Sequence[Tensor]) -> tuple[Any, ...]:
    """Return shape, stride, dtype and device of each tensor: what a program is specialised to."""
    return tuple((t.shape, t.stride(), t.dtype, t.device) for t in leaves)


def resolved(leaves: list[Tensor]) -> list[Tensor]:
    """Compute lazy conjugates and negatives, of which compiled programs know nothing.

    >>> resolved([torch.tensor([1j]).conj()])[0].is_conj()
    False
    """
    if any(leaf.is_neg() or leaf.is_conj() for leaf in leaves):
        return [leaf.resolve_neg().resolve_conj() for leaf in leaves]
    return leaves


def check_arguments(
    fn: Callable[..., Any], leaves: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raise a TypeError with every path unless all leaves are tensors, and none is sparse."""
    if all(isinstance(leaf, Tensor) and leaf.layout is torch.strided for leaf in leaves):
        return
    named = _by_parameter(fn, args, kwargs)
    check_tensors(leaves, named, "jit: every leaf of an argument")
    pairs, _ = pytree.tree_flatten_with_path(named)
    sparse = [
        f"{dotted(path)}: {leaf.layout}"
        for path, leaf in pairs
        if leaf.layout is not torch.strided and not runs_in_python(leaf)
    ]
    if sparse:
        raise TypeError(
            "jit: every leaf of an argument must be dense; pass x.to_dense(), or call the function "
            "without jit. Not dense:\n  " + "\n  ".join(sparse)
        )
