"""A small transformer that classifies images of 28 × 28 pixels as sequences of patches."""

from __future__ import annotations

import torch
from torch import Tensor

from fdl import nn
from fdl.nn import Model
from fdl.tree import Tree

__all__ = ["transformer"]

SIDE, PATCH = 28, 4  # pixels
LENGTH = (SIDE // PATCH) ** 2


def transformer(
    width: int = 64, heads: int = 4, depth: int = 2, classes: int = 10, *, rate: float = 0.1
) -> Model:
    """Cut an image into words, let them attend to each other, and average what they found.

        x                                             [batch, 1, 28, 28]
        patches     4 × 4 pixels as one row           [batch, 49, 16]
        embed       linear                            [batch, 49, width]
        position    + a learned row for each place    [batch, 49, width]
        encoder     depth times: h ← h + attention(norm(h)); h ← h + mlp(norm(h))
        norm, mean of the patches                     [batch, width]
        fc          linear                            [batch, classes]

    Attention does not know where a patch was: if the rows of `position` were equal, the patches
    could be shuffled without any change.

    Args:
        width: number of features of a patch.
        heads: number of heads of the attention; divides `width`.
        depth: number of encoder layers.
        classes: the number of classes.
        rate: dropout rate within the encoder layers.

    Returns:
        A model from `[batch, 1, 28, 28]` to logits `[batch, classes]`, with the parameters
        `embed.*`, `position.weight`, `encoder.0.*`, …, `norm.*`, `fc.*`.

    Raises:
        ValueError: `width` or `classes` below 1, `heads` does not divide `width`, or a rate outside
            [0, 1).

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words, 2021,
    https://arxiv.org/abs/2010.11929

    >>> from fdl import random, tree
    >>> model = transformer()
    >>> params = model.init(random.key(0))
    >>> tree.size(params), model.apply(params, torch.zeros(256, 1, 28, 28)).shape
    (71946, torch.Size([256, 10]))
    """
    layer = nn.transformer_encoder_layer(
        width, heads, dim_feedforward=2 * width, dropout=rate, activation=nn.gelu, norm_first=True
    )
    return nn.sequential(
        patches=nn.rearrange("b c (h p) (w q) -> b (h w) (c p q)", p=PATCH, q=PATCH),
        embed=nn.linear(PATCH * PATCH, width),
        position=position(LENGTH, width),
        encoder=nn.sequential(*[layer] * depth),
        norm=nn.layer_norm(width),
        mean=lambda x: x.mean(1),
        fc=nn.linear(width, classes),
    )


def position(length: int, width: int) -> Model:
    """Add to each place of a sequence a row of its own, drawn from N(0, 0.02²).

    Args:
        length: number of places.
        width: number of features.

    Returns:
        A layer from `[batch, length, width]` to the same shape, with the parameter `weight`
        `[length, width]`.

    Raises:
        ValueError: at apply, x has another length or width.

    >>> from fdl import random
    >>> layer = position(3, 2)
    >>> layer.apply({"weight": torch.arange(6.0).view(3, 2)}, torch.zeros(1, 3, 2))
    tensor([[[0., 1.],
             [2., 3.],
             [4., 5.]]])
    """
    table = nn.embedding(length, width, weight_init=nn.init.normal(0.02))

    def apply(params: Tree, x: Tensor, *, train: bool = False, key: Tensor | None = None) -> Tensor:
        if x.shape[-2:] != (length, width):
            raise ValueError(
                f"position({length}, {width}): expected x [batch, {length}, {width}], got "
                f"{list(x.shape)}"
            )
        return x + table.apply(params, torch.arange(length, device=x.device))

    return Model(table.init, apply, uses_key=False)
