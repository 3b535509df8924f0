"""Rules for the functions of torch that draw random numbers: `torch.rand`, `x.normal_()`.

All draw in at least 32 bits and then round: 16 bits cannot represent a probability of 0.001, the
tails of a normal distribution, or a small exponential number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fdl import random
from fdl.interop._keys import Keys


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# --------------------------------------------------------------------- draws, rounded to a dtype


def _uniform(
    key: Tensor, shape: Any, dtype: torch.dtype, low: Any = 0.0, high: Any = 1.0
) -> Tensor:
    """Draw from [low, high); numbers that round to `high` become the number before it."""
    wide = _wide(dtype)
    x = random.uniform(key, tuple(shape), wide, minval=low, maxval=high).to(dtype)
    if wide == dtype and (low, high) == (0, 1):  # no rounding
        return x
    end = torch.full((), high, dtype=dtype, device=x.device)
    before = torch.nextafter(end, torch.full_like(end, -math.inf))
    return torch.where((x >= end) & (before >= low), before, x)


def _normal(key: Tensor, shape: Any, dtype: torch.dtype, mean: Any = 0.0, std: Any = 1.0) -> Tensor:
    return (random.normal(key, tuple(shape), _wide(dtype)) * std + mean).to(dtype)


def _exponential(key: Tensor, shape: Any, dtype: torch.dtype, lambd: float = 1.0) -> Tensor:
    """Draw by inverting the distribution function; never 0, because users take the logarithm."""
    wide, info = _wide(dtype), torch.finfo(dtype)
    u = random.uniform(key, tuple(shape), dtype=wide)
    # 0 stands for the middle of the first step of the grid. The result is at least `least`.
    x = -torch.log1p(-u.clamp(min=torch.finfo(wide).eps / 2)) / lambd
    least = info.tiny * (info.eps if dtype == torch.float16 else 1)
    return x.to(dtype).clamp(min=least)


def _bernoulli(key: Tensor, shape: Any, dtype: torch.dtype, p: Any = 0.5) -> Tensor:
    chance = p.to(_wide(p.dtype)) if isinstance(p, Tensor) else p
    return random.bernoulli(key, chance, tuple(shape)).to(dtype)


# ----------------------------------------------------------------------------- functions of torch


def _made(
    x: Tensor,
    *,
    device: Any = None,
    layout: torch.layout | None = torch.strided,
    pin_memory: bool | None = False,
    requires_grad: bool = False,
    memory_format: torch.memory_format | None = None,
    out: Tensor | None = None,
    names: None = None,
) -> Tensor:
    """Apply the options of a function such as `torch.rand` to its result."""
    if layout not in (None, torch.strided) or names is not None:
        raise NotImplementedError(f"no rule for random numbers with layout={layout}, names={names}")
    if device is not None:
        x = x.to(device)
    if memory_format not in (None, torch.preserve_format):
        x = x.contiguous(memory_format=memory_format)
    if pin_memory:
        x = x.pin_memory()
    if out is not None:
        return out.copy_(x)
    return x.requires_grad_() if requires_grad else x


def _shape(size: tuple[Any, ...]) -> tuple[int, ...]:
    nested = len(size) == 1 and isinstance(size[0], list | tuple)
    return tuple(size[0]) if nested else size


def _floating(draw: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    """Make the rule of a function such as `torch.rand(*size)`."""

    def rule(mode: Keys, *args: Any, size: Any = None, dtype: Any = None, **to: Any) -> Tensor:
        shape = _shape(args) if size is None else tuple(size)
        out = to.get("out")
        dtype = dtype or (torch.get_default_dtype() if out is None else out.dtype)
        return _made(draw(mode.next(name), shape, dtype), **to)

    return rule


def _like(draw: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    def rule(mode: Keys, input: Tensor, *, dtype: Any = None, **to: Any) -> Tensor:
        return _made(draw(mode.next(name), input.shape, dtype or input.dtype), **to)

    return rule


def _randint(
    mode: Keys,
    *args: Any,
    low: Any = 0,
    high: Any = None,
    size: Any = None,
    dtype: torch.dtype | None = None,
    **to: Any,
) -> Tensor:
    """`torch.randint(low=0, high, size)`; positional arguments are counted from the right."""
    *bounds, size = args if size is None else (*args, size)
    if high is None:
        *bounds, high = bounds
    if bounds:
        (low,) = bounds
    x = random.randint(mode.next("randint"), tuple(size), minval=low, maxval=high)
    return _made(x.to(dtype or torch.int64), **to)


def _randperm(mode: Keys, n: int, *, dtype: torch.dtype | None = None, **to: Any) -> Tensor:
    return _made(random.permutation(mode.next("randperm"), n).to(dtype or torch.int64), **to)


def _torch_bernoulli(mode: Keys, input: Tensor, p: float | None = None, **to: Any) -> Tensor:
    chance = input if p is None else p
    return _made(_bernoulli(mode.next("bernoulli"), input.shape, input.dtype, chance), **to)


def _torch_normal(
    mode: Keys,
    mean: Any = 0.0,
    std: Any = 1.0,
    size: Any = None,
    *,
    dtype: torch.dtype | None = None,
    **to: Any,
) -> Tensor:
    """`torch.normal`; mean and deviation are numbers with a size, or tensors that broadcast."""
    tensors = [x for x in (mean, std) if isinstance(x, Tensor)]
    if size is None:
        size = torch.broadcast_shapes(*(x.shape for x in tensors))
        dtype = dtype or tensors[0].dtype
    return _made(
        _normal(mode.next("normal"), size, dtype or torch.get_default_dtype(), mean, std), **to
    )


# ------------------------------------------------------------------------------ methods that fill


def _fill(draw: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    """Make the rule of a method such as `x.normal_(mean, std)`."""

    def rule(mode: Keys, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return input.copy_(draw(mode.next(name), input.shape, input.dtype, *args, **kwargs))

    return rule


def _fill_bernoulli(key: Tensor, shape: Any, dtype: torch.dtype, p: Any = 0.5) -> Tensor:
    return _bernoulli(key, shape, dtype, p)


def _fill_uniform(key: Tensor, shape: Any, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Tensor:
    low, high = kwargs.get("from", 0.0), kwargs.get("to", 1.0)  # `from` is a keyword of Python
    return _uniform(key, shape, dtype, *args, *(low, high)[len(args) :])


def _init_uniform(mode: Keys, tensor: Tensor, a: float = 0.0, b: float = 1.0) -> Tensor:
    return _fill(_uniform, "uniform_")(mode, tensor, a, b)


def _init_normal(mode: Keys, tensor: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return _fill(_normal, "normal_")(mode, tensor, mean, std)


def _init_kaiming_uniform(
    keyed: Keys,
    /,
    tensor: Tensor,
    a: float = 0.0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
) -> Tensor:
    """He et al., 2015."""
    init = torch.nn.init
    gain = init.calculate_gain(nonlinearity, a)  # type: ignore[arg-type]
    bound = gain * math.sqrt(3 / init._calculate_correct_fan(tensor, mode))  # type: ignore[arg-type]
    return _init_uniform(keyed, tensor, -bound, bound)


def _empty(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make the rule of `torch.empty`: under `vmap` of keys the result has their axes."""

    def rule(mode: Keys, *args: Any, **kwargs: Any) -> Tensor:
        x = f(*args, **kwargs)
        if mode.key is None:
            return x
        return mode.key.new_empty(x.shape, dtype=x.dtype, device=x.device)

    return rule


