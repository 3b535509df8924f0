"""`scan` as a Python loop, and the checks that all its implementations share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl import tree
from fdl._dtensor import is_dtensor
from fdl.tree import Tree
from fdl.tree._checks import check_tensors
from fdl.tree._map import match


def row_of(xs: Tree, i: int) -> Tree:
    return tree.map(lambda leaf: leaf[i], xs)


def check_carry(init: Tree, carry: Tree, caller: str = "scan", f: str = "f") -> Tree:
    """Check that `carry` is like `init`, and return it with its keys in the order of `init`."""
    leaves = match(init, carry, f"{caller}: the carry that {f} returned")
    check_tensors(leaves, carry, f"{caller}: every leaf of the carry that {f} returned")
    for before, after in zip(tree.leaves(init), leaves, strict=True):
        if before.shape != after.shape or before.dtype != after.dtype:
            lines = tree.diff(init, carry, values=False)
            raise ValueError(
                f"{caller}: {f} must keep the structure, shapes and dtypes of the carry:\n  "
                + "\n  ".join(lines)
            )
        if _placements(before) != _placements(after):
            raise ValueError(
                f"{caller}: {f} must keep the placements of DTensors in the carry: expected "
                f"{_placements(before)}, got {_placements(after)}, shape {list(after.shape)}"
            )
    return pytree.tree_unflatten(leaves, pytree.tree_structure(init))


def check_not_sharded(caller: str, part: Tree, name: str) -> None:
    sharded = [path for path, leaf in tree.flatten_dict(part).items() if is_dtensor(leaf)]
    if sharded:
        raise TypeError(
            f"{caller}: {name} must not be sharded, got DTensors at {', '.join(sharded)}; gather "
            "them (fdl.parallel.gather) or keep them in the carry"
        )


def _placements(leaf: Any) -> Any:
    return leaf.placements if is_dtensor(leaf) else None


def scan_as_loop(f: Callable[..., Any], init: Tree, xs: Tree, length: int) -> tuple[Tree, Tree]:
    carry, ys = init, []
    for i in range(length):
        new, y = f(carry, row_of(xs, i))
        carry = check_carry(init, new)
        check_tensors(tree.leaves(y), y, "scan: every leaf of y")
        check_not_sharded("scan", y, "y")
        ys.append(y)
    return carry, tree.map(lambda *rows: torch.stack(rows), *ys)


def contiguous_copy(leaf: Tensor) -> Tensor:
    return leaf.clone(memory_format=torch.contiguous_format)
