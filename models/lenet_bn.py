"""LeNet with batch normalisation, for square images; the course has 28 × 28 pixels."""

from __future__ import annotations

from fdl import nn
from fdl.nn import Model, StatefulModel

__all__ = ["lenet_bn"]


def lenet_bn(classes: int = 10, *, channels: int = 1, side: int = 28) -> StatefulModel:
    """LeNet whose every hidden layer is normalised over the batch (Ioffe and Szegedy, 2015).

        x                                 [batch,  1, 28, 28]
        conv.0   5 × 5, conv.1   norm     [batch,  6, 24, 24]  sigmoid
        conv.3   max-pool 2 × 2           [batch,  6, 12, 12]
        conv.4   5 × 5, conv.5   norm     [batch, 16,  8,  8]  sigmoid
        conv.7   max-pool 2 × 2           [batch, 16,  4,  4]
        fc.0     linear, fc.1    norm     [batch, 120]         sigmoid
        fc.3     linear, fc.4    norm     [batch,  84]         sigmoid
        fc.6     linear                   [batch, classes]

    A norm keeps the mean and variance of what it saw as buffers, and evaluates with them. A scale
    that it learns may be negative, so here the maximum is taken of the sigmoids.

    Args:
        classes: the number of classes.
        channels: 1 for grey images, 3 for colours.
        side: the height and width of an image, at least 16; the table has 28.

    Returns:
        A model with buffers from `[batch, channels, side, side]` to logits `[batch, classes]`;
        weights are drawn by Xavier's uniform rule, biases start at 0.

    Raises:
        ValueError: `side` is below 16.

    >>> import torch
    >>> from fdl import random, tree
    >>> model = lenet_bn()
    >>> params, buffers = model.init(random.key(0))
    >>> tree.size(params), list(buffers["fc"])
    (44878, ['1', '4'])
    >>> y, buffers = model.apply(params, buffers, torch.zeros(256, 1, 28, 28), train=True)
    >>> y.shape, buffers["fc"]["1"]["num_batches_tracked"]
    (torch.Size([256, 10]), tensor(1))
    """
    left = ((side - 4) // 2 - 4) // 2  # of the side, after both convolutions and pools
    if left < 1:
        raise ValueError(f"lenet_bn: side must be at least 16, got {side}")
    xavier, zeros = nn.init.xavier_uniform(), nn.init.zeros

    def conv(inputs: int, outputs: int) -> Model:
        return nn.conv2d(inputs, outputs, 5, weight_init=xavier, bias_init=zeros)

    def dense(inputs: int, outputs: int) -> Model:
        return nn.linear(inputs, outputs, weight_init=xavier, bias_init=zeros)

    return nn.sequential(
        conv=nn.sequential(
            *(conv(channels, 6), nn.batch_norm(6), nn.sigmoid, nn.max_pool2d(2)),
            *(conv(6, 16), nn.batch_norm(16), nn.sigmoid, nn.max_pool2d(2)),
        ),
        flatten=nn.flatten(),
        fc=nn.sequential(
            *(dense(16 * left * left, 120), nn.batch_norm(120), nn.sigmoid),
            *(dense(120, 84), nn.batch_norm(84), nn.sigmoid),
            dense(84, classes),
        ),
    )
