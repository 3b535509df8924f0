"""Helpers that several layers share: checks of sizes and parameters, and `affine`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fdl import random
from fdl._checks import check_dict, check_function, conversion, describe
from fdl.nn._model import Model
from fdl.nn.init import Initializer, kaiming_uniform, uniform
from fdl.tree import Tree

Size = int | tuple[int, ...]  # one size for all axes, or one for each

AXES = {1: "length", 2: "height, width", 3: "depth, height, width"}


def get_param(params: Tree, name: str, shape: tuple[int, ...], layer: str) -> Tensor:
    """Return `params[name]`, or raise a ValueError that names it if its shape is not `shape`."""
    check_dict(layer, "params", params, "a dict of tensors")
    if name not in params.keys():  # noqa: SIM118, since a TensorDict knows no `in`
        raise ValueError(f"{layer}: expected params[{name!r}] of shape {list(shape)}, got none")
    if params[name].shape != shape:
        raise ValueError(
            f"{layer}: expected params[{name!r}] of shape {list(shape)}, "
            f"got {list(params[name].shape)}"
        )
    return params[name]


def as_sizes(layer: str, name: str, size: Size, axes: int, least: int = 1) -> tuple[int, ...]:
    """Return a size for each of the last `axes` axes, each at least `least`; else raise ValueError.

    Args:
        layer: the layer's name, used in the error message.
        name: the argument's name, used in the error message.
        size: one int for all axes, or a tuple with one for each.
        axes: the number of axes, 1 to 3.
        least: the smallest size.
    """
    sizes = (size,) * axes if isinstance(size, int) else size
    if not (
        isinstance(sizes, tuple | list)
        and len(sizes) == axes
        and all(isinstance(n, int) and n >= least for n in sizes)
    ):
        given = describe(size) if isinstance(size, Tensor) else repr(size)
        several = f"({AXES[axes]}{',' * (axes == 1)})"
        raise ValueError(
            f"{layer}: {name} must be an int or {several}, at least {least}, got {given}"
        )
    return tuple(sizes)


def check_image(layer: str, x: Tensor, axes: int, channels: int | None = None) -> None:
    """Raise unless x is a tensor `[batch, channels, *axes]` or `[channels, *axes]`.

    Args:
        layer: the layer's name, used in the error message.
        x: the input.
        axes: the number of axes after the channels, 1 to 3.
        channels: the number of channels; if None, any.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{layer}: x must be a tensor, got {describe(x)}")
    if x.ndim not in (axes + 1, axes + 2) or channels not in (None, x.shape[-axes - 1]):
        image = f"{channels or 'channels'}, {AXES[axes]}"
        raise ValueError(f"{layer}: expected x [batch, {image}] or [{image}], got {list(x.shape)}")


def check_input(layer: str, x: Tensor, argument: str = "x") -> None:
    """Raise a TypeError unless x is a tensor that is floating or complex.

    Norms would round their results to integers, and compiled products would convert them silently.

    Args:
        layer: the layer's name, used in the error message.
        x: the input.
        argument: the input's name, used in the error message.
    """
    if not isinstance(x, Tensor):
        how = hasattr(x, "dtype") and conversion(x)
        how = how or "for inputs with several parts write a Model whose apply takes them apart"
        raise TypeError(f"{layer}: {argument} must be a tensor, got {describe(x)}; {how}")
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(
            f"{layer}: {argument} must be floating, got {describe(x)}; convert images with "
            "fdl.data.to_float, other integers with .float()"
        )


def check_sequence(
    layer: str, x: Tensor, features: int, argument: str = "x", *, axes: str = "batch, length"
) -> None:
    """Raise unless x is a floating tensor `[..., length, features]`, or `[..., features]`.

    Args:
        layer: the layer's name, used in the error message.
        x: the input.
        features: size of the last axis.
        argument: the input's name, used in the error message.
        axes: names of the axes before the last, of which the first may be of any number.
    """
    check_input(layer, x, argument)
    if x.ndim < 1 + axes.count(",") or x.shape[-1:] != (features,):
        raise ValueError(f"{layer}: expected {argument} [{axes}, {features}], got {list(x.shape)}")


def check_key_given(layer: str, key: Tensor | None) -> Tensor:
    """Return the key of a layer that drops values in training, or raise a ValueError if None."""
    if key is None:
        raise ValueError(
            f"{layer} with train=True needs a key: pass key=fdl.random.key(seed) to apply, or "
            "train=False to evaluate"
        )
    return key


def check_sizes(layer: str, *sizes: int) -> None:
    """Raise unless every size is an int of at least 1."""
    if not sizes:
        raise ValueError(f"{layer}: there must be a size")
    for size in sizes:
        several = isinstance(size, Tensor) and size.ndim > 0
        if several or not hasattr(size, "__index__") or isinstance(size, bool):
            raise TypeError(
                f"{layer}: every size must be an int, got {describe(size)}; no size is inferred "
                "from an input, since parameters are made without one: for the size of an output, "
                "apply the layers before this one to an example"
            )
    if min(sizes) < 1:
        raise ValueError(f"{layer}: every size must be at least 1")


def check_dtype(layer: str, x: Tensor, weight: Tensor) -> None:
    """Raise a TypeError unless x and the parameters have one dtype, or autocast converts them."""
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"{layer}: x and params must have one dtype, got for x {describe(x)}, for params "
            f"{describe(weight)}; convert one with fdl.tree.cast, or both by nn.with_policy"
        )


def affine(
    name: str,
    shape: tuple[int, ...],
    outputs: int,
    f: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    bias: bool,
    weight_init: Initializer | None,
    bias_init: Initializer | None,
) -> Model:
    """Return the layer y = f(x, weight, bias), initialised as torch initialises its own.

    Args:
        name: the layer's name, used in error messages.
        shape: shape of the weight, `[first, second, *kernel]`; the fan-in is that of torch, the
            product of all axes but the first.
        outputs: size of the bias.
        f: `(x, weight, bias or None) -> y`.
        bias: if False, there is no bias.
        weight_init: initializer of the weight; if None, U(±1/√fan_in).
        bias_init: initializer of the bias; if None, U(±1/√fan_in).
    """
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    for argument, initializer in (("weight_init", weight_init), ("bias_init", bias_init)):
        if initializer is not None:
            check_function(name, argument, initializer, "(key, shape, dtype) -> tensor")
    init_weight = weight_init or kaiming_uniform(a=math.sqrt(5))
    init_bias = bias_init or uniform(-bound, bound)

    def init(key: Tensor) -> Tree:
        weight_key, bias_key = random.split(key)
        params = {"weight": init_weight(weight_key, shape, torch.float32)}
        return params | ({"bias": init_bias(bias_key, (outputs,), torch.float32)} if bias else {})

    def apply(params: Tree, x: Tensor, *, train: bool = False, key: Tensor | None = None) -> Tensor:
        check_input(name, x)
        weight = get_param(params, "weight", shape, name)
        shift = get_param(params, "bias", (outputs,), name) if bias else None
        check_dtype(name, x, weight)
        return f(x, weight, shift)

    return Model(init, apply, uses_key=False)
