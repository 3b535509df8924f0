"""Evaluate averages in the place of what is trained."""

from __future__ import annotations

from torch import Tensor

from fdl import tree
from fdl._training._checks import check_state
from fdl._training._state import TrainState
from fdl.optim._averaging import averages_of
from fdl.tree import Tree
from fdl.tree._map import match


def averaged(state: TrainState) -> TrainState:
    """Put the averages that `optim.params_ema` keeps in the place of parameters and buffers.

    Evaluate or export the result, and go on training with `state`. Averages are cast to the dtypes
    of what they replace. Parameters that no average covers stay; buffers stay unless there is a
    `params_ema(buffers=True)`: recompute running statistics with `update_bn` then. For the states
    of a population, `vmap` it.

    Args:
        state: a state of training with `optim.params_ema` anywhere in the optimizer.

    Raises:
        TypeError: `state` is not a `TrainState`.
        ValueError: the optimizer keeps no average, or one of other paths or shapes (each path is
            listed).

    >>> import torch
    >>> from fdl import losses, nn, optim, random, supervised, train_step
    >>> model = nn.sequential(nn.linear(2, 3), nn.batch_norm(3), nn.linear(3, 1))
    >>> opt = optim.chain(optim.sgd(0.1), optim.params_ema(0.99, buffers=True))
    >>> state = TrainState.create(model, opt, key=random.key(0))
    >>> step = train_step(supervised(model, losses.mse), opt)
    >>> for _ in range(2):
    ...     state, _ = step(state, (torch.eye(2), torch.ones(2, 1)))
    >>> average = averaged(state)
    >>> average.buffers["1"]["running_var"] > state.buffers["1"]["running_var"]
    tensor([True, True, True])
    """
    check_state("averaged", state)
    parts = averages_of(state.opt_state)
    if not parts:
        raise ValueError(
            "averaged: the optimizer keeps no average of the parameters; put optim.params_ema last "
            "in its chain"
        )
    params, buffers = state.params, state.buffers
    for of_params, of_buffers in parts:
        params = _replaced(params, of_params)
        if of_buffers is not None:
            match(buffers, of_buffers, "averaged: averages of buffers, made by TrainState.create")
            buffers = _replaced(buffers, of_buffers)
    return state._replace(params=params, buffers=buffers)


def _replaced(old: Tree, averages: Tree) -> Tree:
    """Replace the leaves for which there are averages."""
    flat, new = tree.flatten_dict(old), tree.flatten_dict(averages)
    lines = [
        f"{path}: expected {list(a.shape)}, got "
        f"{list(flat[path].shape) if path in flat else 'nothing'}"
        for path, a in new.items()
        if path not in flat or flat[path].shape != a.shape
    ]
    if lines:
        raise ValueError("averaged: the averages are of other leaves:\n  " + "\n  ".join(lines))

    def replace(path: str, leaf: Tensor) -> Tensor:
        return new[path].to(leaf.dtype) if path in new else leaf

    return tree.unflatten_dict({path: replace(path, leaf) for path, leaf in flat.items()}, like=old)
