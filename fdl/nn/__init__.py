"""Layers, initializers and how to compose them. Layers and whole models are the same type."""

from fdl.nn import init
from fdl.nn.layers import (
    avg_pool2d,
    conv2d,
    dropout,
    flatten,
    gelu,
    layer_norm,
    leaky_relu,
    linear,
    log_softmax,
    max_pool2d,
    relu,
    sigmoid,
    silu,
    softmax,
    softplus,
    tanh,
)
from fdl.nn.model import Layer, Model, StatefulModel, sequential, tied
from fdl.nn.norm import batch_norm

__all__ = [
    "Layer",
    "Model",
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
]