def _unflatten(mode: Keys, input: Tensor, dim: int, sizes: Any) -> Tensor:
    """Call the function: Dynamo before torch 2.12 cannot trace the method."""
    return torch.unflatten(input, dim, sizes)


RULES: dict[str, Callable[..., Any]] = {
    "torch.rand": _floating(_uniform, "rand"),
    "torch.randn": _floating(_normal, "randn"),
    "torch.rand_like": _like(_uniform, "rand_like"),
    "torch.randn_like": _like(_normal, "randn_like"),
    "torch.randint": _randint,
    "torch.randperm": _randperm,
    "torch.normal": _torch_normal,
    "torch.bernoulli": _torch_bernoulli,
    "Tensor.bernoulli": _torch_bernoulli,
    "Tensor.bernoulli_": _fill(_fill_bernoulli, "bernoulli_"),
    "Tensor.uniform_": _fill(_fill_uniform, "uniform_"),
    "Tensor.normal_": _fill(_normal, "normal_"),
    "Tensor.exponential_": _fill(_exponential, "exponential_"),
    "init.uniform_": _init_uniform,
    "init.normal_": _init_normal,
    "init.kaiming_uniform_": _init_kaiming_uniform,
    "torch.empty": _empty(torch.empty),
    "torch.empty_like": _empty(torch.empty_like),
    "Tensor.new_empty": _empty(Tensor.new_empty),
    "Tensor.unflatten": _unflatten,
}
