"""The dropout layer."""

from __future__ import annotations

import torch
from torch import Tensor

from fdl import random
from fdl.nn._helpers import check_input
from fdl.nn._model import Model
from fdl.tree import Tree


def dropout(rate: float) -> Model:
    """Zero each element with probability `rate` and scale the rest by 1 / (1 − rate), in training.

    With `train=False` the layer is the identity. Equals `torch.nn.Dropout` in distribution; an
    element is kept where `random.uniform(key, x.shape) >= rate`.

    Args:
        rate: the fraction dropped, in [0, 1).

    Raises:
        TypeError: x holds integers (at apply, in training).
        ValueError: `rate` is outside [0, 1); at apply, `train=True` without a key.

    Source: Srivastava et al., Dropout: A Simple Way to Prevent Neural Networks from Overfitting,
    2014.

    >>> layer = dropout(0.5)
    >>> layer.apply({}, torch.ones(6), train=True, key=random.key(3)).unique()
    tensor([0., 2.])
    >>> layer.apply({}, torch.ones(6))
    tensor([1., 1., 1., 1., 1., 1.])
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout: rate, the fraction dropped, must be in [0, 1), got {rate}")

    def apply(params: Tree, x: Tensor, *, train: bool = False, key: Tensor | None = None) -> Tensor:
        if not train or rate == 0:
            return x
        if key is None:
            raise ValueError(
                f"dropout({rate}) with train=True needs a key: pass key=fdl.random.key(seed) to "
                "apply, or train=False to evaluate"
            )
        check_input(f"dropout({rate})", x)
        return torch.where(random.uniform(key, x.shape) >= rate, x / (1 - rate), 0)

    return Model(lambda key: {}, apply, uses_key=rate > 0)
