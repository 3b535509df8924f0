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
from fdl.nn._attention import multihead_attention
from fdl.nn._capture import capture
from fdl.nn._cells import gru_cell, lstm_cell, rnn_cell
from fdl.nn._compose import concat, parallel, residual, sequential
from fdl.nn._conv import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d
from fdl.nn._dropout import dropout, dropout2d
from fdl.nn._einops import rearrange, reduce
from fdl.nn._embedding import embedding
from fdl.nn._linear import linear
from fdl.nn._model import Layer, Model, StatefulModel
from fdl.nn._norm import batch_norm, group_norm, instance_norm, layer_norm, rms_norm
from fdl.nn._policy import Policy, with_policy
from fdl.nn._pooling import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_max_pool2d,
    avg_pool1d,
    avg_pool2d,
    flatten,
    max_pool1d,
    max_pool2d,
)
from fdl.nn._recurrent import gru, lstm, rnn
from fdl.nn._tied import tied
from fdl.nn._transformer import transformer_encoder_layer

__all__ = [
    "Layer",
    "Model",
    "Policy",
    "StatefulModel",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "avg_pool1d",
    "avg_pool2d",
    "batch_norm",
    "capture",
    "concat",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "dropout",
    "dropout2d",
    "embedding",
    "flatten",
    "gelu",
    "group_norm",
    "gru",
    "gru_cell",
    "init",
    "instance_norm",
    "layer_norm",
    "leaky_relu",
    "linear",
    "log_softmax",
    "lstm",
    "lstm_cell",
    "max_pool1d",
    "max_pool2d",
    "multihead_attention",
    "parallel",
    "rearrange",
    "reduce",
    "relu",
    "residual",
    "rms_norm",
    "rnn",
    "rnn_cell",
    "sequential",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "tanh",
    "tied",
    "transformer_encoder_layer",
    "with_policy",
]
