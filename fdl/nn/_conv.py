"""Convolutions over one, two and three axes, and their transposes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from fdl.nn._helpers import Size, affine, as_sizes, check_image, check_sizes
from fdl.nn._model import Model
from fdl.nn.init import Initializer


def conv1d(
    inputs: int,
    outputs: int,
    kernel_size: Size,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    bias: bool = True,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
) -> Model:
    """Cross-correlate `[batch, inputs, length]` with learned kernels; equals `torch.nn.Conv1d`.

    Args:
        inputs: number of input channels.
        outputs: number of output channels.
        kernel_size: length of the kernel, an int or `(length,)`; `stride`, `padding` and
            `dilation` likewise.
        stride: step between output positions.
        padding: zeros around the sequence, or `"same"` or `"valid"`.
        dilation: distance between kernel elements.
        groups: number of channel groups convolved separately; divides `inputs` and `outputs`.
        bias: if False, there is no bias.
        weight_init: initializer of the weight `[outputs, inputs / groups, *kernel_size]`; if None,
            U(±1/√fan_in).
        bias_init: initializer of the bias `[outputs]`; if None, U(±1/√fan_in).

    Raises:
        TypeError: at apply, x is not floating or has another dtype than the parameters.
        ValueError: a size is below 1 or has another number of axes, `groups` does not divide both
            channel counts, `padding` is negative or unknown, or is `"same"` with a stride; at
            apply, x has another shape or is smaller than the kernel, or a parameter has another
            shape.

    >>> import torch
    >>> from fdl import random
    >>> layer = conv1d(2, 4, 3, padding="same")
    >>> layer.apply(layer.init(random.key(0)), torch.ones(1, 2, 10)).shape
    torch.Size([1, 4, 10])
    """
    window = _window(1, "conv1d", inputs, outputs, kernel_size, stride, dilation, groups)
    return _conv(window, F.conv1d, padding, bias, weight_init, bias_init)


def conv2d(
    inputs: int,
    outputs: int,
    kernel_size: Size,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    bias: bool = True,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
) -> Model:
    """Cross-correlate `[batch, inputs, h, w]` with learned kernels; equals `torch.nn.Conv2d`.

    Args:
        inputs: number of input channels.
        outputs: number of output channels.
        kernel_size: height and width of the kernel, or one int for both; `stride`, `padding`
            and `dilation` likewise.
        stride: step between output pixels.
        padding: zeros around the image, or `"same"` or `"valid"`.
        dilation: distance between kernel elements.
        groups: number of channel groups convolved separately; divides `inputs` and `outputs`. As
            in torch, an initializer that uses the fan-out (Xavier's, `mode="fan_out"`) counts the
            outputs of all groups, though an input reaches only `outputs / groups` of them.
        bias: if False, there is no bias.
        weight_init: initializer of the weight `[outputs, inputs / groups, *kernel_size]`; if None,
            U(±1/√fan_in).
        bias_init: initializer of the bias `[outputs]`; if None, U(±1/√fan_in).

    Raises:
        TypeError: at apply, x is not floating or has another dtype than the parameters.
        ValueError: a size is below 1 or has another number of axes, `groups` does not divide both
            channel counts, `padding` is negative or unknown, or is `"same"` with a stride; at
            apply, x has another shape or is smaller than the kernel, or a parameter has another
            shape.

    >>> import torch
    >>> from fdl import random
    >>> layer = conv2d(1, 1, 3, padding=1, stride=2)
    >>> layer.apply(layer.init(random.key(0)), torch.ones(1, 1, 8, 8)).shape
    torch.Size([1, 1, 4, 4])
    """
    window = _window(2, "conv2d", inputs, outputs, kernel_size, stride, dilation, groups)
    return _conv(window, F.conv2d, padding, bias, weight_init, bias_init)


def conv3d(
    inputs: int,
    outputs: int,
    kernel_size: Size,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    bias: bool = True,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
) -> Model:
    """Cross-correlate `[batch, inputs, d, h, w]` with learned kernels; equals `torch.nn.Conv3d`.

    Args:
        inputs: number of input channels.
        outputs: number of output channels.
        kernel_size: depth, height and width of the kernel, or one int for all; `stride`,
            `padding` and `dilation` likewise.
        stride: step between output voxels.
        padding: zeros around the volume, or `"same"` or `"valid"`.
        dilation: distance between kernel elements.
        groups: number of channel groups convolved separately; divides `inputs` and `outputs`.
        bias: if False, there is no bias.
        weight_init: initializer of the weight `[outputs, inputs / groups, *kernel_size]`; if None,
            U(±1/√fan_in).
        bias_init: initializer of the bias `[outputs]`; if None, U(±1/√fan_in).

    Raises:
        TypeError: at apply, x is not floating or has another dtype than the parameters.
        ValueError: a size is below 1 or has another number of axes, `groups` does not divide both
            channel counts, `padding` is negative or unknown, or is `"same"` with a stride; at
            apply, x has another shape or is smaller than the kernel, or a parameter has another
            shape.

    >>> import torch
    >>> from fdl import random
    >>> layer = conv3d(1, 2, 3, stride=(1, 2, 2))
    >>> layer.apply(layer.init(random.key(0)), torch.ones(1, 1, 5, 9, 9)).shape
    torch.Size([1, 2, 3, 4, 4])
    """
    window = _window(3, "conv3d", inputs, outputs, kernel_size, stride, dilation, groups)
    return _conv(window, F.conv3d, padding, bias, weight_init, bias_init)


def conv_transpose1d(
    inputs: int,
    outputs: int,
    kernel_size: Size,
    *,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    bias: bool = True,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
) -> Model:
    """Transpose a convolution, on `[batch, inputs, length]`; equals `torch.nn.ConvTranspose1d`.

    Along each axis the output has (size − 1) · stride − 2 · padding + dilation · (kernel_size − 1)
    + output_padding + 1 positions.

    Args:
        inputs: number of input channels.
        outputs: number of output channels.
        kernel_size: length of the kernel, an int or `(length,)`; `stride`, `padding`,
            `output_padding` and `dilation` likewise.
        stride: step between the output positions of neighbouring input positions.
        padding: number of positions cut off at each end of the output.
        output_padding: number of positions added to the output at one end, less than `stride` or
            `dilation`.
        dilation: distance between kernel elements.
        groups: number of channel groups convolved separately; divides `inputs` and `outputs`.
        bias: if False, there is no bias.
        weight_init: initializer of the weight `[inputs, outputs / groups, *kernel_size]`; if None,
            U(±1/√fan_in), where as in torch fan_in = outputs / groups · prod(kernel_size).
        bias_init: initializer of the bias `[outputs]`; if None, U(±1/√fan_in).

    Raises:
        TypeError: at apply, x is not floating or has another dtype than the parameters.
        ValueError: a size is below its least or has another number of axes, `groups` does not
            divide both channel counts, or `output_padding` is too large; at apply, x or a parameter
            has another shape, or the output would be empty.

    >>> import torch
    >>> from fdl import random
    >>> layer = conv_transpose1d(2, 4, 4, stride=2, padding=1)
    >>> layer.apply(layer.init(random.key(0)), torch.ones(1, 2, 10)).shape
    torch.Size([1, 4, 20])
    """
    window = _window(1, "conv_transpose1d", inputs, outputs, kernel_size, stride, dilation, groups)
    f = F.conv_transpose1d
    return _conv_transpose(window, f, padding, output_padding, bias, weight_init, bias_init)


def conv_transpose2d(
    inputs: int,
    outputs: int,
    kernel_size: Size,
    *,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    bias: bool = True,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
) -> Model:
    """Transpose a convolution, on `[batch, inputs, h, w]`; equals `torch.nn.ConvTranspose2d`.

    Along each axis the output has (size − 1) · stride − 2 · padding + dilation · (kernel_size − 1)
    + output_padding + 1 pixels.

    Args:
        inputs: number of input channels.
        outputs: number of output channels.
        kernel_size: height and width of the kernel, or one int for both; `stride`, `padding`,
            `output_padding` and `dilation` likewise.
        stride: step between the output pixels of neighbouring input pixels.
        padding: number of pixels cut off at each end of the output.
        output_padding: number of pixels added to the output at one end, less than `stride` or
            `dilation`.
        dilation: distance between kernel elements.
        groups: number of channel groups convolved separately; divides `inputs` and `outputs`.
        bias: if False, there is no bias.
        weight_init: initializer of the weight `[inputs, outputs / groups, *kernel_size]`; if None,
            U(±1/√fan_in), where as in torch fan_in = outputs / groups · prod(kernel_size).
        bias_init: initializer of the bias `[outputs]`; if None, U(±1/√fan_in).

    Raises:
        TypeError: at apply, x is not floating or has another dtype than the parameters.
        ValueError: a size is below its least or has another number of axes, `groups` does not
            divide both channel counts, or `output_padding` is too large; at apply, x or a parameter
            has another shape, or the output would be empty.

    >>> import torch
    >>> from fdl import random
    >>> layer = conv_transpose2d(4, 1, 3, stride=2, padding=1, output_padding=1)
    >>> layer.apply(layer.init(random.key(0)), torch.ones(1, 4, 7, 7)).shape
    torch.Size([1, 1, 14, 14])
    """
    window = _window(2, "conv_transpose2d", inputs, outputs, kernel_size, stride, dilation, groups)
    f = F.conv_transpose2d
    return _conv_transpose(window, f, padding, output_padding, bias, weight_init, bias_init)


class _Window(NamedTuple):
    """The checked arguments that a convolution and its transpose share."""

    axes: int
    layer: str  # the layer's name, used in error messages
    inputs: int
    outputs: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def spans(self) -> list[int]:
        """Return the number of points that a kernel covers along each axis."""
        return [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]


def _window(
    axes: int,
    function: str,
    inputs: int,
    outputs: int,
    kernel_size: Size,
    stride: Size,
    dilation: Size,
    groups: int,
) -> _Window:
    layer = f"{function}({inputs}, {outputs}, {kernel_size})"
    kernel = as_sizes(layer, "kernel_size", kernel_size, axes)
    steps = as_sizes(layer, "stride", stride, axes)
    spacing = as_sizes(layer, "dilation", dilation, axes)
    check_sizes(layer, inputs, outputs, groups)
    if inputs % groups or outputs % groups:
        raise ValueError(
            f"{layer}: groups={groups} must divide inputs={inputs} and outputs={outputs}"
        )
    return _Window(axes, layer, inputs, outputs, kernel, steps, spacing, groups)


def _conv(
    window: _Window,
    f: Callable[..., Tensor],
    padding: Size | str,
    bias: bool,
    weight_init: Initializer | None,
    bias_init: Initializer | None,
) -> Model:
    axes, layer, inputs, outputs, kernel, stride, dilation, groups = window
    pads: str | tuple[int, ...]
    if not isinstance(padding, str):
        pads = as_sizes(layer, "padding", padding, axes, least=0)
    elif padding in ("same", "valid"):
        pads = padding
    else:
        raise ValueError(f"{layer}: padding must be 'same', 'valid' or numbers, got {padding!r}")
    if pads == "same" and max(stride) > 1:
        raise ValueError(f"{layer}: padding='same' needs stride=1, got {stride}")

    def convolve(x: Tensor, weight: Tensor, b: Tensor | None) -> Tensor:
        check_image(layer, x, axes, inputs)
        _check_fits(window, x, pads)
        return f(x, weight, b, stride, pads, dilation, groups)

    shape = (outputs, inputs // groups, *kernel)
    return affine(layer, shape, outputs, convolve, bias, weight_init, bias_init)


def _check_fits(window: _Window, x: Tensor, padding: str | tuple[int, ...]) -> None:
    """Raise a ValueError if x is empty or, padded, smaller than the kernel."""
    spans = window.spans()
    pads: Sequence[int] = (0,) * window.axes
    if not isinstance(padding, str):
        pads = padding
    elif padding == "same":
        pads = spans
    sizes = zip(x.shape[-window.axes :], pads, spans, strict=True)
    if any(not n or n + 2 * pad < span for n, pad, span in sizes):
        raise ValueError(
            f"{window.layer}: x {list(x.shape)} with padding {padding} is smaller than the kernel, "
            f"which covers {spans}"
        )


def _conv_transpose(
    window: _Window,
    f: Callable[..., Tensor],
    padding: Size,
    output_padding: Size,
    bias: bool,
    weight_init: Initializer | None,
    bias_init: Initializer | None,
) -> Model:
    axes, layer, inputs, outputs, kernel, stride, dilation, groups = window
    pads = as_sizes(layer, "padding", padding, axes, least=0)
    extra = as_sizes(layer, "output_padding", output_padding, axes, least=0)
    if any(e >= max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
        raise ValueError(
            f"{layer}: output_padding must be less than stride or dilation, got {output_padding} "
            f"with stride {stride} and dilation {dilation}"
        )

    def convolve(x: Tensor, weight: Tensor, b: Tensor | None) -> Tensor:
        check_image(layer, x, axes, inputs)
        sizes = zip(x.shape[-axes:], stride, pads, window.spans(), extra, strict=True)
        found = [(n - 1) * s - 2 * p + span + e for n, s, p, span, e in sizes]
        if min(found) < 1 or 0 in x.shape[-axes:]:
            raise ValueError(f"{layer}: x {list(x.shape)} gives an output of sizes {found}")
        return f(x, weight, b, stride, pads, extra, groups, dilation)

    shape = (inputs, outputs // groups, *kernel)
    return affine(layer, shape, outputs, convolve, bias, weight_init, bias_init)
