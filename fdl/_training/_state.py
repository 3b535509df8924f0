"""`TrainState`: everything that training changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdl import random, tree
from fdl._checks import describe
from fdl._kinds import register
from fdl.nn import Model, StatefulModel
from fdl.nn._model import check_model
from fdl.optim._as_optimizer import OptimizerLike, as_optimizer
from fdl.optim._averaging import start_buffers
from fdl.tree import Tree
from fdl.tree._checks import check_tensors
from fdl.tree._map import match

Metrics = dict[str, Any]  # each a Mean or other sums that merge


@register
class TrainState(NamedTuple):
    """Everything that training changes, and the key of the run: a tree like any other.

    >>> from fdl import nn, optim
    >>> state = TrainState.create(nn.linear(2, 1), optim.sgd(0.1), key=random.key(0))
    >>> list(tree.flatten_dict(state))[:2]
    ['params.weight', 'params.bias']
    """

    params: Tree
    buffers: Tree  # {} if the model has none
    opt_state: Tree
    key: Tensor  # int64 [2]; never changes: step k uses fold_in(key, k)
    step: Tensor  # int64 [], number of steps done

    @classmethod
    def create(
        cls,
        model: Model | StatefulModel,
        opt: OptimizerLike,
        *,
        key: Tensor,
        params: Tree | None = None,
    ) -> TrainState:
        """Initialise the parameters and the optimizer, on the device of `key`.

        Args:
            model: the model to train.
            opt: the optimizer to train it with.
            key: split once: one half initialises the parameters, the other becomes `state.key`.
            params: parameters to start from, of any floating dtype; if None, `model.init`'s.

        Raises:
            TypeError: `model` is not a model.
            ValueError: the device has no float64, as MPS, which rates, averages and metrics are
                computed in; `params` differs from the model's in paths or shapes, or is
                not floating (each path is listed).

        >>> from fdl import nn, optim
        >>> state = TrainState.create(nn.linear(2, 1), optim.sgd(0.1), key=random.key(0))
        >>> state.params["weight"].shape, state.step
        (torch.Size([1, 2]), tensor(0))
        """
        check_model("TrainState.create", model)
        checked = as_optimizer("TrainState.create", opt)
        init_key, run_key = random.split(key)
        _check_float64(key.device)
        expected, buffers = _initialise(model, init_key)
        if params is None:
            params = expected
        else:
            check_tensors(tree.leaves(params), params, "TrainState.create: every leaf of params")
            # The given parameters may differ from the model's in their floating dtype only.
            lines = tree.diff(
                tree.cast(expected, torch.float32),
                tree.cast(params, torch.float32),
                values=False,
            )
            if lines:
                raise ValueError(
                    "TrainState.create: params do not fit the model:\n  " + "\n  ".join(lines)
                )
            match(expected, params, "TrainState.create: params")  # containers
        return cls(
            params,
            buffers,
            start_buffers(checked.init(params), buffers),
            run_key.clone(),
            torch.zeros((), dtype=torch.int64, device=key.device),
        )


def _check_float64(device: torch.device) -> None:
    """Raise a ValueError if the device has no float64."""
    if device.type in ("cpu", "cuda"):
        return
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"TrainState.create: key is on the device {device}, which has no float64 ({error}); "
            "rates, averages and metrics need it: train on a CPU or a CUDA device"
        ) from error


def _initialise(model: Model | StatefulModel, key: Tensor) -> tuple[Tree, Tree]:
    """Return the model's params and buffers, {} for a `Model`."""
    initial = model.init(key)
    is_pair = isinstance(initial, tuple) and len(initial) == 2
    if isinstance(model, StatefulModel):
        if not is_pair:
            raise TypeError(
                "TrainState.create: init of a StatefulModel must return (params, buffers), got "
                f"{describe(initial)}"
            )
        return initial
    if is_pair and all(isinstance(part, Mapping) for part in initial):
        raise TypeError(
            "TrainState.create: init of a Model must return params, got two dicts; a model with "
            "buffers is a StatefulModel"
        )
    return initial, {}
