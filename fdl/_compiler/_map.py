"""`map`: a function of one row, applied to every row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import vmap

from fdl import tree
from fdl._checks import check_function, check_positive
from fdl._compiler._scan import _check_xs, _has_none, _hide, _show, scan
from fdl.tree import Tree
from fdl.tree._checks import check_tensors


def map(f: Callable[[Any], Tree], xs: Tree, *, batch_size: int | None = None) -> Tree:
    """Apply `f` to each row of `xs` and stack the results; equals `jax.lax.map`.

    Without `batch_size` the rows are computed one after another, as a `scan`: peak memory is that
    of one row. With it, `batch_size` rows are computed at once, under `vmap`.

    Args:
        f: a pure function from a row, a tree of tensors, to a tree of tensors.
        xs: a tree of tensors with one common first axis; row `i` is `leaf[i]`.
        batch_size: how many rows to compute at once. It need not divide the number of rows: the
            last batch is filled up with copies of the last row, whose results are dropped.

    Returns:
        The results, stacked along a new first axis. If there are no rows, the leaves are empty;
        `f` runs once on zeros to find out their shapes and dtypes.

    Raises:
        TypeError: a leaf of `xs` or of a result is not a tensor, a leaf of `xs` is a DTensor (every
            path is listed), or `batch_size` is not an int.
        ValueError: `xs` has no common first axis, or `batch_size` < 1.

    >>> map(lambda x: x @ x, torch.eye(2) * 3)
    tensor([9., 9.])
    >>> map(lambda x: x @ x, torch.eye(5), batch_size=2)
    tensor([1., 1., 1., 1., 1.])
    """
    check_function("map", "f", f)
    if batch_size is not None:
        check_positive("map", "batch_size", batch_size)
    has_none, xs = _has_none(xs), _hide(xs)
    n = _check_xs("map", xs)

    def row(x: Tree) -> Tree:
        y = _hide(f(_show(x) if has_none else x))
        check_tensors(tree.leaves(y), y, "map: every leaf of the result of f")
        return y

    if batch_size is None or n == 0:
        ys = scan(lambda carry, x: (carry, row(x)), (), xs)[1]
    else:
        ys = map_batches(vmap(row), xs, batch_size)
    return _show(ys)


def map_batches(f: Callable[[Tree], Tree], xs: Tree, batch_size: int | None) -> Tree:
    """Compute `f(xs)`, `batch_size` rows at a time, or all at once if it is None.

    A `scan`: the compiled program holds one copy of `f`, where `vmap(chunk_size=)` would unroll it.

    Args:
        f: maps rows to the same number of rows, each independent of the others.
        xs: leaves `[rows, ...]`. If there are no rows, one row of zeros gives the result's shapes.
        batch_size: how many rows to compute at once.
    """
    n = len(tree.leaves(xs)[0])
    if n == 0:
        zero = tree.map(lambda leaf: leaf.new_zeros(1, *leaf.shape[1:]), xs)
        return tree.map(lambda leaf: leaf[:0], f(zero))
    if batch_size is None or batch_size >= n:
        return f(xs)
    ys = scan(lambda carry, batch: (carry, f(batch)), (), split_batches(xs, batch_size)[0])[1]
    return pytree.tree_map_only(Tensor, lambda y: y.flatten(0, 1)[:n], ys)  # scan may return None


def split_batches(xs: Tree, batch_size: int) -> tuple[Tree, Tensor]:
    """Split rows into `[batches, batch_size, ...]`; copies of the last row fill the last batch.

    Returns:
        The batches, and a mask `[batches, batch_size]` that is False for the copies.
    """
    first = tree.leaves(xs)[0]
    n = len(first)
    missing = -n % batch_size

    def split(leaf: Tensor) -> Tensor:
        if missing:  # detached, so that the last row has no derivative but its own
            leaf = torch.cat([leaf, leaf[-1:].detach().expand(missing, *leaf.shape[1:])])
        return leaf.unflatten(0, (-1, batch_size))

    is_row = torch.arange(n + missing, device=first.device) < n
    return tree.map(split, xs), is_row.unflatten(0, (-1, batch_size))
