"""Training as a pure function: `step(state, batch) -> (state, metrics)`.

loss  = supervised(model.apply, losses.cross_entropy)
state = TrainState.create(model, opt, key=random.key(0))
step  = train_step(loss, opt)
"""

from __future__ import annotations  # Dynamo would run those of nested functions

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value

from fdl import random, tree
from fdl._checks import as_batch, check_apply, check_loss, check_opt, check_result, kind, length
from fdl._update_bn import update_bn
from fdl.data import Batch
from fdl.losses import weighted_mean
from fdl.metrics import Mean
from fdl.nn import Model, StatefulModel
from fdl.nn.model import check_takes_mask
from fdl.optim import Optimizer, apply_updates, loss_scale_of
from fdl.optim.base import update_of
from fdl.tree import Tree

__all__ = ["TrainState", "eval_step", "supervised", "train_step", "update_bn"]

Metrics = dict[str, Mean]


class TrainState(NamedTuple):
    """Everything that training changes, and the key: a tree like any other.

    >>> from fdl import nn, optim
    >>> state = TrainState.create(nn.linear(2, 1), optim.sgd(0.1), key=random.key(0))
    >>> list(tree.flatten_dict(state))[:2]
    ['params.weight', 'params.bias']
    """

    params: Tree
    buffers: Tree  # {} where the model has none
    opt_state: Tree
    key: Tensor  # int64 [2]; never changes, step k draws from fold_in(key, k)
    step: Tensor  # int64 [], steps done

    @classmethod
    def create(
        cls,
        model: Model | StatefulModel,
        opt: Optimizer,
        *,
        key: Tensor,
        params: Tree | None = None,
    ) -> TrainState:
        """Draw the parameters and initialise the optimizer, on the device of `key`.

        Args:
            model: what to train.
            opt: what to train it with.
            key: split once: one half draws the parameters, the other is kept for the run.
            params: start from these instead, of any floating dtype.

        Raises:
            ValueError: `params` differs from the model's in paths or shapes, or is not floating
                (each path is listed).

        >>> from fdl import nn, optim
        >>> state = TrainState.create(nn.linear(2, 1), optim.sgd(0.1), key=random.key(0))
        >>> state.params["weight"].shape, state.step
        (torch.Size([1, 2]), tensor(0))
        """
        init_key, run_key = random.split(key)
        drawn = model.init(init_key)
        expected, buffers = drawn if isinstance(model, StatefulModel) else (drawn, {})
        if params is None:
            params = expected
        else:
            # Of the given parameters only the floating dtype may be another.
            lines = tree.diff(
                tree.cast(expected, torch.float32),
                tree.cast(params, torch.float32),
                values=False,
            )
            if lines:
                raise ValueError(
                    "TrainState.create: params do not fit the model:\n  " + "\n  ".join(lines)
                )
            tree.match(expected, params, "TrainState.create: params")  # lists for dicts, say
        return cls(
            params,
            buffers,
            opt.init(params),
            run_key.clone(),
            torch.zeros((), dtype=torch.int64, device=key.device),
        )


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


