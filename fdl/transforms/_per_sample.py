"""Gradients of single examples, their norms, and their clipped sum for DP-SGD."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from fdl import random, tree
from fdl._checks import check_number
from fdl._compiler._map import map_batches, split_batches
from fdl._compiler._scan import scan
from fdl._numerics import at_least_32_bits, is_visible, keep, row_norms
from fdl._training._checks import check_loss
from fdl._training._loss import StatefulLoss
from fdl.data import Batch
from fdl.optim._base import check_floating
from fdl.random._checks import check_key
from fdl.transforms._checks import check_chunk, check_scalar
from fdl.tree import Tree
from fdl.tree._checks import check_tensors


def per_sample_grads(loss: Callable[..., Any], chunk: int | None = None) -> Callable[..., Tree]:
    """Make the gradient of each example: `(params, batch, *, train, key) -> grads`.

    Each leaf of the result is `[batch, *shape]`, row i for example i. The loss gets one example at
    a time, as a batch of one without a mask; example i draws from `fold_in(key, i)`. The gradient
    is 0 where `batch.mask` is False. For a loss that is a mean over examples, the sum over rows
    divided by the number of unmasked examples is its gradient (except for dropout masks).

    Equals `vmap(grad(loss))` over examples. With `chunk`, intermediate values exist for one chunk
    at a time; the result is the same.

    Args:
        loss: `(params, batch, *, train, key)` to a scalar or to `(scalar, metrics)`, as
            `supervised` makes it; `train` is False unless given. Metrics are dropped.
        chunk: how many examples to compute at once; need not divide the batch. All if None.

    Raises:
        TypeError: the loss has buffers; at call, the batch is not `(x, y)` or `(x, y, mask)`.
        ValueError: `chunk` < 1; at call, parameters are not floating tensors, parts of the batch
            have different lengths, or the loss is not a scalar.

    >>> loss = lambda params, batch, **_: ((batch.x @ params["w"] - batch.y) ** 2).sum()
    >>> batch = (torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 0.0]))
    >>> per_sample_grads(loss)({"w": torch.ones(1)}, batch)
    {'w': tensor([[2.],
            [8.]])}
    """
    one = _example_grad("per_sample_grads", loss, chunk)

    def grads(params: Tree, batch: Any, *, train: bool = False, key: Tensor | None = None) -> Tree:
        rows = _rows("per_sample_grads", params, batch, key)

        def of_chunk(rows: Tree) -> Tree:
            return tree.map(lambda g: _zero_masked(rows, g), one(params, rows, train))

        return map_batches(of_chunk, rows, chunk)

    return grads


def per_sample_norms(loss: Callable[..., Any], chunk: int | None = None) -> Callable[..., Tensor]:
    """Make the norm of the gradient of each example: `(params, batch, *, train, key) -> norms`.

    Norms are `[batch]`, over all leaves together, accumulated in float64 and returned in the dtype
    of the parameters, but at least float32; 0 where `batch.mask` is False. With `chunk`, only the
    gradients of one chunk exist at a time. Keys and errors as for `per_sample_grads`.

    Args:
        loss: as for `per_sample_grads`.
        chunk: how many examples to compute at once; all if None.

    >>> loss = lambda params, batch, **_: ((batch.x @ params["w"] - batch.y) ** 2).sum()
    >>> batch = (torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 0.0]))
    >>> per_sample_norms(loss)({"w": torch.ones(1)}, batch)
    tensor([2., 8.])
    """
    one = _example_grad("per_sample_norms", loss, chunk)

    def norms(
        params: Tree, batch: Any, *, train: bool = False, key: Tensor | None = None
    ) -> Tensor:
        rows = _rows("per_sample_norms", params, batch, key)

        def of_chunk(rows: Tree) -> Tensor:
            grads = one(params, rows, train)
            wide = functools.reduce(torch.promote_types, map(at_least_32_bits, tree.leaves(grads)))
            return _zero_masked(rows, row_norms(grads).to(wide))

        return map_batches(of_chunk, rows, chunk)

    return norms


def clipped_grad_sum(
    loss: Callable[..., Any], max_norm: float | Tensor, chunk: int | None = None
) -> Callable[..., Tree]:
    """Make Σᵢ gᵢ / max(1, ‖gᵢ‖ / C), gᵢ the gradient of example i.

    The result is a function `(params, batch, *, train=False, key=None) -> sum`.

    No example changes the sum by more than C, whatever it contains: a gradient whose norm is not
    finite, or more than 10³⁷ C, counts as 0. With noise of standard deviation σC added, the sum is
    the gradient of DP-SGD (Abadi et al., 2016, algorithm 1). Divide by the *expected* batch size,
    not by the number of unmasked examples. With `chunk`, only the gradients of one chunk exist at a
    time. Keys, masks and errors as for `per_sample_grads`.

    Norms and sums are computed in at least 32 bits, and the sum is rounded once to the dtype of the
    parameters. In 16 bits that rounding can change the sum by more than C (in bfloat16, a sum of
    1,000 C by 4 C): for a privacy guarantee keep the parameters in float32, and compute in 16 bits
    with `fdl.nn.with_policy`.

    Args:
        loss: as for `per_sample_grads`.
        max_norm: C, a number or a 0-d tensor. Under `jit` and `vmap`, where its value is unknown, a
            C that is not positive and finite makes the sum 0.
        chunk: how many examples to compute at once; all if None.

    Raises:
        ValueError: `max_norm` is not positive and finite, or a tensor with axes.

    >>> loss = lambda params, batch, **_: ((batch.x @ params["w"] - batch.y) ** 2).sum()
    >>> batch = (torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 0.0]))
    >>> clipped_grad_sum(loss, max_norm=3.0)({"w": torch.ones(1)}, batch)     # 2 + 3
    {'w': tensor([5.])}
    """
    one = _example_grad("clipped_grad_sum", loss, chunk)
    _check_bound(max_norm)

    def clipped_sum(params: Tree, rows: Tree, is_row: Tensor, train: bool) -> Tree:
        grads = one(params, rows, train)
        norms = row_norms(grads)
        bound = torch.as_tensor(max_norm, dtype=norms.dtype, device=norms.device)
        positive = (bound > 0) & bound.isfinite()
        counts = norms.isfinite() & positive & is_row & (rows[2] == () or rows[2] != 0)
        over = (torch.where(counts, norms, 0) / torch.where(positive, bound, 1)).clamp(min=1)
        exact = over < 1 / torch.finfo(torch.float32).tiny  # else 1 / over is subnormal
        weights = torch.where(counts & exact, 1 / over, 0)
        return tree.map(lambda g: _weighted_sum(weights, g), grads)

    def total(params: Tree, batch: Any, *, train: bool = False, key: Tensor | None = None) -> Tree:
        rows = _rows("clipped_grad_sum", params, batch, key)
        zeros = tree.map(lambda p: torch.zeros_like(p, dtype=at_least_32_bits(p)), params)
        first = tree.leaves(rows)[0]
        if len(first) == 0:
            sums = zeros
        elif chunk is None:
            sums = clipped_sum(params, rows, first.new_ones(len(first), dtype=torch.bool), train)
        else:

            def add(sums: Tree, some_rows: Any) -> tuple[Tree, Tree]:
                chunk_rows, is_row = some_rows
                return tree.map(torch.add, sums, clipped_sum(params, chunk_rows, is_row, train)), ()

            sums = scan(add, zeros, split_batches(rows, min(chunk, len(first))))[0]
        return tree.map(lambda g, p: g.to(p.dtype), sums, params)

    return total


def _weighted_sum(weights: Tensor, rows: Tensor) -> Tensor:
    """Compute Σᵢ wᵢ rᵢ in at least 32 bits; rows of weight 0 may contain anything, such as NaN.

    Args:
        weights: `[rows]`
        rows: `[rows, ...]`
    """
    dtype = at_least_32_bits(rows)
    rows, weights = rows.to(dtype), weights.to(dtype)
    if is_visible(weights):  # a matrix product, without a copy of the rows
        return torch.tensordot(weights, rows if weights.all() else keep(weights, rows), 1)
    # as_strided makes Inductor materialise both before the kernel that multiplies and adds. Fused
    # into it they would be too many operations, and Inductor would materialise the rows instead.
    weights, counts = (x.as_strided(x.shape, (1,)) for x in (weights, weights != 0))
    return (keep(counts, rows) * weights.view(-1, *[1] * (rows.ndim - 1))).sum(0)


def _check_bound(max_norm: float | Tensor) -> None:
    if isinstance(max_norm, Tensor):
        if max_norm.ndim:
            raise ValueError(
                "clipped_grad_sum: max_norm must be a number or a 0-d tensor, got "
                f"{list(max_norm.shape)}"
            )
        if not is_visible(max_norm):
            return
    words = "positive and finite"
    check_number("clipped_grad_sum", "max_norm", max_norm, words, lambda x: 0 < x < math.inf)


def _example_grad(
    caller: str, loss: Callable[..., Any], chunk: int | None
) -> Callable[[Tree, Any, bool], Tree]:
    """Make the function from parameters and `_rows` to gradients, those of masked rows included."""
    check_chunk(caller, chunk)
    if isinstance(loss, StatefulLoss):
        raise TypeError(
            f"{caller}: the loss has buffers, so its model may mix examples, and a single example "
            "has no gradient of its own; close over buffers that do not change"
        )

    check_loss(caller, loss)

    def grads(params: Tree, rows: Any, train: bool) -> Tree:
        def value(params: Tree, row: Any) -> Tensor:
            x, y, _, key = row
            example = Batch(*tree.map(lambda leaf: leaf.unsqueeze(0), (x, y)))
            result = loss(params, example, train=train, key=None if key == () else key)
            return check_scalar(caller, "loss", result[0] if isinstance(result, tuple) else result)

        return vmap(grad(value), (None, 0))(params, rows)

    return grads


def _rows(caller: str, params: Tree, batch: Any, key: Tensor | None) -> tuple[Tree, ...]:
    """Return x, y, mask and key of each example, `()` without mask or key: leaves `[batch, ...]`.

    Masked examples are replaced by an unmasked one: padding may contain invalid labels, or values
    without a gradient.
    """
    check_floating(params, caller)
    if not (isinstance(batch, tuple) and len(batch) in (2, 3)):
        raise TypeError(f"{caller}: batch must be (x, y) or Batch(x, y, mask), got {type(batch)}")
    batch = Batch(*batch)
    check_tensors(tree.leaves(batch), batch, f"{caller}: every leaf of the batch")
    shapes = {path: list(leaf.shape) for path, leaf in tree.flatten_dict(batch).items()}
    lengths = {tuple(shape[:1]) for shape in shapes.values()}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(f"{caller}: x, y and mask need one common first axis, got {shapes}")
    n, (x, y, mask) = len(tree.leaves(batch)[0]), batch
    if n and mask != ():
        unmasked = (mask != 0).to(torch.uint8).argmax().reshape(1)
        x, y = tree.map(lambda leaf: keep(mask, leaf, leaf.index_select(0, unmasked)), (x, y))
    if key is None:
        return x, y, mask, ()
    check_key(caller, key)
    numbers = torch.arange(n, device=key.device)
    return x, y, mask, vmap(random.fold_in, (None, 0))(key, numbers) if n else key.new_empty(0, 2)


def _zero_masked(rows: Tree, x: Tensor) -> Tensor:
    """Set the rows of `x` that are masked in `_rows` to 0."""
    return x if rows[2] == () else keep(rows[2], x)
