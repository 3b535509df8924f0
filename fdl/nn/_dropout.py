"""Dropout of elements and of channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fdl import random
from fdl._checks import check_number
from fdl.nn._helpers import check_input, check_key_given
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
    return _dropout("dropout", rate, lambda x: x.shape)


def dropout2d(rate: float) -> Model:
    """Zero each channel of each image with probability `rate`, in training; scale the rest.

    With `train=False` the layer is the identity. Equals `torch.nn.Dropout2d` in distribution for x
    `[batch, channels, h, w]`; a channel is kept where `random.uniform(key, [batch, channels, 1, 1])
    >= rate`, and scaled by 1 / (1 − rate).

    Args:
        rate: the fraction dropped, in [0, 1).

    Raises:
        TypeError: x holds integers (at apply, in training).
        ValueError: `rate` is outside [0, 1); at apply, x does not have 4 axes, or `train=True`
            without a key.

    Source: Tompson et al., Efficient Object Localization Using Convolutional Networks, 2015,
    https://arxiv.org/abs/1411.4280

    >>> layer = dropout2d(0.5)
    >>> y = layer.apply({}, torch.ones(1, 4, 2, 2), train=True, key=random.key(0))
    >>> y.mean((2, 3))
    tensor([[2., 2., 0., 0.]])
    """
    name = f"dropout2d({rate})"

    def channels(x: Tensor) -> Sequence[int]:
        if x.ndim != 4:  # torch reads [a, b, c] as a batch of one axis, others as one image
            raise ValueError(
                f"{name}: expected x [batch, channels, height, width], got {list(x.shape)}"
            )
        return (*x.shape[:2], 1, 1)

    return _dropout("dropout2d", rate, channels)


def _dropout(function: str, rate: float, shape: Callable[[Tensor], Sequence[int]]) -> Model:
    """Return a dropout layer whose mask for x has the shape `shape(x)`."""
    check_rate(function, "rate", rate)
    name = f"{function}({rate})"

    def apply(params: Tree, x: Tensor, *, train: bool = False, key: Tensor | None = None) -> Tensor:
        if not train or rate == 0:
            return x
        keep_key = check_key_given(name, key)
        check_input(name, x)
        return torch.where(random.uniform(keep_key, shape(x)) >= rate, x / (1 - rate), 0)

    return Model(lambda key: {}, apply, uses_key=rate > 0)


def check_rate(layer: str, argument: str, rate: float) -> None:
    """Raise unless `rate` is a fraction that may be dropped.

    >>> check_rate("dropout", "rate", 0.5)
    """
    name = f"{argument}, the fraction dropped,"
    check_number(layer, name, rate, "in [0, 1)", lambda rate: 0 <= rate < 1)
