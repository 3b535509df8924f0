"""One step of training or evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value

from fdl import random
from fdl._training._checks import (
    check_buffers,
    check_loss,
    check_result,
    check_state,
    check_step_metrics,
    check_step_metrics_result,
)
from fdl._training._loss import Loss, StatefulLoss
from fdl._training._state import Metrics, TrainState
from fdl.metrics import Mean
from fdl.metrics._sums import Sums
from fdl.optim import Optimizer, apply_updates, loss_scale_of
from fdl.optim._as_optimizer import OptimizerLike, as_optimizer
from fdl.optim._averaging import average_buffers
from fdl.optim._base import map_grads, upcast
from fdl.optim._loss_scale import keep_finite
from fdl.tree import Tree

StepMetrics = Callable[[TrainState, Tree], Metrics]  # (state before the update, gradients)


def train_step(
    loss: Loss,
    opt: OptimizerLike,
    grad_fn: Callable[..., Any] = grad_and_value,
    metrics: StepMetrics | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Make one step of training: a pure function `(state, batch) -> (state, metrics)`.

    The step calls the loss with `train=True` and `key=fold_in(state.key, state.step)`. The metrics
    are computed before the update, on the batch of the step.

    Args:
        loss: `(params, batch, *, train, key) -> (scalar, metrics)` or a `StatefulLoss`;
            `supervised` makes either.
        opt: an optimizer, of fdl or another pair of functions (see `optim.Optimizer`).
            `optim.loss_scale` scales the objective, not its value or the metrics.
        grad_fn: the transformation that differentiates: `grad_fn(f, has_aux=True)(params)` returns
            `(grads, (value, aux))`, as `torch.func.grad_and_value` does; see `optim.sam` and
            `transforms.autograd_grad_and_value`.
        metrics: what to report of the step itself, a function `(state, grads) -> {name: scalar}`
            of the state before the update and the gradients that `opt` receives, divided by the
            loss scale if there is one. A scalar becomes a `Mean` of count 1, which `.sum()`
            averages over steps.

    Returns:
        The step; compile it with `fdl.jit`, loop over it with `fdl.scan`.

    Raises:
        TypeError: `loss` is not a function or does not accept these arguments, or `opt` is not an
            optimizer, or `metrics` is not a function; at call, one of these returns something
            else.
        ValueError: at call, `metrics` has a name that the loss has as well.

    >>> from fdl import losses, nn, optim, supervised
    >>> model, opt = nn.linear(2, 1), optim.sgd(0.1)
    >>> state = TrainState.create(model, opt, key=random.key(0))
    >>> step = train_step(supervised(model, losses.mse), opt)
    >>> state, metrics = step(state, (torch.ones(8, 2), torch.zeros(8, 1)))
    >>> state.step, sorted(metrics)
    (tensor(1), ['loss'])

    A loss of your own is a function with the keywords `train` and `key`, here ignored:

    >>> def loss(params, batch, **_):
    ...     return ((batch[0] @ params["weight"].T - batch[1]) ** 2).mean(), {}
    >>> train_step(loss, opt)(state, (torch.ones(8, 2), torch.zeros(8, 1)))[0].step
    tensor(2)

    To report the norm of the gradients and the learning rate as well:

    >>> def report(state, grads):
    ...     rates = optim.hyperparams(state.opt_state)
    ...     return {"grad_norm": optim.global_norm(grads), "lr": rates["lr"]}
    >>> step = train_step(supervised(model, losses.mse), opt, metrics=report)
    >>> _, metrics = step(state, (torch.ones(8, 2), torch.zeros(8, 1)))
    >>> sorted(metrics), metrics["lr"].value
    (['grad_norm', 'loss', 'lr'], tensor(0.1000, dtype=torch.float64))
    """
    check_loss("train_step", loss)
    check_step_metrics("train_step", metrics)
    checked = as_optimizer("train_step", opt)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        check_state("train_step", state)
        objective = make_objective(loss, state, batch, random.fold_in(state.key, state.step))
        grads, (value, (found, buffers)) = differentiate(objective, state, grad_fn)
        value_fn = lambda params: objective(params)[0]  # noqa: E731
        count = example_count(found)
        new = apply_gradients(checked, state, grads, buffers, value, value_fn, count)
        return new, measure("train_step", metrics, state, grads, found)

    return step


