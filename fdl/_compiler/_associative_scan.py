"""`associative_scan`: all prefixes of a sequence in logarithmic depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl import tree
from fdl._checks import check_function, describe
from fdl.tree import Tree
from fdl.tree._checks import check_tensors
from fdl.tree._map import match


def associative_scan(
    fn: Callable[[Any, Any], Any], elems: Tree, reverse: bool = False, axis: int = 0
) -> Tree:
    """Combine all prefixes of a sequence by `fn`; equals `jax.lax.associative_scan`.

    For elements `a, b, c` the result is `a, fn(a, b), fn(fn(a, b), c)`. `fn` is called about
    2 log₂(n) times, on many elements at once.

    Args:
        fn: an associative function of two trees like `elems`, of equal length along `axis`, which
            returns a tree like each of them.
        elems: a tree of tensors with one common size along `axis`.
        reverse: combine suffixes instead, from the end: `fn(fn(c, b), a), fn(c, b), c`.
        axis: the axis along which to combine.

    Returns:
        A tree like `elems`.

    Raises:
        TypeError: a leaf of `elems` or of a result of `fn` is not a tensor.
        ValueError: the leaves have no common size along `axis`, or `fn` changed the structure, a
            shape or a dtype.

    Source: Blelloch, Prefix sums and their applications, 1990.

    >>> associative_scan(torch.add, torch.arange(1, 6))
    tensor([ 1,  3,  6, 10, 15])
    >>> associative_scan(torch.maximum, torch.tensor([1, 3, 2]), reverse=True)
    tensor([3, 3, 2])
    """
    check_function("associative_scan", "fn", fn, "of two trees")
    if not isinstance(axis, int):
        raise TypeError(f"associative_scan: axis must be an int, got {describe(axis)}")
    check_tensors(tree.leaves(elems), elems, "associative_scan: every leaf of elems")
    leaves, spec = pytree.tree_flatten(elems)
    axes = [axis + leaf.ndim if axis < 0 else axis for leaf in leaves]
    sizes = {
        leaf.shape[at] if 0 <= at < leaf.ndim else None
        for leaf, at in zip(leaves, axes, strict=True)
    }
    if len(sizes) != 1 or None in sizes:
        shapes = {path: list(leaf.shape) for path, leaf in tree.flatten_dict(elems).items()}
        raise ValueError(
            f"associative_scan: elems needs one common size along axis {axis}, got shapes {shapes}"
        )

    def combine(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
        x, y = (
            pytree.tree_unflatten(
                [leaf.movedim(0, at) for leaf, at in zip(z, axes, strict=True)], spec
            )
            for z in (left, right)
        )
        result = fn(x, y)
        results = match(x, result, "associative_scan: the result of fn")
        check_tensors(results, result, "associative_scan: every leaf of the result of fn")
        if any(_form(a) != _form(b) for a, b in zip(tree.leaves(x), results, strict=True)):
            lines = tree.diff(x, result, values=False)
            raise ValueError(
                "associative_scan: fn must keep the structure, shapes and dtypes:\n  "
                + "\n  ".join(lines)
            )
        return [leaf.movedim(at, 0) for leaf, at in zip(results, axes, strict=True)]

    rows = [leaf.movedim(at, 0) for leaf, at in zip(leaves, axes, strict=True)]
    rows = [leaf.flip(0) for leaf in rows] if reverse else rows
    rows = _prefixes(combine, rows)
    rows = [leaf.flip(0) for leaf in rows] if reverse else rows
    return pytree.tree_unflatten(
        [leaf.movedim(0, at) for leaf, at in zip(rows, axes, strict=True)], spec
    )


def _form(leaf: Tensor) -> tuple[torch.Size, torch.dtype]:
    return leaf.shape, leaf.dtype


def _prefixes(
    combine: Callable[[list[Tensor], list[Tensor]], list[Tensor]], rows: list[Tensor]
) -> list[Tensor]:
    n = len(rows[0])
    if n < 2:
        return [leaf.clone() for leaf in rows]
    pairs = combine([leaf[: n - 1 : 2] for leaf in rows], [leaf[1::2] for leaf in rows])
    odd = _prefixes(combine, pairs)  # prefixes that end at rows 1, 3, 5, …
    even = [leaf[:1] for leaf in rows]
    if n > 2:
        more = combine([leaf[: (n - 1) // 2] for leaf in odd], [leaf[2::2] for leaf in rows])
        even = [torch.cat(z) for z in zip(even, more, strict=True)]
    return [_interleave(x, y) for x, y in zip(even, odd, strict=True)]


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    pairs = torch.stack([even[: len(odd)], odd], 1).flatten(0, 1)
    return torch.cat([pairs, even[len(odd) :]]) if len(even) > len(odd) else pairs
