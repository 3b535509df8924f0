"""Layers without parameters that change shapes: pooling and `flatten`."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fdl._checks import describe
from fdl.nn._helpers import Size, as_pair


def _check_window(name: str, kernel_size: Size, stride: Size | None, padding: Size) -> None:
    sizes = as_pair(name, "kernel_size", kernel_size)
    if stride is not None:
        as_pair(name, "stride", stride)
    pads = as_pair(name, "padding", padding, least=0)
    if any(2 * pad > size for pad, size in zip(pads, sizes, strict=True)):
        raise ValueError(f"{name}: padding {padding} is more than half the window {kernel_size}")


def max_pool2d(
    kernel_size: Size, stride: Size | None = None, padding: Size = 0
) -> Callable[[Tensor], Tensor]:
    """Take the maximum of each window; equals `torch.nn.MaxPool2d`.

    Args:
        kernel_size: height and width of the window, or one int for both; `stride` and `padding`
            likewise.
        stride: step between windows; if None, `kernel_size`.
        padding: −∞ around the image, at most half the window.

    Raises:
        ValueError: a size is below 1 or not one or two ints, or `padding` is below 0 or more than
            half the window.

    >>> import torch
    >>> max_pool2d(2)(torch.arange(16.0).view(1, 1, 4, 4)).flatten()
    tensor([ 5.,  7., 13., 15.])
    """
    _check_window("max_pool2d", kernel_size, stride, padding)
    return lambda x: F.max_pool2d(x, kernel_size, stride, padding)


def avg_pool2d(
    kernel_size: Size, stride: Size | None = None, padding: Size = 0
) -> Callable[[Tensor], Tensor]:
    """Take the mean of each window, padding included; equals `torch.nn.AvgPool2d`.

    Args:
        kernel_size: height and width of the window, or one int for both; `stride` and `padding`
            likewise.
        stride: step between windows; if None, `kernel_size`.
        padding: zeros around the image, at most half the window.

    Raises:
        ValueError: a size is below 1 or not one or two ints, or `padding` is below 0 or more than
            half the window.

    >>> import torch
    >>> avg_pool2d(2)(torch.arange(16.0).view(1, 1, 4, 4)).flatten()
    tensor([ 2.5000,  4.5000, 10.5000, 12.5000])
    """
    _check_window("avg_pool2d", kernel_size, stride, padding)
    return lambda x: F.avg_pool2d(x, kernel_size, stride, padding)


def flatten(start: int = 1, end: int = -1) -> Callable[[Tensor], Tensor]:
    """Flatten the axes from `start` to `end`, by default all but the first; `torch.nn.Flatten`.

    Args:
        start: first axis to flatten; negative numbers count from the last.
        end: last axis to flatten.

    Raises:
        TypeError: an axis that is not an int.
        ValueError: `end` comes before `start`, and both count from the same side.

    >>> import torch
    >>> flatten()(torch.zeros(256, 1, 28, 28)).shape
    torch.Size([256, 784])
    """
    for name, axis in (("start", start), ("end", end)):
        if not isinstance(axis, int):
            raise TypeError(
                f"flatten: {name} must be an int, got {describe(axis)}; nn.flatten() makes a layer"
            )
    if end < start and (end < 0) == (start < 0):
        raise ValueError(f"flatten: end must not come before start, got {start=}, {end=}")
    return lambda x: x.flatten(start, end)
