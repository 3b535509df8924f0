"""A model is a pair of pure functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fdl.tree import Tree


class Model(NamedTuple):
    """A layer or a whole model, as two pure functions.

    A model of your own is two functions and no ceremony, here x ↦ scale · x:

    >>> import torch
    >>> from fdl import random
    >>> scale = Model(
    ...     init=lambda key: {"scale": torch.ones(())},
    ...     apply=lambda params, x, *, train=False, key=None: params["scale"] * x,
    ... )
    >>> scale.apply(scale.init(random.key(0)), torch.arange(3.0))
    tensor([0., 1., 2.])
    """

    init: Callable[[Tensor], Tree]  # key -> params
    apply: Callable[..., Tensor]  # (params, x, *, train=False, key=None) -> y
    draws: bool = True  # may `apply` draw from its key? If not, none is made for it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise: a model is not called, its `apply` is."""
        raise TypeError("a Model is two functions: call model.apply(params, x), not model(x)")


class StatefulModel(NamedTuple):
    """A model with buffers, such as running statistics: they go in and come out.

    >>> import torch
    >>> from fdl import random
    >>> counter = StatefulModel(
    ...     init=lambda key: ({}, {"calls": torch.tensor(0)}),
    ...     apply=lambda params, buffers, x, *, train=False, key=None: (
    ...         x, {"calls": buffers["calls"] + 1}),
    ... )
    >>> params, buffers = counter.init(random.key(0))
    >>> counter.apply(params, buffers, torch.ones(1))
    (tensor([1.]), {'calls': tensor(1)})
    """

    init: Callable[[Tensor], tuple[Tree, Tree]]  # key -> (params, buffers)
    apply: Callable[..., tuple[Tensor, Tree]]  # (params, buffers, x, *, ...) -> (y, buffers)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise: a model is not called, its `apply` is."""
        raise TypeError(
            "a StatefulModel is two functions: call model.apply(params, buffers, x), not model(x)"
        )


Layer = Model | Callable[[Tensor], Tensor]


def _is_model(layer: Any) -> bool:
    return isinstance(layer, Model | StatefulModel)


def check_takes_mask(apply: Callable[..., Any], caller: str) -> None:
    """Raise if a model with buffers would count the padded examples of a batch.

    Args:
        apply: of a `StatefulModel`.
        caller: how the error begins.

    Raises:
        ValueError: `apply` has no parameter `mask`.

    >>> check_takes_mask(lambda params, buffers, x, mask=None: (x, {}), "here")
    """
    if "mask" not in inspect.signature(apply).parameters:
        raise ValueError(
            f"{caller}: the batch has a mask, but this model with buffers takes none: padding "
            "would enter its statistics; epoch_indices(..., drop_last=True) gives batches without"
        )
