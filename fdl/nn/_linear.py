"""The affine layer `linear`."""

from __future__ import annotations

import torch.nn.functional as F

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
    return affine(name, (outputs, inputs), outputs, F.linear, bias, weight_init, bias_init)
