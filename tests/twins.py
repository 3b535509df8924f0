"""The object-oriented twins, oracles of the proofs: `nn.Module`, `backward()`, `torch.optim`.

Each twin's `named_parameters()` has the dotted paths of the functional model's parameters.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdl import random, tree
from fdl.tree import Tree


class GivenDropout(nn.Module):
    """Dropout whose mask is handed over, so that both sides drop the same units."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.keep: Tensor | None = None  # bool, the shape of x; None drops nothing

    def forward(self, x: Tensor) -> Tensor:
        return x if self.keep is None else torch.where(self.keep, x / (1 - self.rate), 0.0)


def linreg(features: int = 2) -> nn.Module:
    return nn.Linear(features, 1).double()


def softmax_regression(features: int = 784, classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(features, classes)).double()


def mlp(
    features: int = 784,
    hidden: Sequence[int] = (256,),
    classes: int = 10,
    rates: Sequence[float] = (),
) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    inputs = features
    for i, width in enumerate(hidden):
        layers[f"hidden{i}"] = nn.Linear(inputs, width)
        layers[f"relu{i}"] = nn.ReLU()
        if rates:
            layers[f"dropout{i}"] = GivenDropout(rates[i])
        inputs = width
    layers["output"] = nn.Linear(inputs, classes)
    return nn.Sequential(layers).double()


class LeNet(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 6, 5),
            nn.Sigmoid(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.Sigmoid(),
            nn.MaxPool2d(2),
        )
        self.fc = nn.Sequential(
            nn.Linear(256, 120), nn.Sigmoid(), nn.Linear(120, 84), nn.Sigmoid(), nn.Linear(84, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).flatten(1))


def lenet() -> nn.Module:
    return LeNet().double()


def half_mse(prediction: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(prediction, y) / 2


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


def draw_masks(module: nn.Sequential, key: Tensor, x: Tensor) -> None:
    """Hand each dropout the mask that the functional model draws from `key`: child i folds in i."""
    with torch.no_grad():
        for i, child in enumerate(module):
            if isinstance(child, GivenDropout):
                child.keep = random.uniform(random.fold_in(key, i), x.shape) >= child.rate
            x = child(x)


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
