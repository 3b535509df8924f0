"""Rules for the layers of torch that draw random numbers: dropout, attention, recurrent layers."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor

from fdl import _modes, random
from fdl._differentiable import _functions
from fdl._numerics import at_least_32_bits
from fdl.interop._keys import Keys

# ------------------------------------------------------------------------------------- dropout


def _kept(mode: Keys, name: str, rate: float, shape: Any) -> Tensor:
    """Draw the mask of kept units, as `nn.dropout` does."""
    return random.uniform(mode.next(name), shape) >= rate


def _written(x: Tensor, y: Tensor, inplace: bool) -> Tensor:
    return x.copy_(y) if inplace else y


def _check_rate(name: str, p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"{name}: p must lie in [0, 1], got {p}")


def _dropped(
    mode: Keys, name: str, x: Tensor, rate: float, train: bool, inplace: bool, shape: Any
) -> Tensor:
    _check_rate(name, rate)
    if not train or rate == 0:
        return x
    if rate == 1:
        return _written(x, torch.zeros_like(x), inplace)
    kept = _kept(mode, name, rate, shape)
    return _written(x, torch.where(kept, x / (1 - rate), 0), inplace)


def _dropout(
    mode: Keys, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    return _dropped(mode, "dropout", input, p, training, inplace, input.shape)


def _per_channel(x: Tensor, batched: bool) -> list[int]:
    """Return the shape of a mask that drops whole channels."""
    lead = 2 if batched else 1
    return [*x.shape[:lead], *[1] * (x.ndim - lead)]


def _dropout_of_channels(unbatched: int) -> Callable[..., Tensor]:
    """Make the rule for whole channels; `unbatched` is the number of axes of a single example."""

    def rule(
        mode: Keys, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        shape = _per_channel(input, input.ndim != unbatched)
        return _dropped(mode, "dropout of channels", input, p, training, inplace, shape)

    return rule


def _alpha_dropped(mode: Keys, x: Tensor, p: float, train: bool, inplace: bool, shape: Any) -> Any:
    """Set dropped units to α′, and restore mean 0 and variance 1 (Klambauer et al., 2017)."""
    _check_rate("alpha_dropout", p)
    if not train or p == 0:
        return x
    if p == 1:
        return _written(x, torch.zeros_like(x), inplace)
    alpha = -1.7580993408473766
    scale = 1 / math.sqrt((alpha * alpha * p + 1) * (1 - p))
    kept = _kept(mode, "alpha_dropout", p, shape)
    return _written(x, torch.where(kept, x, alpha) * scale - alpha * p * scale, inplace)


def _alpha_dropout(
    mode: Keys, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    return _alpha_dropped(mode, input, p, training, inplace, input.shape)


def _feature_alpha_dropout(
    mode: Keys, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    return _alpha_dropped(mode, input, p, training, inplace, _per_channel(input, True))


def _torchs(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make the rule of `torch.dropout`, whose argument is `train` instead of `training`."""
    return lambda mode, input, p, train: rule(mode, input, p, train)


