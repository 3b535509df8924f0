"""Gradients of single examples: whole, their norms, or clipped and summed for DP-SGD."""

from __future__ import annotations  # Dynamo would run those of nested functions

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from fdl import random, tree
from fdl._numerics import global_norm
from fdl._random import check_key
from fdl._scan import scan
from fdl._trace import check_tensors
from fdl.data import Batch
from fdl.optim.base import check_floating
from fdl.training import takes_buffers
from fdl.transforms._chunks import check_chunk, check_scalar, cut, in_chunks
from fdl.tree import Tree

__all__ = ["clipped_grad_sum", "per_sample_grads", "per_sample_norms"]


def per_sample_grads(loss: Callable[..., Any], chunk: int | None = None) -> Callable[..., Tree]:
    """Make the gradient of each example: `(params, batch, key=None) -> grads`.

    Each leaf of the result is `[batch, *shape]`, row i for example i. The loss sees one example at
    a time, as a batch of one without a mask; example i draws from `fold_in(key, i)`. Where
    `batch.mask` is False the gradient is 0. So the sum over rows, divided by how many count, is
    the gradient of a loss that is a mean over examples (without dropout, whose masks differ).

    Equals `vmap(grad(loss))` over examples. With `chunk` the results are still whole, but what is
    computed in between exists for one chunk at a time.

    Args:
        loss: `(params, batch, key)`, or `(params, batch)` where no key is given, to a scalar or to
            `(scalar, metrics)`, as `supervised` makes it. Metrics are dropped.
        chunk: how many examples to do at once; need not divide the batch. All if None.

    Raises:
        TypeError: a loss with buffers; at call, a batch that is not `(x, y)` or `(x, y, mask)`.
        ValueError: `chunk` < 1; at call, parameters that are not floating tensors, parts of a batch
            of different lengths, or a loss that is no scalar.

    >>> loss = lambda params, batch: ((batch.x @ params["w"] - batch.y) ** 2).sum()
    >>> batch = (torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 0.0]))
    >>> per_sample_grads(loss)({"w": torch.ones(1)}, batch)
    {'w': tensor([[2.],
            [8.]])}
    """
    one = _example_grad("per_sample_grads", loss, chunk)

    def grads(params: Tree, batch: Any, key: Tensor | None = None) -> Tree:
        rows = _rows("per_sample_grads", params, batch, key)
        return in_chunks(lambda row: one(params, row), rows, chunk)

    return grads


def per_sample_norms(loss: Callable[..., Any], chunk: int | None = None) -> Callable[..., Tensor]:
    """Make the norm of the gradient of each example: `(params, batch, key=None) -> norms`.

    Norms are float64 `[batch]`, over all leaves together; 0 where `batch.mask` is False. With
    `chunk` no more gradients than those of a chunk exist at a time. Keys and errors as for
    `per_sample_grads`.

    Args:
        loss: as for `per_sample_grads`.
        chunk: how many examples to do at once; all if None.

    >>> loss = lambda params, batch: ((batch.x @ params["w"] - batch.y) ** 2).sum()
    >>> batch = (torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 0.0]))
    >>> per_sample_norms(loss)({"w": torch.ones(1)}, batch)
    tensor([2., 8.], dtype=torch.float64)
    """
    one = _example_grad("per_sample_norms", loss, chunk)

    def norms(params: Tree, batch: Any, key: Tensor | None = None) -> Tensor:
        rows = _rows("per_sample_norms", params, batch, key)
        return in_chunks(lambda row: global_norm(one(params, row)), rows, chunk)

    return norms


