"""The layer of a transformer's encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fdl import random
from fdl._checks import check_function
from fdl.nn._attention import multihead_attention
from fdl.nn._capture import Record
from fdl.nn._dropout import check_rate
from fdl.nn._dropout import dropout as dropout_layer
from fdl.nn._helpers import check_key_given, check_sequence, check_sizes
from fdl.nn._linear import linear
from fdl.nn._model import Model
from fdl.nn._norm import layer_norm
from fdl.tree import Tree


def transformer_encoder_layer(
    d_model: int,
    nhead: int,
    *,
    dim_feedforward: int = 2048,
    dropout: float = 0.1,
    activation: Callable[[Tensor], Tensor] = F.relu,
    layer_norm_eps: float = 1e-5,
    norm_first: bool = False,
    causal: bool = False,
) -> Model:
    """Apply self-attention and two linear layers; equals `torch.nn.TransformerEncoderLayer`.

    x is `[batch, length, d_model]`, and so is the result. x may also be a pair `(x, mask)`; then so
    is the result, with the same mask, so that layers follow each other in `sequential`. The mask
    is that of `multihead_attention`: True lets a query attend to a key.

    Args:
        d_model: number of features.
        nhead: number of heads; divides `d_model`.
        dim_feedforward: number of features between the two linear layers.
        dropout: fraction dropped, in training, of the attention weights, of the features between
            the linear layers, and of both terms added to x.
        activation: function between the linear layers.
        layer_norm_eps: added to the variances.
        norm_first: if True, normalise before attention and linear layers, else after adding.
        causal: if True, no position attends to later ones.

    Raises:
        TypeError: `activation` is not a function; at apply, as `multihead_attention`.
        ValueError: a size below 1, `nhead` does not divide `d_model`, or a `dropout` outside
            [0, 1); at apply, as `multihead_attention`.

    Source: Vaswani et al., Attention Is All You Need, 2017, https://arxiv.org/abs/1706.03762

    >>> import torch
    >>> from fdl import nn
    >>> layer = transformer_encoder_layer(8, 2, dim_feedforward=16)
    >>> encoder = nn.sequential(layer, layer, lambda pair: pair[0])
    >>> x, mask = torch.ones(2, 5, 8), torch.ones(2, 1, 1, 5, dtype=torch.bool)
    >>> encoder.apply(encoder.init(random.key(0)), (x, mask)).shape
    torch.Size([2, 5, 8])
    """
    name = f"transformer_encoder_layer({d_model}, {nhead})"
    check_sizes(name, d_model, nhead, dim_feedforward)
    check_rate(name, "dropout", dropout)
    check_function(name, "activation", activation)
    drop = dropout_layer(dropout)
    layers = {
        "self_attn": multihead_attention(d_model, nhead, dropout=dropout, causal=causal),
        "linear1": linear(d_model, dim_feedforward),
        "linear2": linear(dim_feedforward, d_model),
        "norm1": layer_norm(d_model, eps=layer_norm_eps),
        "norm2": layer_norm(d_model, eps=layer_norm_eps),
    }

    def init(key: Tensor) -> Tree:
        keys = random.split(key, len(layers))
        return {path: layer.init(keys[i]) for i, (path, layer) in enumerate(layers.items())}

    def apply(
        params: Tree,
        x: Any,
        *,
        train: bool = False,
        key: Tensor | None = None,
        record: Record | None = None,
    ) -> Any:
        x, *mask = x if isinstance(x, tuple | list) else (x,)
        if len(mask) > 1:
            raise TypeError(f"{name}: x must be a tensor or (x, mask), got {1 + len(mask)} parts")
        check_sequence(name, x, d_model)
        drops = train and dropout > 0
        keys = random.split(check_key_given(name, key), 4) if drops else [None] * 4

        def call(path: str, y: Any, i: int = 0) -> Tensor:
            layer = drop if path.startswith("dropout") else layers[path]
            y = layer.apply(params.get(path, {}), y, train=train, key=keys[i])
            if record is not None:
                record(path, y)
            return y

        def attend(y: Tensor) -> Tensor:
            return call("dropout1", call("self_attn", (y, y, y, *mask)), 1)

        def feed_forward(y: Tensor) -> Tensor:
            y = call("dropout", activation(call("linear1", y)), 2)
            return call("dropout2", call("linear2", y), 3)

        if norm_first:
            y = x + attend(call("norm1", x))
            y = y + feed_forward(call("norm2", y))
        else:
            y = call("norm1", x + attend(x))
            y = call("norm2", y + feed_forward(y))
        return (y, *mask) if mask else y

    return Model(init, apply, uses_key=dropout > 0)
