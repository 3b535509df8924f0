"""`scan` as a Python loop, and the checks that every way of running it shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl import tree
from fdl._dtensor import is_spread
from fdl.tree import Tree
from fdl.tree._checks import check_tensors
from fdl.tree._map import match


def _row(xs: Tree, i: int) -> Tree:
    return tree.map(lambda leaf: leaf[i], xs)


def _checked_carry(init: Tree, carry: Tree) -> Tree:
    """Return `carry` with its leaves in the order of `init`, having compared their forms."""
    found = match(init, carry, "scan: the carry that f returned")
    check_tensors(found, carry, "scan: every leaf of the carry that f returned")
    for before, after in zip(tree.leaves(init), found, strict=True):
        if before.shape != after.shape or before.dtype != after.dtype:
            lines = tree.diff(init, carry, values=False)
            raise ValueError(
                "scan: f must return a carry of the form it was given:\n  " + "\n  ".join(lines)
            )
        if _placements(before) != _placements(after):
            raise ValueError(
                "scan: f must return a carry that is spread as it was given: expected "
                f"{_placements(before)}, got {_placements(after)}, shape {list(after.shape)}"
            )
    return pytree.tree_unflatten(found, pytree.tree_structure(init))


def _check_whole(part: Tree, name: str) -> None:
    spread = [path for path, leaf in tree.flatten_dict(part).items() if is_spread(leaf)]
    if spread:
        raise TypeError(
            f"scan: {name} must be whole, got leaves spread over processes: {', '.join(spread)}; "
            "gather them (fdl.parallel.gather), or keep them in the carry"
        )


def _placements(leaf: Any) -> Any:
    return leaf.placements if is_spread(leaf) else None


def _scan_as_loop(f: Callable[..., Any], init: Tree, xs: Tree, length: int) -> tuple[Tree, Tree]:
    carry, ys = init, []
    for i in range(length):
        new, y = f(carry, _row(xs, i))
        carry = _checked_carry(init, new)
        check_tensors(tree.leaves(y), y, "scan: every leaf of y")
        _check_whole(y, "y")
        ys.append(y)
    return carry, tree.map(lambda *rows: torch.stack(rows), *ys)


def _fresh(leaf: Tensor) -> Tensor:
    return leaf.clone(memory_format=torch.contiguous_format)
