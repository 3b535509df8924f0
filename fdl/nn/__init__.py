"""Layers, initializers and ways to compose them. A layer and a whole model have one type."""

from __future__ import annotations

from fdl.nn import init
from fdl.nn._activations import (
    gelu,
    leaky_relu,
    log_softmax,
    relu,
    sigmoid,
    silu,
    softmax,
    softplus,
    tanh,
)
from fdl.nn._compose import sequential, tied
from fdl.nn._dropout import dropout
from fdl.nn._linear import conv2d, linear
from fdl.nn._model import Layer, Model, StatefulModel
from fdl.nn._norm import batch_norm, layer_norm
from fdl.nn._policy import Policy, with_policy
from fdl.nn._pooling import avg_pool2d, flatten, max_pool2d

__all__ = [
    "Layer",
    "Model",
    "Policy",
    "StatefulModel",
    "avg_pool2d",
    "batch_norm",
    "conv2d",
    "dropout",
    "flatten",
    "gelu",
    "init",
    "layer_norm",
    "leaky_relu",
    "linear",
    "log_softmax",
    "max_pool2d",
    "relu",
    "sequential",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "tanh",
    "tied",
    "with_policy",
]
