"""Images changed at random, as functions of a key: `random_crop` and `random_flip`."""

from __future__ import annotations

import torch
from torch import Tensor

from fdl import random
from fdl._checks import describe
from fdl.random import Key
from fdl.random._checks import check_key


def random_crop(key: Key, x: Tensor, padding: int) -> Tensor:
    """Shift each image by up to `padding` pixels along both axes; zeros come in at the edges.

    Equals `torchvision.transforms.RandomCrop` to the size of the image, with this padding: zeros
    are put around the image, and a part of its size is cut out at a place drawn uniformly. Each
    image has a draw of its own, which all of its channels share.

    Args:
        key: a key, int64 [2].
        x: images `[..., channels, height, width]` of any dtype.
        padding: the largest shift in pixels, at least 0.

    Returns:
        Images of the shape and dtype of `x`.

    Raises:
        TypeError: `key` is not a key, `x` is not a tensor, or `padding` not an int.
        ValueError: `x` has fewer than three axes, or `padding` is negative.

    >>> row = torch.arange(1, 5).expand(3, 1, 1, 4)  # three images of 1 × 4 pixels
    >>> random_crop(random.key(3), row, 1)[:, 0, 0]
    tensor([[2, 3, 4, 0],
            [0, 0, 0, 0],
            [0, 1, 2, 3]])
    """
    _check_images("random_crop", key, x)
    if not isinstance(padding, int) or isinstance(padding, bool):
        raise TypeError(f"random_crop: padding must be an int, got {describe(padding)}")
    if padding < 0:
        raise ValueError(f"random_crop: padding must be at least 0, got {padding}")
    shifts = random.randint(key, (*x.shape[:-3], 2), -padding, padding + 1)
    for dim, shift in zip((-2, -1), shifts.unbind(-1), strict=True):
        x = _shifted(x, shift[..., None, None, None], dim)
    return x


def _shifted(x: Tensor, shift: Tensor, dim: int) -> Tensor:
    """Let pixel i along an axis be pixel i + shift, or 0 where there is none."""
    n = x.shape[dim]
    positions = torch.arange(n, device=x.device).view(-1, *[1] * (-1 - dim)) + shift
    inside = (positions >= 0) & (positions < n)
    return torch.where(
        inside, torch.take_along_dim(x, positions.clamp(0, n - 1), dim), x.new_zeros(())
    )


def random_flip(key: Key, x: Tensor) -> Tensor:
    """Mirror each image from left to right with probability ½.

    Equals `torchvision.transforms.RandomHorizontalFlip`. Each image has a draw of its own.

    Args:
        key: a key, int64 [2].
        x: images `[..., channels, height, width]` of any dtype.

    Returns:
        Images of the shape and dtype of `x`.

    Raises:
        TypeError: `key` is not a key, or `x` is not a tensor.
        ValueError: `x` has fewer than three axes.

    >>> row = torch.arange(4).expand(3, 1, 1, 4)  # three images of 1 × 4 pixels
    >>> random_flip(random.key(0), row)[:, 0, 0]
    tensor([[0, 1, 2, 3],
            [0, 1, 2, 3],
            [3, 2, 1, 0]])
    """
    _check_images("random_flip", key, x)
    flips = random.bernoulli(key, 0.5, x.shape[:-3])
    return torch.where(flips[..., None, None, None], x.flip(-1), x)


def _check_images(caller: str, key: Key, x: Tensor) -> None:
    check_key(caller, key)
    if not isinstance(x, Tensor):
        raise TypeError(f"{caller}: x must be a tensor, got {describe(x)}")
    if x.ndim < 3:
        raise ValueError(
            f"{caller}: x must be images [..., channels, height, width], got {list(x.shape)}"
        )
