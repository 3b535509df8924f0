"""Rows a chunk at a time, so that no more than a chunk is in memory; and what is checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fdl import tree
from fdl._checks import check_positive
from fdl._compiler._scan import scan
from fdl.tree import Tree

__all__ = ["check_chunk", "check_positive", "check_scalar", "cut", "in_chunks"]


def in_chunks(f: Callable[[Tree], Tree], rows: Tree, chunk: int | None) -> Tree:
    """Compute `f(rows)`, `chunk` rows at a time; equals `jax.lax.map(batch_size=chunk)`.

    A scan, so that a compiled program holds one copy of `f`, which `vmap(chunk_size=)` unrolls. Of
    no rows the result has no rows either; a row of zeros says which form they would have.

    Args:
        f: from rows to as many rows, each for itself: `vmap` of something.
        rows: leaves `[rows, ...]`.
        chunk: how many rows at once; all if None.
    """
    n = len(tree.leaves(rows)[0])
    if n == 0:
        zero = tree.map(lambda leaf: leaf.new_zeros(1, *leaf.shape[1:]), rows)
        return tree.map(lambda leaf: leaf[:0], f(zero))
    if chunk is None:
        return f(rows)
    found = scan(lambda carry, rows: (carry, f(rows)), (), cut(rows, chunk)[0])[1]
    return tree.map(lambda leaf: leaf.flatten(0, 1)[:n], found)


def cut(rows: Tree, chunk: int) -> tuple[Tree, Tensor]:
    """Cut rows into chunks `[chunks, chunk, ...]`, and say which are real: copies fill the last."""
    first = tree.leaves(rows)[0]
    n = first.shape[0]
    chunk = min(chunk, n)
    number = torch.arange(-(-n // chunk) * chunk, device=first.device).unflatten(0, (-1, chunk))
    return tree.map(lambda leaf: leaf[number.clamp(max=n - 1)], rows), number < n


def check_scalar(caller: str, name: str, value: Any) -> Tensor:
    """Return `value` if it is a scalar; else raise."""
    if not isinstance(value, Tensor) or value.ndim:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{caller}: {name} must give a scalar, a 0-d tensor, got {got}")
    return value


def check_chunk(caller: str, chunk: int | None) -> None:
    """Raise unless `chunk` is None or a count."""
    if chunk is not None:
        check_positive(caller, "chunk", chunk)
