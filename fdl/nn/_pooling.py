"""Pooling and flattening."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fdl.nn._helpers import Size, _pair


def _check_window(name: str, kernel_size: Size, stride: Size | None, padding: Size) -> None:
    sizes = _pair(name, "kernel_size", kernel_size)
    if stride is not None:
        _pair(name, "stride", stride)
    if any(2 * p > k for p, k in zip(_pair(name, "padding", padding, least=0), sizes, strict=True)):
        raise ValueError(f"{name}: padding {padding} is more than half the window {kernel_size}")


def max_pool2d(
    kernel_size: Size, stride: Size | None = None, padding: Size = 0
) -> Callable[[Tensor], Tensor]:
    """Take the maximum of each window; equals `torch.nn.MaxPool2d`.

    Args:
        kernel_size: height and width of the window, or one number for both; likewise below.
        stride: step between windows; `kernel_size` if None.
        padding: −∞ around the image, at most half the window.

    Raises:
        ValueError: a size below 1 or not one or two numbers, a padding below 0 or above half the
            window.

    >>> import torch
    >>> max_pool2d(2)(torch.arange(16.0).view(1, 1, 4, 4)).flatten()
    tensor([ 5.,  7., 13., 15.])
    """
    _check_window("max_pool2d", kernel_size, stride, padding)
    return lambda x: F.max_pool2d(x, kernel_size, stride, padding)


def avg_pool2d(
    kernel_size: Size, stride: Size | None = None, padding: Size = 0
) -> Callable[[Tensor], Tensor]:
    """Take the mean of each window, padding counted; equals `torch.nn.AvgPool2d`.

    Args:
        kernel_size: height and width of the window, or one number for both; likewise below.
        stride: step between windows; `kernel_size` if None.
        padding: zeros around the image, at most half the window.

    Raises:
        ValueError: a size below 1 or not one or two numbers, a padding below 0 or above half the
            window.

    >>> import torch
    >>> avg_pool2d(2)(torch.arange(16.0).view(1, 1, 4, 4)).flatten()
    tensor([ 2.5000,  4.5000, 10.5000, 12.5000])
    """
    _check_window("avg_pool2d", kernel_size, stride, padding)
    return lambda x: F.avg_pool2d(x, kernel_size, stride, padding)


def flatten(start: int = 1, end: int = -1) -> Callable[[Tensor], Tensor]:
    """Flatten the axes from `start` to `end`, all but the batch by default; `torch.nn.Flatten`.

    >>> import torch
    >>> flatten()(torch.zeros(256, 1, 28, 28)).shape
    torch.Size([256, 784])
    """
    return lambda x: x.flatten(start, end)
