"""Random functions of torch that draw from a key instead of torch's global generator.

Within `with Keyed(key):` the n-th random call draws from `fold_in(key, n)`. What cannot is refused,
so that nothing is ever drawn from the generator.
"""

from __future__ import annotations  # Dynamo would run those of nested functions

import math
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fdl import random
from fdl._dynamo import assume_constant_result

__all__ = ["REFUSED", "RULES", "Keyed", "tell_dynamo"]


class Keyed(TorchFunctionMode):
    """Let random functions follow a key: `with Keyed(random.key(0)): F.dropout(x)`."""

    def __init__(self, key: Tensor | None) -> None:
        super().__init__()
        self.key = key
        self.drawn = 0

    def next(self, name: str) -> Tensor:
        """Derive the key of the next draw."""
        if self.key is None:
            raise ValueError(
                f"{name} draws random numbers and needs a key: pass key=fdl.random.key(seed) to "
                "apply, or train=False to evaluate if it is a layer such as dropout"
            )
        self.drawn += 1
        return random.fold_in(self.key, self.drawn - 1)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in RULES:
            if kwargs.pop("generator", None) is not None:
                raise NotImplementedError(f"{name}: a torch.Generator cannot follow a key")
            return RULES[name](self, *args, **kwargs)
        if name in REFUSED:
            raise NotImplementedError(
                f"{name} draws from torch's global generator and cannot follow a key"
            )
        if name in _RECURRENT:
            return _recurrent(self, func, *args)
        if name in _WITH_STATISTICS:
            return _normalised(func, *args, **kwargs)
        return func(*args, **kwargs)


@assume_constant_result  # called while Dynamo traces, not traced itself
def tell_dynamo() -> None:
    """Have Dynamo ask the mode about `torch.rand` and the like too.

    Eager torch does; Dynamo goes by a list of functions that lacks some of them.
    """
    from torch._dynamo.variables.torch import get_overridable_functions

    asked = get_overridable_functions()
    for name in RULES.keys() | REFUSED:
        if hasattr(torch, name):
            asked.add(getattr(torch, name))


# ------------------------------------------------------------------------------------- dropout


def _kept(mode: Keyed, name: str, rate: float, shape: Any) -> Tensor:
    """Draw what is kept, as `nn.dropout` does."""
    return random.uniform(mode.next(name), shape) >= rate


def _written(x: Tensor, y: Tensor, inplace: bool) -> Tensor:
    return x.copy_(y) if inplace else y


def _dropped(
    mode: Keyed, name: str, x: Tensor, rate: float, train: bool, inplace: bool, shape: Any
) -> Tensor:
    if not train or rate == 0:
        return x
    if rate == 1:
        return _written(x, torch.zeros_like(x), inplace)
    kept = _kept(mode, name, rate, shape)
    return _written(x, torch.where(kept, x / (1 - rate), 0), inplace)


