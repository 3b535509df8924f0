"""Images changed at random, as functions of a key."""

from __future__ import annotations

import torch
from torch import Tensor

from fdl import random
from fdl._checks import check_at_least_0, describe
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
    check_images("random_crop", key, x)
    _check_pixels("random_crop", padding=padding)
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
    check_images("random_flip", key, x)
    flips = random.bernoulli(key, 0.5, x.shape[:-3])
    return torch.where(flips[..., None, None, None], x.flip(-1), x)


def random_brightness(key: Key, x: Tensor, amount: float) -> Tensor:
    """Multiply each image by a factor drawn uniformly from [max(0, 1 − amount), 1 + amount].

    The factors are those of `torchvision.transforms.ColorJitter(brightness=amount)`, but floats may
    leave [0, 1], since images that are normalised do. Integers are rounded, and stay at the largest
    value of their dtype. Each image has a draw of its own.

    Args:
        key: a key, int64 [2].
        x: images `[..., channels, height, width]` of any real dtype.
        amount: the largest change, at least 0.

    Returns:
        Images of the shape and dtype of `x`.

    Raises:
        TypeError: `key` is not a key, `x` is not a tensor of real numbers, or `amount` not one.
        ValueError: `x` has fewer than three axes, or `amount` is negative or not finite.

    >>> grey = torch.full((3, 1, 1, 1), 200, dtype=torch.uint8)
    >>> random_brightness(random.key(0), grey, 0.5).flatten()
    tensor([184, 143, 255], dtype=torch.uint8)
    """
    check_images("random_brightness", key, x, real=True)
    check_at_least_0("random_brightness", amount=amount)
    working = x.dtype if x.is_floating_point() else torch.float64
    low = max(0.0, 1 - amount)
    factor = draw_between(key, x, low, 1 + amount).to(working)
    return rounded(x.to(working) * factor[..., None, None, None], x.dtype)


def random_cutout(key: Key, x: Tensor, size: int) -> Tensor:
    """Set a square of each image to 0, whose centre is any pixel; at the edges less is left.

    Source: DeVries and Taylor, Improved Regularization of Convolutional Neural Networks with
    Cutout, 2017, https://arxiv.org/abs/1708.04552. Each image has a draw of its own, which all of
    its channels share.

    Args:
        key: a key, int64 [2].
        x: images `[..., channels, height, width]` of any dtype.
        size: side of the square in pixels, at least 0.

    Returns:
        Images of the shape and dtype of `x`.

    Raises:
        TypeError: `key` is not a key, `x` is not a tensor, or `size` not an int.
        ValueError: `x` has fewer than three axes, or `size` is negative.

    >>> row = torch.arange(1, 6).expand(3, 1, 1, 5)  # three images of 1 × 5 pixels
    >>> random_cutout(random.key(0), row, 3)[:, 0, 0]
    tensor([[1, 2, 0, 0, 0],
            [1, 0, 0, 0, 5],
            [1, 2, 0, 0, 0]])
    """
    check_images("random_cutout", key, x)
    _check_pixels("random_cutout", size=size)
    cut = torch.ones((), dtype=torch.bool, device=x.device)
    for k, dim in zip(random.split(key, 2), (-2, -1), strict=True):
        first = random.randint(k, x.shape[:-3], 0, max(1, x.shape[dim])) - size // 2
        ahead = torch.arange(x.shape[dim], device=x.device) - first[..., None]
        inside = (ahead >= 0) & (ahead < size)
        cut = cut & (inside[..., None, :, None] if dim == -2 else inside[..., None, None, :])
    return torch.where(cut, x.new_zeros(()), x)


def normalize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Subtract the mean of each channel, and divide by its standard deviation.

    Equals `torchvision.transforms.functional.normalize`.

    Args:
        x: images `[..., channels, height, width]`, floating.
        mean: of each channel, `[channels]`.
        std: of each channel, `[channels]`.

    Returns:
        Images of the shape and dtype of `x`.

    Raises:
        TypeError: one of them is not a floating tensor.
        ValueError: `x` has fewer than three axes, or the others have another shape.

    >>> normalize(torch.ones(1, 2, 2), torch.tensor([0.5]), torch.tensor([0.25]))
    tensor([[[2., 2.],
             [2., 2.]]])
    """
    for name, tensor in (("x", x), ("mean", mean), ("std", std)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            hint = "; data.to_float makes images of 0 to 1" if name == "x" else ""
            got = describe(tensor)
            raise TypeError(f"normalize: {name} must be a floating tensor, got {got}{hint}")
    _check_axes("normalize", x)
    for name, tensor in (("mean", mean), ("std", std)):
        if tensor.shape != x.shape[-3:-2]:
            raise ValueError(
                f"normalize: {name} must be [channels], {list(x.shape[-3:-2])}, "
                f"got {list(tensor.shape)}"
            )
    mean, std = (tensor.to(x.dtype)[:, None, None] for tensor in (mean, std))
    return (x - mean) / std


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert to a dtype: integers are rounded and stay within it, a bool is whether x ≥ ½.

    >>> rounded(torch.tensor([-3.0, 1.6, 300.0]), torch.uint8)
    tensor([  0,   2, 255], dtype=torch.uint8)
    """
    if dtype.is_floating_point:
        return x.to(dtype)
    if dtype == torch.bool:
        return x >= 0.5
    limits = torch.iinfo(dtype)
    return x.round().clamp(limits.min, limits.max).to(dtype)


def draw_between(key: Key, x: Tensor, low: float, high: float) -> Tensor:
    """Draw a number between two, which may be equal, for each image: float64 `x.shape[:-3]`.

    >>> draw_between(random.key(0), torch.zeros(2, 1, 4, 4), 3.0, 3.0)
    tensor([3., 3.], dtype=torch.float64)
    """
    return low + (high - low) * random.uniform(key, x.shape[:-3], torch.float64)


def check_images(caller: str, key: Key, x: Tensor, real: bool = False) -> None:
    """Raise an error unless `x` is a tensor of images, of real numbers if asked.

    >>> check_images("here", random.key(0), torch.zeros(1, 2, 2))
    """
    check_key(caller, key)
    if not isinstance(x, Tensor) or (real and x.is_complex()):
        numbers = " of real numbers" if real else ""
        raise TypeError(f"{caller}: x must be a tensor{numbers}, got {describe(x)}")
    _check_axes(caller, x)


def _check_axes(caller: str, x: Tensor) -> None:
    if x.ndim < 3:
        raise ValueError(
            f"{caller}: x must be images [..., channels, height, width], got {list(x.shape)}"
        )


def _check_pixels(caller: str, **options: int) -> None:
    for name, number in options.items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{caller}: {name} must be an int, got {describe(number)}")
        if number < 0:
            raise ValueError(f"{caller}: {name} must be at least 0, got {number}")
