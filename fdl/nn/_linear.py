"""The affine layer `linear`."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from fdl.nn._helpers import affine, check_sizes
from fdl.nn._model import Model
from fdl.nn.init import Initializer


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
        TypeError: at apply, x is not floating or has another dtype than the parameters.
        ValueError: a size below 1; at apply, x has another number of features, or a parameter has
            another shape.

    >>> import torch
    >>> from fdl import random
    >>> from fdl.nn.init import zeros
    >>> layer = linear(784, 10, bias_init=zeros)
    >>> layer.apply(layer.init(random.key(0)), torch.ones(256, 784)).shape
    torch.Size([256, 10])
    """
    name = f"linear({inputs}, {outputs})"
    check_sizes(name, inputs, outputs)

    def product(x: Tensor, weight: Tensor, shift: Tensor | None) -> Tensor:
        if x.shape[-1:] != (inputs,):
            raise ValueError(
                f"{name}: expected x [..., {inputs}], got {list(x.shape)}{_what_fits(x, inputs)}"
            )
        return F.linear(x, weight, shift)

    return affine(name, (outputs, inputs), outputs, product, bias, weight_init, bias_init)


def _what_fits(x: Tensor, inputs: int) -> str:
    """Return the end of an error message: what to do about an x of another size."""
    if x.ndim > 2 and math.prod(x.shape[1:]) == inputs:
        return "; put nn.flatten() before the layer"
    return f"; the layer for this x has {x.shape[-1]} inputs" if x.ndim else ""
