"""The loss of a model on a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor

from fdl import tree
from fdl._checks import check_accepts, describe
from fdl._training._checks import as_batch, length
from fdl._training._loss import Loss, StatefulLoss
from fdl._training._state import Metrics
from fdl.data import Batch
from fdl.losses._mean import weighted_mean
from fdl.metrics import Mean
from fdl.metrics._sums import Sums
from fdl.nn import Model, StatefulModel
from fdl.nn._model import check_model, check_takes_mask, is_model
from fdl.tree import Tree

Metric = Callable[..., Sums]


@overload
def supervised(
    model: Model, loss: Callable[..., Tensor], metrics: Mapping[str, Metric] | None = None
) -> Callable[..., tuple[Tensor, Metrics]]: ...
@overload
def supervised(
    model: StatefulModel, loss: Callable[..., Tensor], metrics: Mapping[str, Metric] | None = None
) -> StatefulLoss: ...
def supervised(
    model: Model | StatefulModel,
    loss: Callable[..., Tensor],
    metrics: Mapping[str, Metric] | None = None,
) -> Loss:
    """Make the loss of a model: `(params, batch, *, train=False, key=None) -> (scalar, metrics)`.

    `train` and `key` are passed to the model's `apply`. A batch is a `data.Batch`, a pair `(x, y)`,
    or a dict with the entries x, y and, optionally, mask.

    Rows where `batch.mask` is False (or 0) do not count, whatever their values. The model sees
    harmless rows in their place, and in training a model with buffers receives the mask, so that
    they do not enter the statistics of `nn.batch_norm`. A batch in which no row counts has
    loss 0, zero gradients and count 0. (The derivative with respect to an entry of the mask that is
    0 is therefore not its row's loss; if you need it, write a loss that takes weights.)

    Args:
        model: a `Model`, or a `StatefulModel`, for which the result is a `StatefulLoss`:
            `(params, buffers, batch, *, train=False, key=None) -> (scalar, (metrics, buffers))`.
        loss: a function of two positional arguments, `(prediction, y)`, that returns values per
            example `[batch, ...]`, which are averaged, or a scalar; or a function with exactly one
            more, `(prediction, y, weights)`, that returns a scalar. `weights` is the batch's mask,
            or None. (A third parameter with a default other than None is not used.)
        metrics: further metrics by name, each `(prediction, y, weights) -> Mean`, or another of the
            sums of `fdl.metrics`.

    Returns:
        The loss function; its metrics hold `"loss"` and those of `metrics`.

    Raises:
        TypeError: `model` is not a model, or `loss` is not a function; at call, a batch of another
            type, or a loss or metric that returns something else.
        ValueError: at call, the mask does not have the shape `[batch]`; there is a mask, and `loss`
            takes no weights but returns a scalar, or in training the model has buffers and does not
            take a mask; `loss` returns more values per example than prediction and y have elements,
            as it does if it broadcasts `[batch, 1]` against `[batch]`.

    >>> from fdl import losses, nn, random
    >>> ones, zeros = nn.init.ones, nn.init.zeros
    >>> model = nn.sequential(nn.linear(2, 1, weight_init=ones, bias_init=zeros), nn.dropout(0.5))
    >>> loss = supervised(model, losses.squared_loss)
    >>> params, batch = model.init(random.key(0)), Batch(torch.ones(5, 2), torch.zeros(5, 1))
    >>> value, metrics = loss(params, batch)                     # evaluate: without dropout
    >>> value, metrics["loss"].count
    (tensor(2.), tensor(5., dtype=torch.float64))
    >>> loss(params, batch, train=True, key=random.key(0))[0]    # with dropout
    tensor(1.6000)
    """
    if is_model(loss) and not is_model(model):
        raise TypeError("supervised: model and loss are swapped: supervised(model, loss)")
    check_model("supervised", model)
    if not callable(loss) or isinstance(loss, type) or is_model(loss):
        raise TypeError(
            f"supervised: loss must be a function (prediction, y), got {describe(loss)}"
            + (f"; make an instance, {loss.__name__}()" if isinstance(loss, type) else "")
        )
    _check_metrics(metrics)
    takes_weights = _takes_weights(loss)

    def score(prediction: Any, batch: Batch) -> tuple[Tensor, Metrics]:
        n, mask = length(batch), batch.mask if isinstance(batch.mask, Tensor) else None
        if takes_weights:
            # If no row counts, all rows get weight 1, so that no loss divides by a sum of 0.
            weights = None if mask is None else torch.where(mask.any(), mask, mask == 0)
            value = loss(prediction, batch.y, weights)
            if not isinstance(value, Tensor) or value.ndim:
                raise TypeError(
                    "supervised: a loss (prediction, y, weights) must return a scalar, got "
                    f"{describe(value)}"
                )
        else:
            value = _average(loss(prediction, batch.y), prediction, batch, loss)
        if mask is not None:
            value = torch.where(mask.any(), value, 0)
            count = mask.sum(dtype=torch.float64)
        else:
            value = value if n else torch.where(torch.zeros_like(value) != 0, value, 0)
            count = torch.full_like(value.detach().double(), n)
        results: Metrics = {"loss": Mean(value.detach().double() * count, count)}
        prediction = tree.map(Tensor.detach, prediction)
        for name, metric in (metrics or {}).items():
            results[name] = metric(prediction, batch.y, mask)
            if not isinstance(results[name], Sums):
                raise TypeError(
                    f"supervised: metric {name!r} must return a Mean, as fdl.metrics.mean(values, "
                    "weights) does, or other sums that fdl.metrics has, got "
                    f"{describe(results[name])}"
                )
        return value, results

    def stateless(
        params: Tree, batch: Any, *, train: bool = False, key: Tensor | None = None
    ) -> tuple[Tensor, Metrics]:
        batch = as_batch("supervised", batch)
        return score(model.apply(params, batch.x, train=train, key=key), batch)

    if not isinstance(model, StatefulModel):
        return stateless

    def stateful(
        params: Tree, buffers: Tree, batch: Any, *, train: bool = False, key: Tensor | None = None
    ) -> tuple[Tensor, tuple[Metrics, Tree]]:
        batch = as_batch("supervised", batch)
        options: dict[str, Any] = {"train": train, "key": key}
        if train and isinstance(batch.mask, Tensor):
            check_takes_mask("supervised", model)
            options["mask"] = batch.mask
        prediction, buffers = model.apply(params, buffers, batch.x, **options)
        value, results = score(prediction, batch)
        return value, (results, buffers)

    return StatefulLoss(stateful)


def _check_metrics(metrics: Any) -> None:
    """Raise a TypeError unless `metrics` is None or a dict of functions."""
    if metrics is not None and not isinstance(metrics, Mapping):
        raise TypeError(
            "supervised: metrics must be a dict such as {'accuracy': fdl.metrics.accuracy}, got "
            f"{describe(metrics)}"
        )
    for name, metric in (metrics or {}).items():
        if not callable(metric):
            raise TypeError(
                f"supervised: metric {name!r} must be a function (prediction, y, weights) -> Mean, "
                f"got {describe(metric)}"
            )
        names = ("prediction", "y", "weights")
        check_accepts(f"supervised: metric {name!r}", metric, f"({', '.join(names)})", names)


def _takes_weights(loss: Callable[..., Any]) -> bool:
    """Return whether a loss accepts exactly three positional arguments.

    A default of the third must be None: `(prediction, y, eps=1e-6)` does not take weights. Neither
    do torch's losses, whose further parameters, such as weights per class, mean something else.

    >>> import torch.nn.functional as F
    >>> from fdl import losses
    >>> [_takes_weights(f) for f in (losses.mse, losses.squared_loss, F.cross_entropy)]
    [True, False, False]
    """
    try:
        parameters = inspect.signature(loss).parameters.values()
    except (TypeError, ValueError):  # a builtin may have no signature
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) == 3 and positional[2].default in (None, inspect.Parameter.empty)


def _average(value: Any, prediction: Any, batch: Batch, loss: Any) -> Tensor:
    """Average what `loss(prediction, y)` returned: values `[batch, ...]`, or a scalar as it is."""
    if not isinstance(value, Tensor):
        raise TypeError(f"supervised: the loss must return a tensor, got {describe(value)}")
    weights = batch.mask if isinstance(batch.mask, Tensor) else None
    if not value.ndim:
        if weights is not None:
            raise ValueError(
                "supervised: the batch has a mask, so the loss must return one value per example "
                "or be a function (prediction, y, weights) that returns their weighted mean; "
                f"{describe(loss)} returned a scalar"
            )
        return value
    most = max(leaf.numel() for leaf in tree.leaves((prediction, batch.y)))
    if value.shape[0] != length(batch) or value.numel() > most:
        shapes = {"prediction": prediction, "y": batch.y}
        raise ValueError(
            f"supervised: the loss returned values {list(value.shape)} for a batch of "
            f"{length(batch)}, with {tree.map(lambda leaf: list(leaf.shape), shapes)}; were two "
            "shapes broadcast? Give prediction and y the same shape, or return one value per "
            "example"
        )
    return weighted_mean(value, weights)
