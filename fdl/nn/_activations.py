"""Activations: torch's functions, under torch's names."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import leaky_relu, log_softmax, relu, silu, softmax, softplus

__all__ = [
    "gelu",
    "leaky_relu",
    "log_softmax",
    "relu",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "tanh",
]

sigmoid, tanh = torch.sigmoid, torch.tanh


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """Apply x · Φ(x), Φ the distribution function of the normal; as `torch.nn.functional.gelu`.

    Its last digits depend on where a number stands. On a CPU torch computes a contiguous float32
    tensor of two elements or more by oneDNN, other tensors and single numbers by a kernel of its
    own, and compiled programs by a third. They differ by at most 1e-6; left of −4, where the value
    itself is small, in the second digit. So a model with gelu gives a row alone, in a batch, under
    `vmap` and compiled the same values to rounding, but not the same bits.

    Args:
        x: floating, of any shape.
        approximate: "none", or "tanh" for the approximation that Flax and GPT-2 use.

    Returns:
        dtype and shape of `x`.

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units, 2016,
    https://arxiv.org/abs/1606.08415

    >>> gelu(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.1587,  0.0000,  0.8413])
    """
    return functional.gelu(x, approximate=approximate)
