"""Many models at once: a population is a `TrainState` whose leaves have a first axis, the members.

Nothing else about training changes: `vmap` a step to train all members, `scan` that for an epoch,
and compile it with `fdl.jit`.

    states = population.create(model, opt, random.split(random.key(0), 16), {"lr": rates})
    step   = torch.vmap(fdl.train_step(loss, opt), in_dims=(0, None))   # one batch for all members
    epoch  = lambda states, batches: fdl.scan(step, states, batches)

Members are independent: if the loss of one overflows, the others are not affected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import vmap

from fdl import optim, tree
from fdl._checks import check_dict, describe
from fdl._modes import is_eager
from fdl._numerics import at_least_32_bits, best_row
from fdl._training import TrainState
from fdl.nn import Model, StatefulModel
from fdl.optim._as_optimizer import OptimizerLike
from fdl.tree import Tree
from fdl.tree._checks import check_tensors

__all__ = ["best", "create", "ensemble", "member", "size"]


def create(
    model: Model | StatefulModel,
    opt: OptimizerLike,
    keys: Tensor,
    hyperparams: Mapping[str, Tensor] | None = None,
) -> TrainState:
    """Initialise every member: `TrainState.create` for each key, bit for bit.

    Args:
        model: the model to train.
        opt: the optimizer to train it with. A rate given as the number 0 is left out of its state
            and cannot be set, so give the rates in `hyperparams` another value.
        keys: int64 `[members, 2]`, as `random.split` returns them.
        hyperparams: values by the names of `optim.hyperparams`: `[members]`, or `[]` for one value
            for all.

    Returns:
        A state in which every leaf is `[members, ...]`.

    Raises:
        TypeError: `model` is not a model, or a hyperparameter is not a tensor.
        ValueError: `keys` or a hyperparameter has another shape, or a name cannot be set (the error
            lists those that can).

    >>> from fdl import nn, random
    >>> keys = random.split(random.key(0), 3)
    >>> rates = {"lr": torch.tensor([0.1, 0.2, 0.4])}
    >>> states = create(nn.linear(2, 1), optim.sgd(0.1), keys, rates)
    >>> states.params["weight"].shape, optim.hyperparams(states.opt_state)["lr"]
    (torch.Size([3, 1, 2]), tensor([0.1000, 0.2000, 0.4000], dtype=torch.float64))
    """
    if not isinstance(keys, Tensor):
        raise TypeError(
            f"population.create: keys must be a tensor, got {keys!r}; make them with "
            "random.split(key, members)"
        )
    if keys.ndim != 2 or keys.shape[1] != 2 or not len(keys):
        raise ValueError(
            f"population.create: keys must have the shape [members, 2], got {list(keys.shape)}; "
            "make them with random.split(key, members)"
        )
    if hyperparams is not None:
        what = "a dict from names to tensors [members]"
        check_dict("population.create", "hyperparams", hyperparams, what)
    values = dict(hyperparams or {})
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"population.create: {name!r} must be a tensor, got {value!r}")
        if value.shape not in ((), keys.shape[:1]):
            raise ValueError(
                f"population.create: {name!r} must have the shape [{len(keys)}], one value per "
                f"key, or [], got {list(value.shape)}"
            )
    values = {name: value.to(keys.device).expand(len(keys)) for name, value in values.items()}

    def create_one(key: Tensor, values: dict[str, Tensor]) -> TrainState:
        state = TrainState.create(model, opt, key=key)
        return state._replace(opt_state=optim.with_hyperparams(state.opt_state, **values))

    states = vmap(create_one)(keys, values)
    # vmap expands leaves that do not depend on the key, such as a bias of zeros: copy them.
    return tree.map(lambda leaf: leaf.clone(memory_format=torch.contiguous_format), states)


def size(states: Tree) -> int:
    """Return the number of members.

    Raises:
        ValueError: there are no leaves, or they have no common first axis.

    >>> size({"w": torch.zeros(3, 2), "b": torch.zeros(3)})
    3
    """
    return _members("population.size: states", states)


def _members(what: str, states: Tree) -> int:
    check_tensors(tree.leaves(states), states, f"{what}: every leaf")
    shapes = {path: list(leaf.shape) for path, leaf in tree.flatten_dict(states).items()}
    counts = {shape[0] if shape else None for shape in shapes.values()}
    if len(counts) != 1 or None in counts:
        raise ValueError(f"{what}: leaves need one common first axis, the members, got {shapes}")
    (count,) = counts
    return int(count or 0)


def member(states: Tree, index: int | Tensor) -> Tree:
    """Return a copy of one member of a population, or of one row of any stacked tree.

    Args:
        states: leaves `[members, ...]`.
        index: the member; a 0-d int64 tensor also works inside `jit` and `vmap`.

    Raises:
        IndexError: an int outside −members … members − 1.
        ValueError: the leaves have no common first axis.

    >>> member({"w": torch.arange(3)}, 1)
    {'w': tensor(1)}
    """
    count = _members("population.member: states", states)
    if isinstance(index, Tensor):
        return tree.map(lambda leaf: leaf.index_select(0, index.reshape(1)).squeeze(0), states)
    if not hasattr(index, "__index__"):
        raise TypeError(
            f"population.member: index must be an int or a 0-d tensor, got {describe(index)}"
        )
    if not -count <= index < count:
        raise IndexError(f"population.member: index must be in [-{count}, {count}), got {index}")
    return tree.map(lambda leaf: leaf[index].clone(), states)


def best(states: Tree, loss: Tensor) -> Tree:
    """Return a copy of the member with the smallest loss, the first if several are equal.

    A member whose loss is NaN or infinite, of either sign, is never the best. If no loss is finite,
    this raises; inside `jit` and `torch.func` transformations, which cannot raise depending on a
    value, it returns a member whose floating leaves are all NaN.

    To maximise a score such as an accuracy, pass its negative.

    Args:
        states: leaves `[members, ...]`.
        loss: `[members]`, floating.

    Raises:
        ValueError: `loss` has another shape, the leaves have no common first axis, or no loss is
            finite.

    >>> best({"w": torch.arange(3)}, torch.tensor([0.5, float("nan"), 0.2]))
    {'w': tensor(2)}
    """
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"population.best: loss must be a tensor, got {type(loss).__name__}; the value of a "
            "metric is metric.value"
        )
    count = _members("population.best: states", states)
    if loss.shape != (count,):
        raise ValueError(
            f"population.best: loss must have the shape [{count}], one number per member, "
            f"got {list(loss.shape)}"
        )
    index, any_finite = best_row(loss)
    if is_eager() and not any_finite:
        raise ValueError(f"population.best: no loss is finite, got {loss.tolist()}")
    return tree.map(
        lambda leaf: torch.where(any_finite, leaf, torch.nan) if leaf.is_floating_point() else leaf,
        member(states, index),
    )


def ensemble(
    model: Model | StatefulModel | Callable[..., Tensor],
    params: Tree,
    x: Tree,
    buffers: Tree | None = None,
) -> Tensor:
    """Average the members' probabilities: the softmax of the logits, then the mean over members.

    If a member's probabilities for an example contain NaN, the member is left out of that mean; if
    all do, the mean is NaN. The log-probabilities of an ensemble are the logarithm of this mean,
    not the mean of the members' log-probabilities.

    Args:
        model: a model whose output is logits `[batch, classes]`, evaluated as with `train=False`;
            or any function `(params, x) -> logits`.
        params: the members' parameters, leaves `[members, ...]`.
        x: `[batch, ...]`, or a tree of them; the same for all members.
        buffers: the members' buffers, leaves `[members, ...]`, for a `StatefulModel`.

    Returns:
        Probabilities `[batch, classes]`.

    Raises:
        TypeError: `model` is neither a model nor a function, or returns no tensor.
        ValueError: buffers are missing, or given although the model has none; or the leaves have no
            common first axis; or `model` returns no classes.

    Source: Lakshminarayanan et al., Simple and Scalable Predictive Uncertainty Estimation using
    Deep Ensembles, 2017, https://arxiv.org/abs/1612.01474

    >>> from fdl import nn, random
    >>> model = nn.linear(2, 3)
    >>> states = create(model, optim.sgd(0.1), random.split(random.key(0), 5))
    >>> ensemble(model, states.params, torch.ones(4, 2)).shape
    torch.Size([4, 3])
    """
    if isinstance(model, StatefulModel) != (buffers is not None):
        raise ValueError(
            "population.ensemble: the model has buffers; pass those of the members, as "
            "ensemble(model, states.params, x, states.buffers)"
            if buffers is None
            else f"population.ensemble: buffers are for a StatefulModel, got {describe(model)}"
        )
    apply = model.apply if isinstance(model, Model | StatefulModel) else model
    if not callable(apply):
        raise TypeError(
            f"population.ensemble: model must be a model or a function, got {describe(model)}"
        )
    parts = {"params": params} if buffers is None else {"params": params, "buffers": buffers}
    _members(f"population.ensemble: {' and '.join(parts)}", parts)
    if buffers is None:
        logits = vmap(apply, (0, None))(params, x)
    else:
        logits = vmap(lambda params, buffers: apply(params, buffers, x)[0])(params, buffers)
    if not isinstance(logits, Tensor):
        raise TypeError(
            "population.ensemble: the model must return logits [batch, classes], got "
            f"{describe(logits)}"
        )
    if logits.ndim < 3:
        raise ValueError(
            "population.ensemble: the model must return logits [batch, classes], got "
            f"{list(logits.shape[1:])} from each member; a single example needs a batch axis"
        )
    probabilities = logits.softmax(-1, dtype=at_least_32_bits(logits))
    counts = probabilities.isfinite().all(-1, keepdim=True)
    return (torch.where(counts, probabilities, 0).sum(0) / counts.sum(0)).to(logits.dtype)
