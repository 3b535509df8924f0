"""Layers that reshape and reduce by patterns of einops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import einops
import einops.layers.torch
from torch import Tensor

Reduction = Literal["min", "max", "sum", "mean", "prod", "any", "all"]


def rearrange(pattern: str, **sizes: int) -> Callable[[Tensor], Tensor]:
    """Reorder, split and merge axes by a pattern; equals `einops.rearrange`.

    Args:
        pattern: the axes of x and those of the result, such as `"b c h w -> b (h w) c"`.
        **sizes: sizes of axes that the shape of x does not tell.

    Raises:
        ValueError: the pattern is not one of einops.

    >>> import torch
    >>> patches = rearrange("b c (h p) (w q) -> b (h w) (c p q)", p=4, q=4)
    >>> patches(torch.zeros(2, 3, 8, 12)).shape
    torch.Size([2, 6, 48])
    """
    _check_pattern("rearrange", lambda: einops.layers.torch.Rearrange(pattern, **sizes))
    return lambda x: einops.rearrange(x, pattern, **sizes)


def reduce(pattern: str, reduction: Reduction, **sizes: int) -> Callable[[Tensor], Tensor]:
    """Reduce the axes that a pattern leaves out; equals `einops.reduce`.

    Args:
        pattern: the axes of x and those of the result, such as `"b c h w -> b c"`.
        reduction: how to reduce: `"mean"`, `"sum"`, `"max"`, `"min"`, `"prod"`, `"any"`, `"all"`.
        **sizes: sizes of axes that the shape of x does not tell.

    Raises:
        ValueError: the pattern or the reduction is not one of einops.

    >>> import torch
    >>> reduce("b c h w -> b c", "mean")(torch.ones(2, 3, 4, 4)).shape
    torch.Size([2, 3])
    """
    _check_pattern("reduce", lambda: einops.layers.torch.Reduce(pattern, reduction, **sizes))
    return lambda x: einops.reduce(x, pattern, reduction, **sizes)


def _check_pattern(name: str, parse: Callable[[], object]) -> None:
    """Let einops read a pattern when the layer is built, not at its first call."""
    try:
        parse()
    except Exception as error:  # an EinopsError, or a ValueError without an arrow
        raise ValueError(f"{name}: einops cannot read this pattern: {error}") from error
