"""Attention in plain maths, so that it has derivatives of every order: `multihead_attention`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fdl import random
from fdl._checks import describe
from fdl._numerics import at_least_32_bits
from fdl.nn._dropout import check_rate
from fdl.nn._dropout import dropout as dropout_layer
from fdl.nn._helpers import check_dtype, check_key_given, check_sequence, check_sizes, get_param
from fdl.nn._linear import linear
from fdl.nn._model import Model
from fdl.nn.init import xavier_uniform, zeros
from fdl.tree import Tree


def multihead_attention(
    embed_dim: int,
    num_heads: int,
    *,
    dropout: float = 0.0,
    bias: bool = True,
    causal: bool = False,
) -> Model:
    """Let queries attend to keys and values; equals `torch.nn.MultiheadAttention`, batch first.

    x is `[batch, length, embed_dim]`, which attends to itself, or a tuple `(query, keys, values)`
    or `(query, keys, values, mask)`. The result is `[batch, queries, embed_dim]`. Axes before the
    last two may be of any number, also none.

    The mask broadcasts against `[batch, heads, queries, keys]`. If it is bool, True lets a query
    attend to a key, as in `F.scaled_dot_product_attention` and in all masks of fdl, and *unlike* in
    `torch.nn.MultiheadAttention`: pass `~attn_mask` or `~key_padding_mask[:, None, None, :]`. If it
    is floating, it is added to the scores, and −∞ masks. A query that may attend to nothing gets
    the output 0 before the last product, never NaN.

    Args:
        embed_dim: number of features of query, keys, values and output.
        num_heads: number of heads; divides `embed_dim`.
        dropout: fraction of the attention weights that is dropped, in training.
        bias: if False, there are no biases.
        causal: if True, query i attends to the keys 0 to i only, besides what the mask says.

    Raises:
        TypeError: at apply, an input is not floating or has another dtype than the parameters, or
            the mask is neither bool nor floating.
        ValueError: a size below 1, `num_heads` does not divide `embed_dim`, or a `dropout` outside
            [0, 1); at apply, inputs, mask or a parameter of another shape, or dropout in training
            without a key.

    Source: Vaswani et al., Attention Is All You Need, 2017, https://arxiv.org/abs/1706.03762

    >>> layer = multihead_attention(8, 2, causal=True)
    >>> params = layer.init(random.key(0))
    >>> layer.apply(params, torch.ones(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    >>> query, memory, padded = torch.ones(2, 3, 8), torch.ones(2, 5, 8), torch.arange(5) < 4
    >>> multihead_attention(8, 2).apply(params, (query, memory, memory, padded)).shape
    torch.Size([2, 3, 8])
    """
    name = f"multihead_attention({embed_dim}, {num_heads})"
    check_sizes(name, embed_dim, num_heads)
    if embed_dim % num_heads:
        raise ValueError(f"{name}: num_heads must divide embed_dim")
    check_rate(name, "dropout", dropout)
    shapes: dict[str, tuple[int, ...]] = {"in_proj_weight": (3 * embed_dim, embed_dim)}
    shapes |= {"in_proj_bias": (3 * embed_dim,)} if bias else {}
    out_proj = linear(embed_dim, embed_dim, bias=bias, bias_init=zeros)

    def init(key: Tensor) -> Tree:
        in_key, out_key = random.split(key)
        params = {
            "in_proj_weight": xavier_uniform()(in_key, shapes["in_proj_weight"], torch.float32)
        }
        params |= {"in_proj_bias": zeros(key, shapes["in_proj_bias"])} if bias else {}
        return {**params, "out_proj": out_proj.init(out_key)}

    def apply(params: Tree, x: Any, *, train: bool = False, key: Tensor | None = None) -> Tensor:
        query, keys, values, mask = _inputs(name, x, embed_dim)
        weight, *shift = (get_param(params, path, shape, name) for path, shape in shapes.items())
        check_dtype(name, query, weight)
        q, k, v = (
            part.reshape(*part.shape[:-1], num_heads, embed_dim // num_heads).transpose(
                -3, -2
            )  # [..., heads, length, features]
            for part in _projected(query, keys, values, weight, shift[0] if bias else None)
        )
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(embed_dim // num_heads)
        weights = _softmax(name, scores, mask, causal)
        if train and dropout:
            drop_key = check_key_given(name, key)
            weights = dropout_layer(dropout).apply({}, weights, train=True, key=drop_key)
        return out_proj.apply(params["out_proj"], (weights @ v).transpose(-3, -2).flatten(-2))

    return Model(init, apply, uses_key=dropout > 0)


def _inputs(name: str, x: Any, features: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return query, keys, values and mask, checked but for the shape of the mask."""
    parts = (x, x, x) if isinstance(x, Tensor) else x
    if not isinstance(parts, tuple | list) or len(parts) not in (3, 4):
        raise TypeError(
            f"{name}: x must be a tensor, (query, keys, values) or (query, keys, values, mask), "
            f"got {describe(x)}"
        )
    query, keys, values, mask = (*parts, None)[:4]
    for argument, part in (("query", query), ("keys", keys), ("values", values)):
        check_sequence(name, part, features, argument)
        if part.dtype != query.dtype:
            raise TypeError(
                f"{name}: {argument} must have the dtype of query, got {describe(part)}, and query "
                f"{describe(query)}"
            )
    if keys.shape[:-1] != values.shape[:-1] or keys.shape[:-2] != query.shape[:-2]:
        raise ValueError(
            f"{name}: query, keys and values must have one batch, and keys and values one length, "
            f"got {list(query.shape)}, {list(keys.shape)} and {list(values.shape)}"
        )
    return query, keys, values, mask


def _projected(
    query: Tensor, keys: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """Multiply query, keys and values by their thirds of the weight; at once if they are one."""
    if query is keys and keys is values:
        return F.linear(query, weight, bias).chunk(3, -1)
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    parts = zip((query, keys, values), weight.chunk(3), biases, strict=True)
    return tuple(F.linear(x, w, b) for x, w, b in parts)


def _softmax(name: str, scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Return the weights of the keys, in the dtype of the scores; 0 where a mask forbids a key."""
    wide = scores.to(at_least_32_bits(scores))
    allowed = None
    if mask is not None:
        _check_mask(name, mask, scores.shape)
        allowed = mask if mask.dtype is torch.bool else mask > -math.inf
        if mask.is_floating_point():
            wide = wide + mask
    if causal:
        before = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        allowed = before if allowed is None else before & allowed
    if allowed is None:
        return torch.softmax(wide, -1).to(scores.dtype)
    # A finite number, since all −∞ would give NaN and NaN gradients; such rows become 0 below.
    wide = torch.where(allowed, wide, torch.finfo(wide.dtype).min)
    return torch.where(allowed, torch.softmax(wide, -1), 0).to(scores.dtype)


def _check_mask(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(mask, Tensor) or not (mask.dtype is torch.bool or mask.is_floating_point()):
        raise TypeError(f"{name}: mask must be a bool or floating tensor, got {describe(mask)}")
    pairs = zip(reversed(mask.shape), reversed(shape), strict=False)
    if mask.ndim > len(shape) or any(n not in (1, size) for n, size in pairs):
        raise ValueError(
            f"{name}: mask must broadcast against [batch, heads, queries, keys] {list(shape)}, got "
            f"{list(mask.shape)}"
        )