def _rrelu(
    mode: Keys,
    input: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    if training:
        wide = at_least_32_bits(input)
        slope = random.uniform(
            mode.next("rrelu"), input.shape, wide, minval=lower, maxval=upper
        ).to(input.dtype)
        return _written(input, torch.where(input >= 0, input, input * slope), inplace)
    return F.leaky_relu(input, (lower + upper) / 2, inplace)


# ----------------------------------------------------------------------------------- attention


def _attention(
    mode: Keys,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    _check_rate("scaled_dot_product_attention", dropout_p)
    if dropout_p == 0 and not _modes.avoid_fused_kernels():
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    def drop(weights: Tensor) -> Tensor:
        return _dropout(mode, weights, dropout_p)

    return _functions.attention(query, key, value, attn_mask, is_causal, scale, enable_gqa, drop)


def _traced_through(f: Any) -> Callable[..., Any]:
    """Copy a Python function of torch, so that its body runs instead of calling the mode again.

    The functions it calls go through the mode: its dropout draws from the key.
    """
    never = {name: lambda *_: False for name in f.__globals__ if "has_torch_function" in name}
    body = types.FunctionType(f.__code__, f.__globals__ | never, f.__name__, f.__defaults__)
    body.__kwdefaults__ = f.__kwdefaults__

    def rule(mode: Keys, *args: Any, **kwargs: Any) -> Any:
        with mode:
            return body(*args, **kwargs)

    return rule


# ----------------------------------------------------------------------------------- recurrent


_SHARED = ("has_biases", "num_layers", "dropout", "train", "bidirectional")
_PADDED = ("input", "hx", "params", *_SHARED, "batch_first")
_PACKED = ("data", "batch_sizes", "hx", "params", *_SHARED)


def _recurrent(func: Any) -> Callable[..., Any]:
    """Make the rule of a stack of recurrent layers."""

    def rule(mode: Keys, *args: Any, **kwargs: Any) -> Any:
        # The fourth argument is the parameters of a packed sequence, or has_biases.
        packed = "data" in kwargs or (len(args) > 3 and not isinstance(args[3], bool))
        names = _PACKED if packed else _PADDED
        arguments = dict(zip(names, args, strict=False)) | kwargs
        values = [arguments[name] for name in names]
        if arguments["dropout"] == 0 or not arguments["train"]:
            return _decomposed(func, *values)
        if packed:
            raise NotImplementedError(
                f"{func.__name__}: dropout between layers of a packed sequence cannot draw from a "
                "key; pad the sequences, or set dropout=0"
            )
        return _one_by_one(mode, func, *values)

    return rule


def _one_by_one(
    mode: Keys,
    func: Any,
    x: Tensor,
    hidden: Any,
    weights: Any,
    bias: bool,
    layers: int,
    rate: float,
    train: bool,
    two_way: bool,
    batch_first: bool,
) -> Any:
    """Run a stack of recurrent layers one by one, with dropout between them."""
    directions, width = 2 if two_way else 1, len(weights) // layers
    last = []
    for i in range(layers):
        rows = slice(i * directions, (i + 1) * directions)
        start = hidden[rows] if isinstance(hidden, Tensor) else [h[rows] for h in hidden]
        own = weights[i * width : (i + 1) * width]
        x, *end = _decomposed(func, x, start, own, bias, 1, 0.0, train, two_way, batch_first)
        last.append(end)
        if i < layers - 1:
            x = _dropout(mode, x, rate)
    return x, *(torch.cat(ends) for ends in zip(*last, strict=True))


def _decomposed(func: Any, x: Tensor, hidden: Any, *args: Any) -> Any:
    """Call a recurrent function, decomposed into its operations if its kernels lack derivatives.

    Torch decomposes it under `vjp`, except into the kernels of oneDNN and cuDNN, which have no
    second derivatives.
    """
    if not _modes.avoid_fused_kernels():
        return func(x, hidden, *args)
    none = x.new_zeros(())  # gives the hidden state the axes of `vmap` that x has
    hidden = pytree.tree_map(lambda h: h + none if h.is_floating_point() else h, hidden)
    with _without_kernels():
        return torch.func.vjp(lambda x: func(x, hidden, *args), x)[0]


@contextmanager
def _without_kernels() -> Iterator[None]:
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def _cell(func: Any) -> Callable[..., Any]:
    def rule(mode: Keys, input: Tensor, hx: Any, *args: Any, **kwargs: Any) -> Any:
        return _decomposed(lambda x, h: func(x, h, *args, **kwargs), input, hx)

    return rule


RULES: dict[str, Callable[..., Any]] = {
    "F.dropout": _dropout,
    "F.dropout1d": _dropout_of_channels(2),
    "F.dropout2d": _dropout_of_channels(0),
    "F.dropout3d": _dropout_of_channels(4),
    "F.alpha_dropout": _alpha_dropout,
    "F.feature_alpha_dropout": _feature_alpha_dropout,
    "F.rrelu": _rrelu,
    "torch.dropout": _torchs(_dropout),
    "torch.alpha_dropout": _torchs(_alpha_dropout),
    "torch.feature_alpha_dropout": _torchs(_feature_alpha_dropout),
    "torch.rrelu": _rrelu,
    "F.gumbel_softmax": _traced_through(F.gumbel_softmax),
    "F.multi_head_attention_forward": _traced_through(F.multi_head_attention_forward),
    "F.scaled_dot_product_attention": _attention,
    **{
        f"torch.{name}": _recurrent(getattr(torch, name))
        for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    },
    **{
        f"torch.{name}": _cell(getattr(torch, name))
        for name in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
    },
}
