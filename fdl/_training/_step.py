"""Steps of training and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.func import grad_and_value

from fdl import random
from fdl._training._checks import check_loss, check_opt, check_result
from fdl._training._state import Metrics, TrainState
from fdl._training._supervised import takes_buffers
from fdl.metrics import Mean
from fdl.optim import Optimizer, apply_updates, loss_scale_of
from fdl.optim._base import update_of
from fdl.tree import Tree


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

    >>> import torch
    >>> from fdl import metrics, supervised
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

    >>> import torch
    >>> from fdl import metrics, supervised
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
