"""Softmax regression: one linear layer and a cross-entropy."""

from __future__ import annotations

from fdl import nn
from fdl.nn import Model

__all__ = ["softmax_regression"]


def softmax_regression(features: int = 784, classes: int = 10, *, std: float = 0.01) -> Model:
    """o = x Wᵀ + b; p = softmax(o), trained on −log p[label].

    The softmax is part of the loss (`fdl.losses.cross_entropy`), which works from the logits o and
    so stays finite. With the one-hot labels Y `[n, classes]`, the mean loss has the gradient

        ∂/∂W = (P − Y)ᵀ X / n        ∂/∂b = Σ (P − Y) / n

    Args:
        features: pixels of an image.
        classes: the number of classes.
        std: W is drawn from N(0, std²); b starts at 0.

    Returns:
        A model from images `[batch, ...]` with `features` pixels to logits `[batch, classes]`, with
        the parameters `1.weight` `[classes, features]` and `1.bias` `[classes]`.

    >>> import torch
    >>> from fdl import random
    >>> model = softmax_regression()
    >>> model.apply(model.init(random.key(0)), torch.zeros(256, 1, 28, 28)).shape
    torch.Size([256, 10])
    """
    return nn.sequential(
        nn.flatten(),
        nn.linear(features, classes, weight_init=nn.init.normal(std), bias_init=nn.init.zeros),
    )