def _dropout(
    mode: Keyed, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    return _dropped(mode, "dropout", input, p, training, inplace, input.shape)


def _per_channel(x: Tensor, batched: bool) -> list[int]:
    """Give the shape of a mask that keeps or drops whole channels."""
    lead = 2 if batched else 1
    return [*x.shape[:lead], *[1] * (x.ndim - lead)]


def _dropout_of_channels(unbatched: int) -> Callable[..., Tensor]:
    """Make the rule for whole channels; `unbatched` is the number of axes of a single example."""

    def rule(
        mode: Keyed, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        shape = _per_channel(input, input.ndim != unbatched)
        return _dropped(mode, "dropout of channels", input, p, training, inplace, shape)

    return rule


def _alpha_dropped(mode: Keyed, x: Tensor, p: float, train: bool, inplace: bool, shape: Any) -> Any:
    """Klambauer et al., 2017: what is dropped becomes α′, then mean 0 and variance 1 again."""
    if not train or p == 0:
        return x
    if p == 1:
        return _written(x, torch.zeros_like(x), inplace)
    alpha = -1.7580993408473766
    scale = 1 / math.sqrt((alpha * alpha * p + 1) * (1 - p))
    kept = _kept(mode, "alpha_dropout", p, shape)
    return _written(x, torch.where(kept, x, alpha) * scale - alpha * p * scale, inplace)


def _alpha_dropout(
    mode: Keyed, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    return _alpha_dropped(mode, input, p, training, inplace, input.shape)


def _feature_alpha_dropout(
    mode: Keyed, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
) -> Tensor:
    return _alpha_dropped(mode, input, p, training, inplace, _per_channel(input, True))


def _rrelu(
    mode: Keyed,
    input: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    if training:
        slope = random.uniform(mode.next("rrelu"), input.shape, lower, upper, input.dtype)
        return _written(input, torch.where(input >= 0, input, input * slope), inplace)
    return F.leaky_relu(input, (lower + upper) / 2, inplace)


# ----------------------------------------------------------------------------------- attention


def _attention(
    mode: Keyed,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p == 0:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = scores + attn_mask
    return _dropout(mode, scores.softmax(-1), dropout_p) @ value


def _opened(f: Any) -> Callable[..., Any]:
    """Copy a function of `torch.nn.functional` so that it runs, rather than asks the mode again.

    What it calls then asks the mode: its dropout follows the key.
    """
    never = {name: lambda *_: False for name in f.__globals__ if "has_torch_function" in name}
    body = types.FunctionType(f.__code__, f.__globals__ | never, f.__name__, f.__defaults__)
    body.__kwdefaults__ = f.__kwdefaults__

    def rule(mode: Keyed, *args: Any, **kwargs: Any) -> Any:
        with mode:
            return body(*args, **kwargs)

    return rule


# ------------------------------------------------------------------------------- normalisation


_WITH_STATISTICS = {"batch_norm", "instance_norm"}


def _normalised(
    func: Any,
    input: Tensor,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Have scale and shift in the running statistics' dtype, which a `Policy` leaves alone."""
    if mean is not None:
        weight, bias = (x if x is None else x.to(mean.dtype) for x in (weight, bias))
    found: Tensor = func(input, mean, var, weight, bias, *args, **kwargs)
    return found


# ----------------------------------------------------------------------------------- recurrent


_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


def _recurrent(mode: Keyed, func: Any, *args: Any) -> Any:
    """Run a stack of recurrent layers one by one, to drop out between them."""
    packed = not isinstance(args[3], bool)
    rate, train = args[6:8] if packed else args[5:7]
    if rate == 0 or not train:
        return func(*args)
    if packed:
        raise NotImplementedError(
            f"{func.__name__}: dropout between layers of a packed sequence cannot follow a key; "
            "pad the sequences, or set dropout=0"
        )
    x, hidden, weights, bias, layers, _, _, two_way, batch_first = args
    directions, width = 2 if two_way else 1, len(weights) // layers
    last = []
    for i in range(layers):
        rows = slice(i * directions, (i + 1) * directions)
        start = hidden[rows] if isinstance(hidden, Tensor) else [h[rows] for h in hidden]
        here = weights[i * width : (i + 1) * width]
        x, *end = func(x, start, here, bias, 1, 0.0, train, two_way, batch_first)
        last.append(end)
        if i < layers - 1:
            x = _dropout(mode, x, rate)
    return x, *(torch.cat(ends) for ends in zip(*last, strict=True))


# -------------------------------------------------------------------------- plain random numbers


def _shape(size: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size


def _made(x: Tensor, device: Any = None, requires_grad: bool = False, **ignored: Any) -> Tensor:
    """Finish what a function such as `torch.rand` returns; the layout and such are the usual."""
    return x if device is None else x.to(device)


def _floating(draw: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    def rule(mode: Keyed, *size: Any, dtype: Any = None, **kwargs: Any) -> Tensor:
        shape = _shape(size or (kwargs.pop("size"),))
        dtype = dtype or torch.get_default_dtype()
        return _made(draw(mode.next(name), shape, dtype=dtype), **kwargs)

    return rule


def _like(draw: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    def rule(mode: Keyed, x: Tensor, *, dtype: Any = None, **kwargs: Any) -> Tensor:
        return _made(draw(mode.next(name), x.shape, dtype=dtype or x.dtype), **kwargs)

    return rule


def _randint(mode: Keyed, *args: Any, dtype: torch.dtype = torch.int64, **kwargs: Any) -> Tensor:
    low, high, size = args if len(args) == 3 else (0, *args)
    return _made(random.randint(mode.next("randint"), tuple(size), low, high).to(dtype), **kwargs)


def _randperm(mode: Keyed, n: int, *, dtype: torch.dtype = torch.int64, **kwargs: Any) -> Tensor:
    return _made(random.permutation(mode.next("randperm"), n).to(dtype), **kwargs)


def _bernoulli(mode: Keyed, input: Tensor, p: float | None = None) -> Tensor:
    chance = input if p is None else torch.full_like(input, p)
    return random.bernoulli(mode.next("bernoulli"), chance).to(input.dtype)


def _fill(name: str, draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make the rule of a method such as `x.uniform_(low, high)`."""

    def rule(mode: Keyed, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x.copy_(draw(mode.next(name), x, *args, **kwargs))

    return rule


def _fill_bernoulli(key: Tensor, x: Tensor, p: Any = 0.5) -> Tensor:
    return random.bernoulli(key, p, x.shape)


def _fill_uniform(key: Tensor, x: Tensor, low: float = 0.0, high: float = 1.0, **to: Any) -> Tensor:
    return random.uniform(key, x.shape, to.get("from", low), to.get("to", high), x.dtype)


def _fill_normal(key: Tensor, x: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return random.normal(key, x.shape, x.dtype) * std + mean


def _fill_exponential(key: Tensor, x: Tensor, lambd: float = 1.0) -> Tensor:
    return -torch.log1p(-random.uniform(key, x.shape, dtype=x.dtype)) / lambd


def _empty(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Memory that is made to be filled with random numbers: under `vmap`, one for each key."""

    def rule(mode: Keyed, *args: Any, **kwargs: Any) -> Tensor:
        x = f(*args, **kwargs)
        if mode.key is None:
            return x
        return mode.key.new_empty(x.shape, dtype=x.dtype, device=x.device)

    return rule


RULES: dict[str, Callable[..., Any]] = {
    "dropout": _dropout,
    "dropout1d": _dropout_of_channels(2),
    "dropout2d": _dropout_of_channels(0),
    "dropout3d": _dropout_of_channels(4),
    "alpha_dropout": _alpha_dropout,
    "feature_alpha_dropout": _feature_alpha_dropout,
    "rrelu": _rrelu,
    "gumbel_softmax": _opened(F.gumbel_softmax),
    "multi_head_attention_forward": _opened(F.multi_head_attention_forward),
    "scaled_dot_product_attention": _attention,
    "rand": _floating(random.uniform, "rand"),
    "randn": _floating(random.normal, "randn"),
    "rand_like": _like(random.uniform, "rand_like"),
    "randn_like": _like(random.normal, "randn_like"),
    "randint": _randint,
    "randperm": _randperm,
    "bernoulli": _bernoulli,
    "bernoulli_": _fill("bernoulli_", _fill_bernoulli),
    "uniform_": _fill("uniform_", _fill_uniform),
    "normal_": _fill("normal_", _fill_normal),
    "exponential_": _fill("exponential_", _fill_exponential),
    "empty": _empty(torch.empty),
    "empty_like": _empty(torch.empty_like),
    "new_empty": _empty(Tensor.new_empty),
    # Dynamo before torch 2.12 cannot follow the method, only the function.
    "unflatten": lambda mode, x, dim, sizes: torch.unflatten(x, dim, sizes),
}

REFUSED = {
    *("alpha_dropout_", "dropout_", "feature_alpha_dropout_", "feature_dropout"),
    *("feature_dropout_", "native_dropout", "rrelu_"),
    *("binomial", "cauchy_", "geometric_", "log_normal_", "multinomial", "normal", "poisson"),
    *("randint_like", "random_", "rrelu_with_noise", "_standard_gamma", "_sample_dirichlet"),
    *("fractional_max_pool2d", "fractional_max_pool3d"),
    *("fractional_max_pool2d_with_indices", "fractional_max_pool3d_with_indices"),
}
