"""Layers without parameters that change shapes: pooling and `flatten`."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fdl._checks import describe
from fdl.nn._helpers import AXES, Size, as_sizes, check_image


def max_pool1d(
    kernel_size: Size, stride: Size | None = None, padding: Size = 0
) -> Callable[[Tensor], Tensor]:
    """Take the maximum of each window; equals `torch.nn.MaxPool1d`.

    Args:
        kernel_size: length of the window, an int or `(length,)`; `stride` and `padding` likewise.
        stride: step between windows; if None, `kernel_size`.
        padding: −∞ around the sequence, at most half the window.

    Raises:
        ValueError: a size is below 1 or has another number of axes, or `padding` is below 0 or more
            than half the window; at call, x has another number of axes, or is smaller than the
            window.

    >>> import torch
    >>> max_pool1d(2)(torch.arange(6.0).view(1, 1, 6))
    tensor([[[1., 3., 5.]]])
    """
    return _pool(1, F.max_pool1d, kernel_size, stride, padding)


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
        ValueError: a size is below 1 or has another number of axes, or `padding` is below 0 or more
            than half the window; at call, x has another number of axes, or is smaller than the
            window.

    >>> import torch
    >>> max_pool2d(2)(torch.arange(16.0).view(1, 1, 4, 4)).flatten()
    tensor([ 5.,  7., 13., 15.])
    """
    return _pool(2, F.max_pool2d, kernel_size, stride, padding)


def avg_pool1d(
    kernel_size: Size, stride: Size | None = None, padding: Size = 0
) -> Callable[[Tensor], Tensor]:
    """Take the mean of each window, padding included; equals `torch.nn.AvgPool1d`.

    Args:
        kernel_size: length of the window, an int or `(length,)`; `stride` and `padding` likewise.
        stride: step between windows; if None, `kernel_size`.
        padding: zeros around the sequence, at most half the window.

    Raises:
        ValueError: a size is below 1 or has another number of axes, or `padding` is below 0 or more
            than half the window; at call, x has another number of axes, or is smaller than the
            window.

    >>> import torch
    >>> avg_pool1d(2)(torch.arange(6.0).view(1, 1, 6))
    tensor([[[0.5000, 2.5000, 4.5000]]])
    """
    return _pool(1, F.avg_pool1d, kernel_size, stride, padding)


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
        ValueError: a size is below 1 or has another number of axes, or `padding` is below 0 or more
            than half the window; at call, x has another number of axes, or is smaller than the
            window.

    >>> import torch
    >>> avg_pool2d(2)(torch.arange(16.0).view(1, 1, 4, 4)).flatten()
    tensor([ 2.5000,  4.5000, 10.5000, 12.5000])
    """
    return _pool(2, F.avg_pool2d, kernel_size, stride, padding)


def adaptive_avg_pool1d(output_size: Size) -> Callable[[Tensor], Tensor]:
    """Take the mean of windows that share x evenly; equals `torch.nn.AdaptiveAvgPool1d`.

    Of n positions along an axis, output i of m has those from ⌊i · n / m⌋ to ⌈(i + 1) · n / m⌉ − 1.

    Args:
        output_size: length of the output, an int or `(length,)`.

    Raises:
        ValueError: a size is below 1 or has another number of axes; at call, x has another number
            of axes, or none of the positions.

    >>> import torch
    >>> adaptive_avg_pool1d(2)(torch.arange(6.0).view(1, 1, 6))
    tensor([[[1., 4.]]])
    """
    return _adaptive_pool(1, F.adaptive_avg_pool1d, output_size)


def adaptive_avg_pool2d(output_size: Size) -> Callable[[Tensor], Tensor]:
    """Take the mean of windows that share x evenly; equals `torch.nn.AdaptiveAvgPool2d`.

    Of n pixels along an axis, output i of m has those from ⌊i · n / m⌋ to ⌈(i + 1) · n / m⌉ − 1.

    Args:
        output_size: height and width of the output, or one int for both.

    Raises:
        ValueError: a size is below 1 or has another number of axes; at call, x has another number
            of axes, or none of the pixels.

    >>> import torch
    >>> adaptive_avg_pool2d((1, 2))(torch.arange(16.0).view(1, 1, 4, 4)).flatten()
    tensor([6.5000, 8.5000])
    """
    return _adaptive_pool(2, F.adaptive_avg_pool2d, output_size)


def adaptive_max_pool2d(output_size: Size) -> Callable[[Tensor], Tensor]:
    """Take the maximum of windows that share x evenly; equals `torch.nn.AdaptiveMaxPool2d`.

    Of n pixels along an axis, output i of m has those from ⌊i · n / m⌋ to ⌈(i + 1) · n / m⌉ − 1.

    Args:
        output_size: height and width of the output, or one int for both.

    Raises:
        ValueError: a size is below 1 or has another number of axes; at call, x has another number
            of axes, or none of the pixels.

    >>> import torch
    >>> adaptive_max_pool2d(1)(torch.arange(16.0).view(1, 1, 4, 4)).flatten()
    tensor([15.])
    """
    return _adaptive_pool(2, F.adaptive_max_pool2d, output_size)


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


def _pool(
    axes: int,
    f: Callable[..., Tensor],
    kernel_size: Size,
    stride: Size | None,
    padding: Size,
) -> Callable[[Tensor], Tensor]:
    name = f.__name__
    window = as_sizes(name, "kernel_size", kernel_size, axes)
    steps = window if stride is None else as_sizes(name, "stride", stride, axes)
    pads = as_sizes(name, "padding", padding, axes, least=0)
    if any(2 * pad > size for pad, size in zip(pads, window, strict=True)):
        raise ValueError(f"{name}: padding {padding} is more than half the window {kernel_size}")

    def pool(x: Tensor) -> Tensor:
        check_image(name, x, axes)
        sizes = zip(x.shape[-axes:], pads, window, strict=True)
        if any(not n or n + 2 * pad < size for n, pad, size in sizes):
            raise ValueError(
                f"{name}: x {list(x.shape)} with padding {padding} is smaller than the window "
                f"{kernel_size}"
            )
        return f(x, window, steps, pads)

    return pool


def _adaptive_pool(
    axes: int, f: Callable[..., Tensor], output_size: Size
) -> Callable[[Tensor], Tensor]:
    name = f.__name__
    size = as_sizes(name, "output_size", output_size, axes)

    def pool(x: Tensor) -> Tensor:
        check_image(name, x, axes)
        if 0 in x.shape[-axes:]:
            raise ValueError(f"{name}: expected x with {AXES[axes]} above 0, got {list(x.shape)}")
        return f(x, size)

    return pool
