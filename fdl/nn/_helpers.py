"""Checks of sizes and parameters that layers share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fdl import random
from fdl.nn._model import Model
from fdl.nn.init import Initializer
from fdl.tree import Tree

Size = int | tuple[int, int]


def _param(params: Tree, name: str, shape: tuple[int, ...], layer: str) -> Tensor:
    """Take one parameter, having compared its shape: torch's own message would name no path."""
    if name not in params:
        raise ValueError(f"{layer}: expected params[{name!r}] of shape {list(shape)}, got none")
    if params[name].shape != shape:
        raise ValueError(
            f"{layer}: expected params[{name!r}] of shape {list(shape)}, "
            f"got {list(params[name].shape)}"
        )
    return params[name]


def _pair(name: str, what: str, size: Size, least: int = 1) -> tuple[int, int]:
    """Make (height, width) of one number or two, each at least `least`."""
    pair = (size, size) if isinstance(size, int) else size
    if not (
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and all(isinstance(n, int) and n >= least for n in pair)
    ):
        raise ValueError(
            f"{name}: {what} must be an int or (height, width), at least {least}, got {size!r}"
        )
    return pair[0], pair[1]


def _check_sizes(name: str, *sizes: int) -> None:
    if min(sizes) < 1:
        raise ValueError(f"{name}: every size must be at least 1")


def _affine(
    name: str,
    shape: tuple[int, ...],
    weight_init: Initializer,
    bias_init: Initializer | None,
    f: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> Model:
    """A layer with a weight of `shape` and, given its initializer, a bias `[shape[0]]`."""

    def init(key: Tensor) -> Tree:
        weight_key, bias_key = random.split(key)
        params = {"weight": weight_init(weight_key, shape, torch.float32)}
        if bias_init is not None:
            params["bias"] = bias_init(bias_key, shape[:1], torch.float32)
        return params

    def apply(params: Tree, x: Tensor, *, train: bool = False, key: Tensor | None = None) -> Tensor:
        weight = _param(params, "weight", shape, name)
        return f(x, weight, _param(params, "bias", shape[:1], name) if bias_init else None)

    return Model(init, apply, draws=False)
