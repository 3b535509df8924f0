"""Affine layers: `linear` and `conv2d`."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from fdl.nn._helpers import Size, affine, as_pair, check_sizes
from fdl.nn._model import Model
from fdl.nn.init import Initializer, kaiming_uniform, uniform


def linear(
    inputs: int,
    outputs: int,
    *,
    bias: bool = True,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
) -> Model:
    """Compute y = x Wᵀ + b, from `[..., inputs]` to `[..., outputs]`; equals `torch.nn.Linear`.

    Args:
        inputs: number of input features.
        outputs: number of output features.
        bias: if False, there is no b.
        weight_init: initializer of W `[outputs, inputs]`; if None, U(±1/√inputs) as in
            `torch.nn.Linear`.
        bias_init: initializer of b `[outputs]`; if None, U(±1/√inputs).

    Raises:
        ValueError: a size below 1; at apply, a parameter of another shape.

    >>> import torch
    >>> from fdl import random
    >>> from fdl.nn.init import zeros
    >>> layer = linear(784, 10, bias_init=zeros)
    >>> layer.apply(layer.init(random.key(0)), torch.ones(256, 784)).shape
    torch.Size([256, 10])
    """
    name = f"linear({inputs}, {outputs})"
    check_sizes(name, inputs, outputs)
    bound = 1 / math.sqrt(inputs)
    return affine(
        name,
        (outputs, inputs),
        weight_init or kaiming_uniform(a=math.sqrt(5)),
        (bias_init or uniform(-bound, bound)) if bias else None,
        F.linear,
    )


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
        ValueError: a size is below 1 or not one or two ints, `groups` does not divide both channel
            counts, `padding` is negative or unknown, or is `"same"` with a stride; at apply, a
            parameter of another shape.

    >>> import torch
    >>> from fdl import random
    >>> layer = conv2d(1, 1, 3, padding=1, stride=2)
    >>> layer.apply(layer.init(random.key(0)), torch.ones(1, 1, 8, 8)).shape
    torch.Size([1, 1, 4, 4])
    """
    name = f"conv2d({inputs}, {outputs}, {kernel_size})"
    height, width = as_pair(name, "kernel_size", kernel_size)
    steps = as_pair(name, "stride", stride)
    as_pair(name, "dilation", dilation)
    check_sizes(name, inputs, outputs, groups)
    if inputs % groups or outputs % groups:
        raise ValueError(
            f"{name}: groups={groups} must divide inputs={inputs} and outputs={outputs}"
        )
    if not isinstance(padding, str):
        as_pair(name, "padding", padding, least=0)
    elif padding not in ("same", "valid"):
        raise ValueError(f"{name}: padding must be 'same', 'valid' or numbers, got {padding!r}")
    elif padding == "same" and steps != (1, 1):
        raise ValueError(f"{name}: padding='same' needs stride=1, got {stride}")
    bound = 1 / math.sqrt(inputs // groups * height * width)

    def convolve(x: Tensor, weight: Tensor, b: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, b, stride, padding, dilation, groups)

    return affine(
        name,
        (outputs, inputs // groups, height, width),
        weight_init or kaiming_uniform(a=math.sqrt(5)),
        (bias_init or uniform(-bound, bound)) if bias else None,
        convolve,
    )
