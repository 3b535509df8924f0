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
    "ResNet",
    "Residual",
    "Transformer",
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

    def __init__(self, classes: int = 10, channels: int = 1, side: int = 28) -> None:
        super().__init__()
        features = 16 * (((side - 4) // 2 - 4) // 2) ** 2
        self.conv = nn.Sequential(
            nn.Conv2d(channels, 6, 5),
            nn.Sigmoid(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.Sigmoid(),
            nn.MaxPool2d(2),
        )
        self.fc = nn.Sequential(
            nn.Linear(features, 120),
            nn.Sigmoid(),
            nn.Linear(120, 84),
            nn.Sigmoid(),
            nn.Linear(84, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[batch, channels, side, side]` to logits."""
        return self.fc(self.conv(x).flatten(1))


class LeNetBN(nn.Module):
    """LeNet with batch normalisation of every hidden layer.

    >>> import torch
    >>> LeNetBN()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, classes: int = 10, channels: int = 1, side: int = 28) -> None:
        super().__init__()
        features = 16 * (((side - 4) // 2 - 4) // 2) ** 2
        self.conv = nn.Sequential(
            *(nn.Conv2d(channels, 6, 5), nn.BatchNorm2d(6), nn.Sigmoid(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.BatchNorm2d(16), nn.Sigmoid(), nn.MaxPool2d(2)),
        )
        self.fc = nn.Sequential(
            *(nn.Linear(features, 120), nn.BatchNorm1d(120), nn.Sigmoid()),
            *(nn.Linear(120, 84), nn.BatchNorm1d(84), nn.Sigmoid()),
            nn.Linear(84, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[batch, channels, side, side]` to logits."""
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


class Residual(nn.Sequential):
    """Add what the layers compute to their input.

    >>> import torch
    >>> Residual(nn.ReLU())(torch.ones(2))
    tensor([2., 2.])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x + layers(x)."""
        return x + super().forward(x)


class ResNet(nn.Module):
    """A small residual network, normalised before each convolution.

    >>> import torch
    >>> ResNet()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, width: int = 16, classes: int = 10, channels: int = 1) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int) -> nn.Module:
            layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(layer.weight)
            return layer

        def normed_conv(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
            return nn.BatchNorm2d(inputs), nn.ReLU(), conv(inputs, outputs)

        def block(width: int) -> nn.Module:
            return Residual(*normed_conv(width, width), *normed_conv(width, width))

        self.stem = nn.Sequential(conv(channels, width), nn.MaxPool2d(2))
        self.block1 = block(width)
        self.wider1 = nn.Sequential(*normed_conv(width, 2 * width), nn.MaxPool2d(2))
        self.block2 = block(2 * width)
        self.wider2 = nn.Sequential(*normed_conv(2 * width, 4 * width))
        self.block3 = block(4 * width)
        self.head = nn.Sequential(nn.BatchNorm2d(4 * width), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[batch, channels, height, width]` to logits."""
        x = self.wider1(self.block1(self.stem(x)))
        x = self.block3(self.wider2(self.block2(x)))
        return self.fc(self.head(x).flatten(1))


class Transformer(nn.Module):
    """A small transformer on patches of 4 × 4 pixels.

    >>> import torch
    >>> Transformer()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        width: int = 64,
        heads: int = 4,
        depth: int = 2,
        classes: int = 10,
        *,
        rate: float = 0.1,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(16, width)
        self.position = nn.Embedding(49, width)
        nn.init.normal_(self.position.weight, std=0.02)
        self.encoder = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, heads, 2 * width, rate, "gelu", norm_first=True, batch_first=True
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[batch, 1, 28, 28]` to logits."""
        patches = F.unfold(x, 4, stride=4).transpose(1, 2)  # [batch, 49, 16]
        x = self.encoder(self.embed(patches) + self.position.weight)
        return self.fc(self.norm(x).mean(1))


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
        case "resnet-small":
            return ResNet()
    raise ValueError(f"no module for {model!r}")


def loss_of(model: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of a task's model, `(prediction, y) -> scalar`.

    >>> loss_of("linreg").__name__, loss_of("lenet").__name__
    ('half_mse', 'cross_entropy')
    """
    return half_mse if model == "linreg" else F.cross_entropy
