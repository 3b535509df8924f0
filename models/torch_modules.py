"""The models of the course as `nn.Module`s, with the paths of the functional models' parameters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LeNet", "half_mse", "linreg", "loss_of", "make", "mlp", "softmax_regression"]


def linreg(features: int = 2) -> nn.Module:
    """Linear regression."""
    return nn.Linear(features, 1)


def softmax_regression(features: int = 784, classes: int = 10) -> nn.Module:
    """One linear layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(features, classes))


def mlp(
    features: int = 784,
    hidden: Sequence[int] = (256,),
    classes: int = 10,
    rates: Sequence[float] = (),
    dropout: Callable[[float], nn.Module] = nn.Dropout,
) -> nn.Module:
    """The multilayer perceptron, with dropout where rates are given."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    inputs = features
    for i, width in enumerate(hidden):
        layers[f"hidden{i}"] = nn.Linear(inputs, width)
        layers[f"relu{i}"] = nn.ReLU()
        if rates:
            layers[f"dropout{i}"] = dropout(rates[i])
        inputs = width
    layers["output"] = nn.Linear(inputs, classes)
    return nn.Sequential(layers)


class LeNet(nn.Module):
    """LeNet with sigmoids, without padding."""

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
        """Map images `[batch, 1, 28, 28]` to logits."""
        return self.fc(self.conv(x).flatten(1))


def half_mse(prediction: Tensor, y: Tensor) -> Tensor:
    """Average ½ (ŷ − y)²."""
    return F.mse_loss(prediction, y) / 2


def make(
    model: str, rates: Sequence[float] = (), dropout: Callable[[float], nn.Module] = nn.Dropout
) -> nn.Module:
    """Make the module of a task's model, of any parameters.

    >>> sum(p.numel() for p in make("lenet").parameters())
    44426
    """
    match model:
        case "linreg":
            return linreg()
        case "softmax":
            return softmax_regression()
        case "mlp":
            return mlp()
        case "dropout":
            return mlp(hidden=(256, 256), rates=rates, dropout=dropout)
        case "lenet":
            return LeNet()
    raise ValueError(f"no module for {model!r}")


def loss_of(model: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Give the loss of a task's model, `(prediction, y) -> scalar`."""
    return half_mse if model == "linreg" else F.cross_entropy
