"""Activations: torch's own functions, under torch's names."""

from __future__ import annotations

import torch
from torch.nn.functional import gelu, leaky_relu, log_softmax, relu, silu, softmax, softplus

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