def train_step(
    loss: Callable[..., Any],
    opt: Optimizer,
    grad_fn: Callable[..., Any] = grad_and_value,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Make one step of training: a pure function `(state, batch) -> (state, metrics)`.

    The metrics are those of the state that goes in, before the update, on the batch it learns from.

    Args:
        loss: `(params, batch, key) -> (scalar, metrics)`, as `supervised` makes it, or with buffers
            `(params, buffers, batch, key) -> (scalar, (metrics, buffers))`.
        opt: an optimizer. `optim.loss_scale` scales the objective, not its value or the metrics.
        grad_fn: how to differentiate: `grad_fn(f, has_aux=True)(params)` returns
            `(grads, (value, aux))`, as `torch.func.grad_and_value` does; see `optim.sam`.

    Returns:
        The step; compile it with `fdl.jit`, loop over it with `fdl.scan`.

    Raises:
        TypeError: `loss` is not a function, `opt` not an optimizer; at call, a loss that returns
            something else than the above, whose metrics are trees of tensors.

    >>> from fdl import losses, nn, optim
    >>> model, opt = nn.linear(2, 1), optim.sgd(0.1)
    >>> state = TrainState.create(model, opt, key=random.key(0))
    >>> step = train_step(supervised(model.apply, losses.mse), opt)
    >>> state, metrics = step(state, (torch.ones(8, 2), torch.zeros(8, 1)))
    >>> state.step, sorted(metrics)
    (tensor(1), ['loss'])
    """
    check_loss("train_step", loss)
    check_opt("train_step", opt)
    opt = Optimizer(opt.init, update_of("train_step", opt))

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        objective = objective_of(loss, state, batch, random.fold_in(state.key, state.step))
        grads, (value, (metrics, buffers)) = differentiate(objective, state, grad_fn)
        value_fn = lambda params: objective(params)[0]  # noqa: E731
        new = updated(opt, state, grads, buffers, value, value_fn, count_of(metrics))
        return new, metrics

    return step


def objective_of(
    loss: Callable[..., Any], state: TrainState, batch: Any, key: Tensor
) -> Callable[[Tree], tuple[Tensor, tuple[Metrics, Tree]]]:
    """Make a loss a function of the parameters alone: `params -> (scalar, (metrics, buffers))`."""
    stateful = takes_buffers(loss)

    def objective(params: Tree) -> tuple[Tensor, tuple[Metrics, Tree]]:
        if stateful:
            result = loss(params, state.buffers, batch, key)
            check_result("train_step", result, stateful)
            return result
        result = loss(params, batch, key)
        check_result("train_step", result, stateful)
        return result[0], (result[1], state.buffers)

    return objective


def differentiate(
    objective: Callable[..., Any], state: TrainState, grad_fn: Callable[..., Any]
) -> tuple[Tree, Any]:
    """Give `(grads, (value, aux))` at a state, the gradients scaled if its optimizer says so."""
    return _scaled(grad_fn, loss_scale_of(state.opt_state))(objective, has_aux=True)(state.params)


def updated(
    opt: Optimizer,
    state: TrainState,
    grads: Tree,
    buffers: Tree,
    value: Tensor,
    value_fn: Callable[[Tree], Tensor],
    count: Tensor | None = None,
) -> TrainState:
    """Give the state after one update."""
    extra = {} if count is None else {"count": count}
    updates, opt_state = opt.update(
        grads, state.opt_state, state.params, value=value, value_fn=value_fn, **extra
    )
    params = apply_updates(state.params, updates)
    return TrainState(params, buffers, opt_state, state.key, state.step + 1)


def count_of(metrics: Metrics) -> Tensor | None:
    """Say how many examples a loss is the mean of, if its metrics tell."""
    found = metrics.get("loss") if isinstance(metrics, dict) else None
    return found.count if isinstance(found, Mean) else None


def _scaled(grad_fn: Callable[..., Any], scale: Tensor | None) -> Callable[..., Any]:
    """Multiply the objective that `grad_fn` differentiates, but not the value it returns."""
    if scale is None:
        return grad_fn

    def scaled_grad_fn(objective: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
        def scaled(params: Tree) -> tuple[Tensor, Any]:
            value, aux = objective(params)
            return value * scale, (value, aux)

        def call(params: Tree) -> tuple[Tree, Any]:
            grads, (_, plain) = grad_fn(scaled, has_aux=has_aux)(params)
            return grads, plain

        return call

    return scaled_grad_fn


def eval_step(loss: Callable[..., Any]) -> Callable[[TrainState, Any], Metrics]:
    """Make an evaluation step `(state, batch) -> metrics`: no key, so `train=False`.

    Args:
        loss: as for `train_step`.

    Raises:
        TypeError: as for `train_step`.

    >>> from fdl import losses, nn, optim
    >>> model = nn.linear(2, 1, weight_init=nn.init.ones, bias_init=nn.init.zeros)
    >>> state = TrainState.create(model, optim.sgd(0.1), key=random.key(0))
    >>> metrics = eval_step(supervised(model.apply, losses.mse))(
    ...     state, (torch.ones(8, 2), torch.zeros(8, 1)))
    >>> metrics["loss"].value
    tensor(4., dtype=torch.float64)
    """
    check_loss("eval_step", loss)
    stateful = takes_buffers(loss)

    def step(state: TrainState, batch: Any) -> Metrics:
        args = (state.params, state.buffers, batch) if stateful else (state.params, batch)
        result = loss(*args)
        check_result("eval_step", result, stateful)
        return result[1][0] if stateful else result[1]

    return step
