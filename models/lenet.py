"""LeNet, for square images; the course has 28 × 28 pixels."""

from __future__ import annotations

from fdl import nn
from fdl.nn import Model

__all__ = ["lenet"]


def lenet(classes: int = 10, *, channels: int = 1, side: int = 28) -> Model:
    """Two convolutions that see, three dense layers that decide (LeCun et al., 1998).

        x                              [batch,  1, 28, 28]
        conv.0   5 × 5                 [batch,  6, 24, 24]
        conv.1   max-pool 2 × 2        [batch,  6, 12, 12]  sigmoid
        conv.3   5 × 5                 [batch, 16,  8,  8]
        conv.4   max-pool 2 × 2        [batch, 16,  4,  4]  sigmoid
        fc.0     linear, sigmoid       [batch, 120]
        fc.2     linear, sigmoid       [batch,  84]
        fc.4     linear                [batch, classes]

    The course takes the maximum of sigmoids, which is the sigmoid of the maximum; this way round
    there are a quarter as many to compute.

    Weights are drawn by Xavier's uniform rule, biases start at 0. Without padding, 44,426
    parameters for 10 classes.

    Args:
        classes: the number of classes.
        channels: 1 for grey images, 3 for colours.
        side: the height and width of an image, at least 16; the table has 28.

    Returns:
        A model from `[batch, channels, side, side]` to logits `[batch, classes]`, with the
        parameters `conv.0.*`, `conv.3.*`, `fc.0.*`, `fc.2.*`, `fc.4.*`.

    Raises:
        ValueError: `side` is below 16.

    >>> import torch
    >>> from fdl import random, tree
    >>> model = lenet()
    >>> params = model.init(random.key(0))
    >>> tree.size(params), model.apply(params, torch.zeros(256, 1, 28, 28)).shape
    (44426, torch.Size([256, 10]))
    """
    left = ((side - 4) // 2 - 4) // 2  # of the side, after both convolutions and pools
    if left < 1:
        raise ValueError(f"lenet: side must be at least 16, got {side}")
    xavier, zeros = nn.init.xavier_uniform(), nn.init.zeros

    def conv(inputs: int, outputs: int) -> Model:
        return nn.conv2d(inputs, outputs, 5, weight_init=xavier, bias_init=zeros)

    def dense(inputs: int, outputs: int) -> Model:
        return nn.linear(inputs, outputs, weight_init=xavier, bias_init=zeros)

    return nn.sequential(
        conv=nn.sequential(
            conv(channels, 6),
            nn.max_pool2d(2),
            nn.sigmoid,
            conv(6, 16),
            nn.max_pool2d(2),
            nn.sigmoid,
        ),
        flatten=nn.flatten(),
        fc=nn.sequential(
            dense(16 * left * left, 120), nn.sigmoid, dense(120, 84), nn.sigmoid, dense(84, classes)
        ),
    )
