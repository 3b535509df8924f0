"""A small residual network, for images of any size; the course has 28 × 28 pixels."""

from __future__ import annotations

from fdl import nn
from fdl.nn import Layer, Model, StatefulModel

__all__ = ["resnet"]


def resnet(width: int = 16, classes: int = 10, *, channels: int = 1) -> StatefulModel:
    """Three residual blocks, h ← h + W₂ ∗ relu(norm(W₁ ∗ relu(norm(h)))) (He et al., 2016).

    With w the width:

        x                                       [batch,  1, 28, 28]
        stem     3 × 3, max-pool 2 × 2          [batch,  w, 14, 14]
        block1   residual                       [batch,  w, 14, 14]
        wider1   norm, ReLU, 3 × 3, max-pool    [batch, 2w,  7,  7]
        block2   residual                       [batch, 2w,  7,  7]
        wider2   norm, ReLU, 3 × 3              [batch, 4w,  7,  7]
        block3   residual                       [batch, 4w,  7,  7]
        head     norm, ReLU, mean of pixels     [batch, 4w]
        fc       linear                         [batch, classes]

    What a block adds is a correction: the sum leaves a path on which nothing is multiplied, so that
    gradients reach the first layer whatever the number of blocks. Norm and ReLU come before the
    convolution, so nothing stands on that path. Convolutions have no bias, since norms subtract it.

    Args:
        width: the number of channels of the first block, doubled twice.
        classes: the number of classes.
        channels: 1 for grey images, 3 for colours.

    Returns:
        A model with buffers from `[batch, channels, height, width]`, each at least 4, to logits
        `[batch, classes]`; kernels are drawn by Kaiming's normal rule.

    Source: He et al., Identity Mappings in Deep Residual Networks, 2016,
    https://arxiv.org/abs/1603.05027

    >>> import torch
    >>> from fdl import random, tree
    >>> model = resnet()
    >>> params, buffers = model.init(random.key(0))
    >>> tree.size(params), list(params["block1"])
    (121274, ['0', '2', '3', '5'])
    >>> y, buffers = model.apply(params, buffers, torch.zeros(256, 1, 28, 28), train=True)
    >>> y.shape
    torch.Size([256, 10])
    """

    def conv(inputs: int, outputs: int) -> Model:
        kaiming = nn.init.kaiming_normal()
        return nn.conv2d(inputs, outputs, 3, padding=1, bias=False, weight_init=kaiming)

    def normed_conv(inputs: int, outputs: int) -> tuple[Layer | StatefulModel, ...]:
        return nn.batch_norm(inputs), nn.relu, conv(inputs, outputs)

    def block(width: int) -> StatefulModel:
        return nn.residual(nn.sequential(*normed_conv(width, width), *normed_conv(width, width)))

    return nn.sequential(
        stem=nn.sequential(conv(channels, width), nn.max_pool2d(2)),
        block1=block(width),
        wider1=nn.sequential(*normed_conv(width, 2 * width), nn.max_pool2d(2)),
        block2=block(2 * width),
        wider2=nn.sequential(*normed_conv(2 * width, 4 * width)),
        block3=block(4 * width),
        head=nn.sequential(nn.batch_norm(4 * width), nn.relu, lambda x: x.mean((2, 3))),
        fc=nn.linear(4 * width, classes),
    )
