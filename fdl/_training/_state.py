"""The state of training."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fdl import random, tree
from fdl._kinds import register
from fdl.metrics import Mean
from fdl.nn import Model, StatefulModel
from fdl.optim import Optimizer
from fdl.tree import Tree
from fdl.tree._map import match

Metrics = dict[str, Mean]


@register
class TrainState(NamedTuple):
    """Everything that training changes, and the key: a tree like any other.

    >>> from fdl import nn, optim
    >>> state = TrainState.create(nn.linear(2, 1), optim.sgd(0.1), key=random.key(0))
    >>> list(tree.flatten_dict(state))[:2]
    ['params.weight', 'params.bias']
    """

    params: Tree
    buffers: Tree  # {} where the model has none
    opt_state: Tree
    key: Tensor  # int64 [2]; never changes, step k draws from fold_in(key, k)
    step: Tensor  # int64 [], steps done

    @classmethod
    def create(
        cls,
        model: Model | StatefulModel,
        opt: Optimizer,
        *,
        key: Tensor,
        params: Tree | None = None,
    ) -> TrainState:
        """Draw the parameters and initialise the optimizer, on the device of `key`.

        Args:
            model: what to train.
            opt: what to train it with.
            key: split once: one half draws the parameters, the other is kept for the run.
            params: start from these instead, of any floating dtype.

        Raises:
            ValueError: `params` differs from the model's in paths or shapes, or is not floating
                (each path is listed).

        >>> from fdl import nn, optim
        >>> state = TrainState.create(nn.linear(2, 1), optim.sgd(0.1), key=random.key(0))
        >>> state.params["weight"].shape, state.step
        (torch.Size([1, 2]), tensor(0))
        """
        init_key, run_key = random.split(key)
        drawn = model.init(init_key)
        expected, buffers = drawn if isinstance(model, StatefulModel) else (drawn, {})
        if params is None:
            params = expected
        else:
            # Of the given parameters only the floating dtype may be another.
            lines = tree.diff(
                tree.cast(expected, torch.float32),
                tree.cast(params, torch.float32),
                values=False,
            )
            if lines:
                raise ValueError(
                    "TrainState.create: params do not fit the model:\n  " + "\n  ".join(lines)
                )
            match(expected, params, "TrainState.create: params")  # lists for dicts, say
        return cls(
            params,
            buffers,
            opt.init(params),
            run_key.clone(),
            torch.zeros((), dtype=torch.int64, device=key.device),
        )
