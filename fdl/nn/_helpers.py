"""Helpers that several layers share: checks of sizes and parameters, and `affine`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fdl import random
from fdl._checks import describe
from fdl.nn._model import Model
from fdl.nn.init import Initializer
from fdl.tree import Tree

Size = int | tuple[int, int]


def get_param(params: Tree, name: str, shape: tuple[int, ...], layer: str) -> Tensor:
    """Return `params[name]`, or raise a ValueError that names it if its shape is not `shape`."""
    if name not in params:
        raise ValueError(f"{layer}: expected params[{name!r}] of shape {list(shape)}, got none")
    if params[name].shape != shape:
        raise ValueError(
            f"{layer}: expected params[{name!r}] of shape {list(shape)}, "
            f"got {list(params[name].shape)}"
        )
    return params[name]


def as_pair(layer: str, name: str, size: Size, least: int = 1) -> tuple[int, int]:
    """Return (height, width) from one int or two, each at least `least`; else raise ValueError."""
    pair = (size, size) if isinstance(size, int) else size
    if not (
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and all(isinstance(n, int) and n >= least for n in pair)
    ):
        given = describe(size) if isinstance(size, Tensor) else repr(size)
        raise ValueError(
            f"{layer}: {name} must be an int or (height, width), at least {least}, got {given}"
        )
    return pair[0], pair[1]


def check_input(layer: str, x: Tensor) -> None:
    """Raise a TypeError unless x is a tensor that is floating or complex.

    Norms would round their results to integers, and compiled products would convert them silently.
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{layer}: x must be a tensor, got {describe(x)}; for inputs with several parts write "
            "a Model whose apply takes them apart"
        )
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(
            f"{layer}: x must be floating, got {describe(x)}; convert images with "
            "fdl.data.to_float, other integers with .float()"
        )


def check_sizes(layer: str, *sizes: int) -> None:
    """Raise a ValueError unless every size is at least 1."""
    if min(sizes) < 1:
        raise ValueError(f"{layer}: every size must be at least 1")


def affine(
    name: str,
    shape: tuple[int, ...],
    weight_init: Initializer,
    bias_init: Initializer | None,
    f: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> Model:
    """Return the layer y = f(x, weight, bias).

    Args:
        name: the layer's name, used in error messages.
        shape: shape of the weight.
        weight_init: initializer of the weight.
        bias_init: initializer of the bias `[shape[0]]`; no bias if None.
        f: `(x, weight, bias or None) -> y`.
    """

    def init(key: Tensor) -> Tree:
        weight_key, bias_key = random.split(key)
        params = {"weight": weight_init(weight_key, shape, torch.float32)}
        if bias_init is not None:
            params["bias"] = bias_init(bias_key, shape[:1], torch.float32)
        return params

    def apply(params: Tree, x: Tensor, *, train: bool = False, key: Tensor | None = None) -> Tensor:
        check_input(name, x)
        weight = get_param(params, "weight", shape, name)
        return f(x, weight, get_param(params, "bias", shape[:1], name) if bias_init else None)

    return Model(init, apply, uses_key=False)
