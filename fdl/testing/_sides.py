"""What a model and a module compute, under the same names."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad_and_value

from fdl import random, tree
from fdl._checks import describe
from fdl._training import TrainState, supervised, train_step
from fdl.data import Batch
from fdl.nn import Model, StatefulModel
from fdl.optim import Optimizer
from fdl.tree import Tree

LossFn = Callable[..., Tensor]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
Values = tuple[Tree, Tree]  # parameters and buffers, as nested dicts


class Side(NamedTuple):
    """One of the two that are compared. Trees are nested dicts with the paths of the model."""

    forward: Callable[[bool, int], Values]  # train, seed -> outputs and buffers
    gradients: Callable[[], tuple[Tensor, Tree]]  # the loss in training, and its gradients
    steps: Callable[[], Iterator[Values]]  # the values after each step of training, without end


def of_model(
    model: Model | StatefulModel,
    params: Tree,
    buffers: Tree,
    batch: Batch,
    loss: LossFn,
    opt: Optimizer | None,
) -> Side:
    """Return what a model computes on a batch.

    Args:
        model: the model.
        params: its parameters.
        buffers: its buffers, `{}` if it has none.
        batch: the batch.
        loss: a function (prediction, y).
        opt: None if there are no steps.
    """
    objective: Any = supervised(model, loss)
    given = (params, buffers) if isinstance(model, StatefulModel) else (params,)

    def forward(train: bool, seed: int) -> Values:
        x = tree.map(torch.clone, batch.x)
        result = model.apply(*given, x, train=train, key=random.key(seed))
        y, new = result if isinstance(model, StatefulModel) else (result, {})
        return y, _nested(tree.flatten_dict(new))

    def gradients() -> tuple[Tensor, Tree]:
        grads, (value, _) = grad_and_value(objective, has_aux=True)(
            *given, batch, train=True, key=random.key(0)
        )
        return value, _nested(tree.flatten_dict(grads))

    def steps() -> Iterator[Values]:
        start = model._replace(init=lambda key: given if len(given) > 1 else params)
        state = TrainState.create(start, opt, key=random.key(0))  # type: ignore[arg-type]
        step = train_step(objective, opt)  # type: ignore[arg-type]
        while True:
            state, _ = step(state, batch)
            yield tuple(_nested(tree.flatten_dict(t)) for t in (state.params, state.buffers))

    return Side(forward, gradients, steps)


def of_module(
    twin: nn.Module,
    in_training: bool,
    paths: dict[str, str],
    batch: Batch,
    loss: LossFn,
    make: MakeOptimizer | None,
) -> Side:
    """Return what a module computes on a batch.

    Args:
        twin: the module, in float64; it is copied for each use.
        in_training: whether the module is in training mode: then submodules in evaluation mode are
            frozen, and stay so.
        paths: its paths to those of the model.
        batch: the batch.
        loss: a function (prediction, y).
        make: makes the optimizer of a module; None if there are no steps.
    """

    def fresh(train: bool) -> nn.Module:
        module = copy.deepcopy(twin)
        return module if train and in_training else module.train(train)

    def renamed(named: Iterator[tuple[str, Tensor]]) -> Tree:
        return _nested({paths[path]: x.detach().clone() for path, x in named})

    def value_of(module: nn.Module) -> Tensor:
        value = loss(module(batch.x), batch.y)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"check_equals_module: the module's loss must return a tensor, got "
                f"{describe(value)}"
            )
        return value.mean()

    def forward(train: bool, seed: int) -> Values:
        module = fresh(train)
        devices = {leaf.device for leaf in tree.leaves(batch.x) if leaf.is_cuda}
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            y = module(tree.map(torch.clone, batch.x))
        return y, renamed(module.named_buffers())

    def gradients() -> tuple[Tensor, Tree]:
        module = fresh(train=True).requires_grad_()
        value = value_of(module)
        if value.requires_grad:  # it does not if there are no parameters
            value.backward()
        slopes = (
            (path, torch.zeros_like(p) if p.grad is None else p.grad)
            for path, p in module.named_parameters()
        )
        return value.detach(), renamed(slopes)

    def steps() -> Iterator[Values]:
        module = fresh(train=True)
        optimizer = make(module)  # type: ignore[misc]
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                "check_equals_module: the second of optimizers must return an optimizer of torch, "
                f"got {describe(optimizer)}"
            )

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = value_of(module)
            value.backward()
            return value

        while True:
            optimizer.step(closure)  # type: ignore[arg-type]
            yield renamed(module.named_parameters()), renamed(module.named_buffers())

    return Side(forward, gradients, steps)


def _nested(flat: dict[str, Tensor]) -> Tree:
    return tree.unflatten_dict(flat) if flat else {}
