"""The type of a loss with buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fdl._training._state import Metrics
from fdl.tree import Tree


class StatefulLoss(NamedTuple):
    """The loss of a `StatefulModel`: a function that takes buffers and returns new ones.

    `fdl.supervised` makes one. To write your own, wrap a function
    `(params, buffers, batch, *, train=False, key=None) -> (scalar, (metrics, buffers))`; the type
    tells `train_step` and `eval_step` to pass the buffers. (A loss without buffers is a plain
    function `(params, batch, *, train=False, key=None) -> (scalar, metrics)`.)

    >>> import torch
    >>> def shrink(params, buffers, batch, *, train, key):
    ...     return (params["w"] * batch[0]).sum(), ({}, {"calls": buffers["calls"] + 1})
    >>> loss = StatefulLoss(shrink)
    >>> params, buffers = {"w": torch.ones(2)}, {"calls": torch.tensor(0)}
    >>> loss(params, buffers, (torch.ones(2), torch.ones(2)), train=True)
    (tensor(2.), ({}, {'calls': tensor(1)}))
    """

    fn: Callable[..., tuple[Tensor, tuple[Metrics, Tree]]]

    def __call__(
        self,
        params: Tree,
        buffers: Tree,
        batch: Any,
        *,
        train: bool = False,
        key: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Metrics, Tree]]:
        """Call the function."""
        return self.fn(params, buffers, batch, train=train, key=key)


Loss = Callable[..., Any] | StatefulLoss