def clipped_grad_sum(
    loss: Callable[..., Any], max_norm: float | Tensor, chunk: int | None = None
) -> Callable[..., Tree]:
    """Make Σᵢ gᵢ / max(1, ‖gᵢ‖ / C), gᵢ the gradient of example i: `(params, batch, key=None)`.

    No example moves the sum by more than C: with noise of the deviation σC on it, this is the
    gradient of DP-SGD (Abadi et al., 2016, algorithm 1). Divide by the *expected* batch size, not
    by how many count. With `chunk` no more gradients than those of a chunk exist at a time. Keys,
    masks and errors as for `per_sample_grads`.

    Args:
        loss: as for `per_sample_grads`.
        max_norm: C, a number or a 0-d tensor.
        chunk: how many examples to do at once; all if None.

    Raises:
        ValueError: `max_norm` is not positive and finite, or a tensor with axes.

    >>> loss = lambda params, batch: ((batch.x @ params["w"] - batch.y) ** 2).sum()
    >>> batch = (torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 0.0]))
    >>> clipped_grad_sum(loss, max_norm=3.0)({"w": torch.ones(1)}, batch)     # 2 + 3
    {'w': tensor([5.])}
    """
    one = _example_grad("clipped_grad_sum", loss, chunk)
    if isinstance(max_norm, Tensor):
        if max_norm.ndim:
            raise ValueError(
                "clipped_grad_sum: max_norm must be a number or a 0-d tensor, got "
                f"{list(max_norm.shape)}"
            )
    elif not 0 < max_norm < math.inf:
        raise ValueError(f"clipped_grad_sum: max_norm must be positive and finite, got {max_norm}")

    def clipped(params: Tree, row: Any) -> Tree:
        g = one(params, row)
        over = (global_norm(g) / max_norm).clamp(min=1)
        return tree.map(lambda leaf: leaf / over.to(leaf.dtype), g)

    def total(params: Tree, batch: Any, key: Tensor | None = None) -> Tree:
        rows = _rows("clipped_grad_sum", params, batch, key)
        if chunk is None:
            return tree.map(lambda g: g.sum(0), vmap(lambda row: clipped(params, row))(rows))

        def add(sums: Tree, rows_and_real: Any) -> tuple[Tree, Tree]:
            rows, real = rows_and_real
            found = vmap(lambda row: clipped(params, row))(rows)
            # Copies of an example that fill the last chunk up do not count.
            real_sum = tree.map(lambda g: torch.tensordot(real.to(g.dtype), g, 1), found)
            return tree.map(torch.add, sums, real_sum), ()

        zeros = tree.map(torch.zeros_like, params)
        return scan(add, zeros, cut(rows, chunk))[0]

    return total


def _example_grad(
    caller: str, loss: Callable[..., Any], chunk: int | None
) -> Callable[[Tree, Any], Tree]:
    """Make the gradient of one row of `_rows`."""
    check_chunk(caller, chunk)
    if takes_buffers(loss):
        raise TypeError(
            f"{caller}: the loss has buffers, so its model may mix examples, and there is no "
            "gradient of a single one; close over buffers that do not change"
        )

    def value(params: Tree, row: Any) -> Tensor:
        x, y, _, key = row
        example = Batch(*tree.map(lambda leaf: leaf.unsqueeze(0), (x, y)))
        result = loss(params, example) if key == () else loss(params, example, key)
        return check_scalar(caller, "loss", result[0] if isinstance(result, tuple) else result)

    def gradient(params: Tree, row: Any) -> Tree:
        counts = row[2]
        g = grad(value)(params, row)
        return g if counts == () else tree.map(lambda leaf: torch.where(counts, leaf, 0), g)

    return gradient


def _rows(caller: str, params: Tree, batch: Any, key: Tensor | None) -> tuple[Tree, ...]:
    """Say of each example its x, its y, whether it counts, and its key: leaves `[batch, ...]`."""
    check_floating(params, caller)
    if not (isinstance(batch, tuple) and len(batch) in (2, 3)):
        raise TypeError(f"{caller}: batch must be (x, y) or Batch(x, y, mask), got {type(batch)}")
    batch = Batch(*batch)
    check_tensors(tree.leaves(batch), batch, f"{caller}: every leaf of the batch")
    shapes = {path: list(leaf.shape) for path, leaf in tree.flatten_dict(batch).items()}
    lengths = {tuple(shape[:1]) for shape in shapes.values()}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        raise ValueError(
            f"{caller}: the parts of a batch need one common first axis of at least 1, got {shapes}"
        )
    n = len(tree.leaves(batch)[0])
    if key is None:
        return batch.x, batch.y, batch.mask, ()
    check_key(caller, key)
    numbers = torch.arange(n, device=key.device)
    return batch.x, batch.y, batch.mask, vmap(random.fold_in, (None, 0))(key, numbers)
