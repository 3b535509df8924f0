"""The models of the course as `nn.Module`s, with the paths of the functional models' parameters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "CNN",
    "LeNet",
    "LeNetBN",
    "half_mse",
    "linreg",
    "loss_of",
    "make",
    "mlp",
    "softmax_regression",
]


def linreg(features: int = 2) -> nn.Module:
    """Make linear regression.

    >>> linreg().weight.shape
    torch.Size([1, 2])
    """
    return nn.Linear(features, 1)


def softmax_regression(features: int = 784, classes: int = 10) -> nn.Module:
    """Make one linear layer on flattened images.

    >>> softmax_regression()[1].weight.shape
    torch.Size([10, 784])
    """
    return nn.Sequential(nn.Flatten(), nn.Linear(features, classes))


def mlp(
    features: int = 784,
    hidden: Sequence[int] = (256,),
    classes: int = 10,
    rates: Sequence[float] = (),
    dropout: Callable[[float], nn.Module] = nn.Dropout,
) -> nn.Module:
    """Make the multilayer perceptron, with dropout if rates are given.

    Args:
        features: number of pixels.
        hidden: widths of the hidden layers.
        classes: number of classes.
        rates: dropout rate after each hidden layer; none if empty.
        dropout: makes a dropout layer of a rate.

    >>> mlp(hidden=(32,)).hidden0.weight.shape
    torch.Size([32, 784])
    """
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
    """LeNet with sigmoids, without padding.

    >>> import torch
    >>> LeNet()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

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


class LeNetBN(nn.Module):
    """LeNet with batch normalisation of every hidden layer.

    >>> import torch
    >>> LeNetBN()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *(nn.Conv2d(1, 6, 5), nn.BatchNorm2d(6), nn.Sigmoid(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.BatchNorm2d(16), nn.Sigmoid(), nn.MaxPool2d(2)),
        )
        self.fc = nn.Sequential(
            *(nn.Linear(256, 120), nn.BatchNorm1d(120), nn.Sigmoid()),
            *(nn.Linear(120, 84), nn.BatchNorm1d(84), nn.Sigmoid()),
            nn.Linear(84, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[batch, 1, 28, 28]` to logits."""
        return self.fc(self.conv(x).flatten(1))


class CNN(nn.Module):
    """Three padded convolutions with ReLU and max-pooling, and a linear layer.

    >>> import torch
    >>> CNN()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.fc = nn.Linear(288, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[batch, 1, 28, 28]` to logits."""
        return self.fc(self.conv(x).flatten(1))


def half_mse(prediction: Tensor, y: Tensor) -> Tensor:
    """Average ½ (ŷ − y)².

    >>> import torch
    >>> half_mse(torch.tensor([3.0]), torch.tensor([1.0]))
    tensor(2.)
    """
    return F.mse_loss(prediction, y) / 2


def make(
    model: str, rates: Sequence[float] = (), dropout: Callable[[float], nn.Module] = nn.Dropout
) -> nn.Module:
    """Make the module of a task's model, with torch's own initialization.

    Args:
        model: name of the recipe.
        rates: dropout rates of the recipe `dropout`.
        dropout: makes a dropout layer of a rate.

    Raises:
        ValueError: no such recipe.

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
        case "lenet-bn":
            return LeNetBN()
        case "cnn":
            return CNN()
    raise ValueError(f"no module for {model!r}")


def loss_of(model: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of a task's model, `(prediction, y) -> scalar`.

    >>> loss_of("linreg").__name__, loss_of("lenet").__name__
    ('half_mse', 'cross_entropy')
    """
    return half_mse if model == "linreg" else F.cross_entropy
