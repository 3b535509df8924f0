"""One step of training or evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.func import grad_and_value

from fdl import random
from fdl._training._checks import check_loss, check_opt, check_result, check_state
from fdl._training._loss import Loss, StatefulLoss
from fdl._training._state import Metrics, TrainState
from fdl.metrics import Mean
from fdl.optim import Optimizer, apply_updates, loss_scale_of
from fdl.optim._base import update_of
from fdl.tree import Tree


def train_step(
    loss: Loss,
    opt: Optimizer,
    grad_fn: Callable[..., Any] = grad_and_value,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Make one step of training: a pure function `(state, batch) -> (state, metrics)`.

    The step calls the loss with `train=True` and `key=fold_in(state.key, state.step)`. The metrics
    are computed before the update, on the batch of the step.

    Args:
        loss: `(params, batch, *, train, key) -> (scalar, metrics)` or a `StatefulLoss`;
            `supervised` makes either.
        opt: an optimizer. `optim.loss_scale` scales the objective, not its value or the metrics.
        grad_fn: the transformation that differentiates: `grad_fn(f, has_aux=True)(params)` returns
            `(grads, (value, aux))`, as `torch.func.grad_and_value` does; see `optim.sam`.

    Returns:
        The step; compile it with `fdl.jit`, loop over it with `fdl.scan`.

    Raises:
        TypeError: `loss` is not a function or does not accept these arguments, or `opt` is not an
            optimizer; at call, the loss returns something else.

    >>> import torch
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
    """
    check_loss("train_step", loss)
    check_opt("train_step", opt)
    opt = Optimizer(opt.init, update_of("train_step", opt))

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        check_state("train_step", state)
        objective = make_objective(loss, state, batch, random.fold_in(state.key, state.step))
        grads, (value, (metrics, buffers)) = differentiate(objective, state, grad_fn)
        value_fn = lambda params: objective(params)[0]  # noqa: E731
        count = example_count(metrics)
        return apply_gradients(opt, state, grads, buffers, value, value_fn, count), metrics

    return step


def make_objective(
    loss: Loss, state: TrainState, batch: Any, key: Tensor
) -> Callable[[Tree], tuple[Tensor, tuple[Metrics, Tree]]]:
    """Return the training loss as a function `params -> (scalar, (metrics, buffers))`."""

    def objective(params: Tree) -> tuple[Tensor, tuple[Metrics, Tree]]:
        if isinstance(loss, StatefulLoss):
            result = loss(params, state.buffers, batch, train=True, key=key)
            check_result("train_step", result, stateful=True)
            return result
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
    updates, opt_state = opt.update(
        grads, state.opt_state, state.params, value=value, value_fn=value_fn, **extra
    )
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

    >>> import torch
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
