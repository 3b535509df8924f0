"""Sums over the processes of a group, of all leaves of a tree at once.

Leaves are sent in the order of their sorted paths, since the same dict may have been filled in a
different order in another process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fdl import tree
from fdl._dtensor import is_dtensor, sum_to_shards
from fdl.parallel._group import T
from fdl.tree import Tree


def sum_over(summands: T, group: Any, like: Tree | None = None) -> T:
    """Sum every leaf over the processes, with one message for all replicated leaves of a dtype.

    A leaf for which `like` has a DTensor has a message of its own, and the sum is sharded like it.
    """
    if group is None:
        return summands
    from torch.distributed._functional_collectives import all_reduce

    flat, likes = tree.flatten_dict(summands), tree.flatten_dict(summands if like is None else like)
    spread = {p: sum_to_shards(flat[p], likes[p]) for p in sorted(flat) if is_dtensor(likes[p])}
    rest = {path: leaf for path, leaf in flat.items() if path not in spread}
    rest = _by_dtype(rest, lambda flat: all_reduce(flat, "sum", group), 0)
    return tree.unflatten_dict(rest | spread, like=summands)


def sum_in_order(summands: T, group: Any, size: int) -> T:
    """Sum leaves [own, …] over the first axis and the processes, in an order independent of N."""
    from torch.distributed import _functional_collectives as collectives

    gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor

    def total(flat: Tensor) -> Tensor:
        flat = _by_pairs(flat)
        if group is not None:
            flat = _by_pairs(gather(flat, 0, group).view(size, -1))
        return flat[0]

    return tree.unflatten_dict(_by_dtype(tree.flatten_dict(summands), total, 1), like=summands)


def _by_pairs(x: Tensor) -> Tensor:
    """Sum [n, …] to [1, …] pairwise: neighbours, then neighbours of these sums, and so on.

    >>> _by_pairs(torch.arange(5)[:, None])
    tensor([[10]])
    """
    while len(x) > 1:
        even = len(x) // 2 * 2
        x = torch.cat([x[0:even:2] + x[1:even:2], x[even:]])
    return x


def _by_dtype(
    flat: dict[str, Tensor], reduce: Callable[[Tensor], Tensor], first: int
) -> dict[str, Tensor]:
    """Apply a function to all leaves of a dtype at once, with the axes from `first` flattened."""
    done, flat = {}, {path: flat[path] for path in sorted(flat)}
    for dtype in dict.fromkeys(leaf.dtype for leaf in flat.values()):
        some = {path: leaf for path, leaf in flat.items() if leaf.dtype == dtype}
        shapes = [leaf.shape[first:] for leaf in some.values()]
        rows = [leaf.reshape(*leaf.shape[:first], -1) for leaf in some.values()]
        pieces = reduce(torch.cat(rows, first)).split([shape.numel() for shape in shapes])
        for path, shape, piece in zip(some, shapes, pieces, strict=True):
            done[path] = piece.view(shape)
    return done
