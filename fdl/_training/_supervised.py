"""The loss of a model on a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fdl import tree
from fdl._training._checks import as_batch, check_apply, kind, length
from fdl._training._state import Metrics
from fdl.data import Batch
from fdl.losses import weighted_mean
from fdl.metrics import Mean
from fdl.nn._model import check_takes_mask
from fdl.tree import Tree


def supervised(
    apply: Callable[..., Any],
    loss: Callable[..., Tensor],
    metrics: Mapping[str, Callable[..., Mean]] | None = None,
) -> Callable[..., Any]:
    """Make the loss of a model on a batch: `(params, batch, key=None) -> (scalar, metrics)`.

    With a key the model runs with `train=True`, without one it is evaluated. A batch is a
    `data.Batch`, a pair `(x, y)` or a dict with the entries x, y and, if there is one, mask.

    Rows where `batch.mask` is False (or 0) count for nothing, whatever they hold: the model gets a
    copy of a row that counts in their place, and in training a model with buffers gets the mask,
    so that they do not enter the statistics of `nn.batch_norm`. A batch without a row that counts
    has the loss 0, with gradients of 0 and the count 0. (So the derivative with respect to a
    number in the mask that is 0 is not that of its row; give such weights to a loss of your own.)

    Args:
        apply: of a `Model`, or of a `StatefulModel` (recognised by its second parameter being
            called `buffers`), for which the result is
            `(params, buffers, batch, key=None) -> (scalar, (metrics, buffers))`.
        loss: `(prediction, y, weights=None) -> scalar`, or `(prediction, y)` giving one value or
            more per example, `[batch, ...]`, which are then averaged.
        metrics: further metrics by name, `(prediction, y, weights=None) -> Mean`.

    Returns:
        The loss function; its metrics hold `"loss"` and those of `metrics`.

    Raises:
        TypeError: `apply` is not the `apply` of a model; at call, a batch, a loss or a metric of
            another kind.
        ValueError: at call, a mask of another shape than `[batch]`; a mask, and a loss that takes
            no weights but returns a scalar, or in training a model with buffers whose `apply` takes
            no mask; values per example with more elements than prediction and y have, as `[n, 1]`
            and `[n]` give when one is broadcast against the other.

    >>> from fdl import random
    >>> from fdl import losses, nn
    >>> model = nn.linear(2, 1, weight_init=nn.init.ones, bias_init=nn.init.zeros)
    >>> batch = Batch(torch.ones(4, 2), torch.zeros(4, 1))
    >>> loss = supervised(model.apply, losses.squared_loss)
    >>> value, found = loss(model.init(random.key(0)), batch)
    >>> value, found["loss"].count
    (tensor(2.), tensor(4., dtype=torch.float64))
    """
    check_apply("supervised", apply)
    if not callable(loss):
        raise TypeError(f"supervised: loss must be a function (prediction, y), got {kind(loss)}")
    takes_weights = "weights" in inspect.signature(loss).parameters

    def score(prediction: Any, batch: Batch) -> tuple[Tensor, Metrics]:
        n, mask = length(batch), batch.mask if isinstance(batch.mask, Tensor) else None
        if takes_weights:
            # All rows where none counts, so that no loss divides by a sum of 0.
            weights = None if mask is None else torch.where(mask.any(), mask, mask == 0)
            value = loss(prediction, batch.y, weights)
            if not isinstance(value, Tensor) or value.ndim:
                raise TypeError(
                    f"supervised: a loss that takes weights must return a scalar, got {kind(value)}"
                )
        else:
            value = _averaged(loss(prediction, batch.y), prediction, batch, loss)
        if mask is not None:
            value = torch.where(mask.any(), value, 0)
            count = mask.sum(dtype=torch.float64)
        else:
            value = value if n else torch.where(torch.zeros_like(value) != 0, value, 0)
            count = torch.full_like(value.detach().double(), n)
        found = {"loss": Mean(value.detach().double() * count, count)}
        prediction = tree.map(Tensor.detach, prediction)
        for name, metric in (metrics or {}).items():
            found[name] = metric(prediction, batch.y, mask)
            if not isinstance(found[name], Mean):
                raise TypeError(
                    f"supervised: metric {name!r} must return a Mean, as fdl.metrics.mean(values, "
                    f"weights) makes it, got {kind(found[name])}"
                )
        return value, found

    def stateless(params: Tree, batch: Any, key: Tensor | None = None) -> tuple[Tensor, Metrics]:
        batch = as_batch("supervised", batch)
        return score(apply(params, batch.x, train=key is not None, key=key), batch)

    def stateful(
        params: Tree, buffers: Tree, batch: Any, key: Tensor | None = None
    ) -> tuple[Tensor, tuple[Metrics, Tree]]:
        batch = as_batch("supervised", batch)
        options: dict[str, Any] = {"train": key is not None, "key": key}
        if key is not None and isinstance(batch.mask, Tensor):
            check_takes_mask(apply, "supervised")
            options["mask"] = batch.mask
        prediction, buffers = apply(params, buffers, batch.x, **options)
        value, found = score(prediction, batch)
        return value, (found, buffers)

    return stateful if takes_buffers(apply) else stateless


def _averaged(value: Any, prediction: Any, batch: Batch, loss: Any) -> Tensor:
    """Average what a loss without weights gave: a scalar already, or values `[batch, ...]`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"supervised: the loss must return a tensor, got {kind(value)}")
    weights = batch.mask if isinstance(batch.mask, Tensor) else None
    if not value.ndim:
        if weights is not None:
            raise ValueError(
                "supervised: the batch has a mask, so the loss must take `weights` or return "
                f"one value per example; {loss!r} does neither"
            )
        return value
    most = max(leaf.numel() for leaf in tree.leaves((prediction, batch.y)))
    if value.shape[0] != length(batch) or value.numel() > most:
        shapes = {"prediction": prediction, "y": batch.y}
        raise ValueError(
            f"supervised: the loss gave values {list(value.shape)} for a batch of "
            f"{length(batch)}, with {tree.map(lambda leaf: list(leaf.shape), shapes)}; were two "
            "shapes broadcast? Give prediction and y one shape, or return one value per example"
        )
    return weighted_mean(value, weights)


def takes_buffers(fn: Callable[..., Any]) -> bool:
    """Say whether `apply` or a loss is one of a model with buffers, by its second parameter."""
    return list(inspect.signature(fn).parameters)[1:2] == ["buffers"]