def measure(
    caller: str, metrics: StepMetrics | None, state: TrainState, grads: Tree, found: Metrics
) -> Metrics:
    """Add the metrics of the step itself to those of the loss.

    Args:
        caller: first words of an error message.
        metrics: as for `train_step`.
        state: the state before the update.
        grads: the gradients that the optimizer receives, times the loss scale.
        found: the metrics of the loss.
    """
    if metrics is None:
        return found
    scale = loss_scale_of(state.opt_state)
    own = metrics(state, grads if scale is None else map_grads(lambda g: upcast(g) / scale, grads))
    check_step_metrics_result(caller, own, found)
    means = {
        name: x if isinstance(x, Sums) else Mean(x.detach().double(), torch.ones_like(x).double())
        for name, x in own.items()
    }
    return {**found, **means}


def make_objective(
    loss: Loss, state: TrainState, batch: Any, key: Tensor
) -> Callable[[Tree], tuple[Tensor, tuple[Metrics, Tree]]]:
    """Return the training loss as a function `params -> (scalar, (metrics, buffers))`."""

    def objective(params: Tree) -> tuple[Tensor, tuple[Metrics, Tree]]:
        if isinstance(loss, StatefulLoss):
            result = loss(params, state.buffers, batch, train=True, key=key)
            check_result("train_step", result, stateful=True)
            value, (metrics, buffers) = result
            return value, (metrics, check_buffers("train_step", state.buffers, buffers))
        value_and_metrics = loss(params, batch, train=True, key=key)
        check_result("train_step", value_and_metrics, stateful=False)
        return value_and_metrics[0], (value_and_metrics[1], state.buffers)

    return objective


def differentiate(
    objective: Callable[..., Any], state: TrainState, grad_fn: Callable[..., Any]
) -> tuple[Tree, Any]:
    """Return `(grads, (value, aux))`; `optim.loss_scale` in the optimizer scales the gradients."""
    return _scaled(grad_fn, loss_scale_of(state.opt_state))(objective, has_aux=True)(state.params)


def apply_gradients(
    opt: Optimizer,
    state: TrainState,
    grads: Tree,
    buffers: Tree,
    value: Tensor,
    value_fn: Callable[[Tree], Tensor],
    count: Tensor | None = None,
) -> TrainState:
    """Return the state after one update."""
    extra = {} if count is None else {"count": count}
    buffers = keep_finite(state.opt_state, state.buffers, buffers)
    updates, opt_state = opt.update(
        grads, state.opt_state, state.params, value=value, value_fn=value_fn, **extra
    )
    opt_state = average_buffers(state.opt_state, opt_state, buffers)
    params = apply_updates(state.params, updates)
    return TrainState(params, buffers, opt_state, state.key, state.step + 1)


def example_count(metrics: Metrics) -> Tensor | None:
    """Return the number of examples that a loss averages, or None if its metrics do not tell."""
    loss = metrics.get("loss") if isinstance(metrics, dict) else None
    return loss.count if isinstance(loss, Mean) else None


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


def eval_step(loss: Loss) -> Callable[[TrainState, Any], Metrics]:
    """Make an evaluation step `(state, batch) -> metrics`.

    Args:
        loss: as for `train_step`; called with `train=False` and `key=None`.

    Raises:
        TypeError: as for `train_step`.

    >>> from fdl import losses, nn, optim, supervised
    >>> model = nn.linear(2, 1, weight_init=nn.init.ones, bias_init=nn.init.zeros)
    >>> state = TrainState.create(model, optim.sgd(0.1), key=random.key(0))
    >>> evaluate = eval_step(supervised(model, losses.mse))
    >>> metrics = evaluate(state, (torch.ones(8, 2), torch.zeros(8, 1)))
    >>> metrics["loss"].value
    tensor(4., dtype=torch.float64)
    """
    check_loss("eval_step", loss)

    def step(state: TrainState, batch: Any) -> Metrics:
        check_state("eval_step", state)
        if isinstance(loss, StatefulLoss):
            result = loss(state.params, state.buffers, batch, train=False, key=None)
            check_result("eval_step", result, stateful=True)
            return result[1][0]
        value_and_metrics = loss(state.params, batch, train=False, key=None)
        check_result("eval_step", value_and_metrics, stateful=False)
        return value_and_metrics[1]

    return step
