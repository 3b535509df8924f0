"""The object-oriented twins, oracles of the proofs: `nn.Module`, `backward()`, `torch.optim`.

The modules are those of the benchmark, in float64; their `named_parameters()` have the dotted paths
of the functional models' parameters.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fdl import random, tree
from fdl.tree import Tree
from models import torch_modules
from train.bench.reference import GivenDropout, draw_masks

half_mse = torch_modules.half_mse


def linreg(features: int = 2) -> nn.Module:
    return torch_modules.linreg(features).double()


def softmax_regression(features: int = 784, classes: int = 10) -> nn.Module:
    return torch_modules.softmax_regression(features, classes).double()


def mlp(*args: Any, **kwargs: Any) -> nn.Module:
    return torch_modules.mlp(*args, dropout=GivenDropout, **kwargs).double()


def lenet() -> nn.Module:
    return torch_modules.LeNet().double()


def set_params(module: nn.Module, params: Tree) -> nn.Module:
    """Copy a tree of parameters into a module of the same paths, and return the module."""
    flat = tree.flatten_dict(params)
    module.load_state_dict({path: leaf.detach().clone() for path, leaf in flat.items()})
    return module


def get_params(module: nn.Module) -> Tree:
    """Copy a module's parameters into nested dicts."""
    return tree.unflatten_dict({path: p.detach().clone() for path, p in module.named_parameters()})


def get_grads(module: nn.Module) -> Tree:
    return tree.unflatten_dict({path: p.grad.clone() for path, p in module.named_parameters()})


def train(
    module: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    key: Tensor | None = None,
    scheduler: Any = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
) -> list[float]:
    """The loop everybody writes. `key` is the run's key, for dropout; returns the losses."""
    losses = []
    for step, (x, y) in enumerate(batches):
        if key is not None:
            draw_masks(module, random.fold_in(key, step), x)
        optimizer.zero_grad()
        value = loss(module(x), y)
        losses.append(value.item())
        if penalty is not None:
            value = value + penalty(module)
        value.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return losses
