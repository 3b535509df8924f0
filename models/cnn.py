"""A network of three convolutions, for images of 28 × 28 pixels."""

from __future__ import annotations

from fdl import nn
from fdl.nn import Model

__all__ = ["cnn"]


def cnn(classes: int = 10) -> Model:
    """Three padded convolutions with ReLU, each followed by a maximum, and a linear layer.

        x                              [batch,  1, 28, 28]
        conv.0   3 × 3, ReLU           [batch, 16, 28, 28]
        conv.2   max-pool 2 × 2        [batch, 16, 14, 14]
        conv.3   3 × 3, ReLU           [batch, 32, 14, 14]
        conv.5   max-pool 2 × 2        [batch, 32,  7,  7]
        conv.6   3 × 3, ReLU           [batch, 32,  7,  7]
        conv.8   max-pool 2 × 2        [batch, 32,  3,  3]
        fc       linear                [batch, classes]

    Args:
        classes: the number of classes.

    Returns:
        A model from `[batch, 1, 28, 28]` to logits `[batch, classes]`, with the parameters
        `conv.0.*`, `conv.3.*`, `conv.6.*` and `fc.*`, drawn as torch draws them.

    >>> import torch
    >>> from fdl import random, tree
    >>> model = cnn()
    >>> params = model.init(random.key(0))
    >>> tree.size(params), model.apply(params, torch.zeros(256, 1, 28, 28)).shape
    (16938, torch.Size([256, 10]))
    """
    conv = nn.sequential(
        *(nn.conv2d(1, 16, 3, padding=1), nn.relu, nn.max_pool2d(2)),
        *(nn.conv2d(16, 32, 3, padding=1), nn.relu, nn.max_pool2d(2)),
        *(nn.conv2d(32, 32, 3, padding=1), nn.relu, nn.max_pool2d(2)),
    )
    return nn.sequential(conv=conv, flatten=nn.flatten(), fc=nn.linear(32 * 3 * 3, classes))
