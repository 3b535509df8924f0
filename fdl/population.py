"""Many models at once: a population is a `TrainState` whose leaves have a first axis, the members.

Nothing else about training changes: `vmap` of a step trains the population, a `scan` of that is its
epoch, and `fdl.jit` makes one program of it.

    states = population.create(model, opt, random.split(random.key(0), 16), {"lr": rates})
    step   = torch.vmap(fdl.train_step(loss, opt), in_dims=(0, None))   # one batch, for all members
    epoch  = lambda states, batches: fdl.scan(step, states, batches)

Members never meet: one whose loss overflows leaves the others as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import vmap

from fdl import optim, tree
from fdl._modes import is_eager
from fdl._numerics import at_least_32_bits, best_row
from fdl._training import TrainState
from fdl.nn import Model, StatefulModel
from fdl.optim import Optimizer
from fdl.tree import Tree

__all__ = ["best", "create", "ensemble", "member", "size"]


def create(
    model: Model | StatefulModel,
    opt: Optimizer,
    keys: Tensor,
    hyperparams: Mapping[str, Tensor] | None = None,
) -> TrainState:
    """Draw the parameters of every member: `TrainState.create` for each key, bit for bit.

    Args:
        model: what to train.
        opt: what to train it with. A rate that is to be set must be in its state, so give it
            another value than the number 0, which leaves it out.
        keys: int64 [members, 2], as `random.split` gives them.
        hyperparams: values by the names of `optim.hyperparams`: [members], or [] for all alike.

    Returns:
        A state in which every leaf has the first axis [members].

    Raises:
        TypeError: a hyperparameter that is not a tensor.
        ValueError: keys or a hyperparameter of another shape, or a name that cannot be set (what
            can be is listed).

    >>> from fdl import nn, random
    >>> keys = random.split(random.key(0), 3)
    >>> rates = {"lr": torch.tensor([0.1, 0.2, 0.4])}
    >>> states = create(nn.linear(2, 1), optim.sgd(0.1), keys, rates)
    >>> states.params["weight"].shape, optim.hyperparams(states.opt_state)["lr"]
    (torch.Size([3, 1, 2]), tensor([0.1000, 0.2000, 0.4000], dtype=torch.float64))
    """
    if keys.ndim != 2 or keys.shape[1] != 2 or not len(keys):
        raise ValueError(
            f"population.create: keys must have the shape [members, 2], got {list(keys.shape)}; "
            "random.split(key, members) makes them"
        )
    values = dict(hyperparams or {})
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"population.create: {name!r} must be a tensor, got {value!r}")
        if value.shape not in ((), keys.shape[:1]):
            raise ValueError(
                f"population.create: {name!r} must have the shape [{len(keys)}], a value for each "
                f"key, or [], got {list(value.shape)}"
            )
    values = {name: value.to(keys.device).expand(len(keys)) for name, value in values.items()}

    def one(key: Tensor, values: dict[str, Tensor]) -> TrainState:
        state = TrainState.create(model, opt, key=key)
        return state._replace(opt_state=optim.with_hyperparams(state.opt_state, **values))

    states = vmap(one)(keys, values)
    # What no key enters into, a bias of zeros, would be one row seen many times.
    return tree.map(lambda leaf: leaf.clone(memory_format=torch.contiguous_format), states)


def size(states: Tree) -> int:
    """Count the members.

    Raises:
        ValueError: no leaves, or leaves without one common first axis.

    >>> size({"w": torch.zeros(3, 2), "b": torch.zeros(3)})
    3
    """
    shapes = {path: list(leaf.shape) for path, leaf in tree.flatten_dict(states).items()}
    counts = {shape[0] if shape else None for shape in shapes.values()}
    if len(counts) != 1 or None in counts:
        raise ValueError(f"population: leaves need one common first axis, got {shapes}")
    (count,) = counts
    return int(count or 0)


def member(states: Tree, index: int | Tensor) -> Tree:
    """Take one member out of a population, or one row out of any stacked tree, as a copy.

    Args:
        states: leaves [members, ...].
        index: which; a 0-d int64 tensor works inside `jit` and `vmap` as well.

    Raises:
        IndexError: a number outside −members … members − 1.
        ValueError: leaves without one common first axis.

    >>> member({"w": torch.arange(3)}, 1)
    {'w': tensor(1)}
    """
    count = size(states)
    if isinstance(index, Tensor):
        return tree.map(lambda leaf: leaf.index_select(0, index.reshape(1)).squeeze(0), states)
    if not -count <= index < count:
        raise IndexError(f"population.member: index {index}, but there are {count} members")
    return tree.map(lambda leaf: leaf[index].clone(), states)


def best(states: Tree, loss: Tensor) -> Tree:
    """Take the member of the smallest loss, the first of equals, as a copy.

    A member whose loss is NaN or infinite, of either sign, is never the best. Where no loss is
    finite there is no best: that is an error, or, inside `jit` and `torch.func` transformations,
    which cannot raise for a value, a member whose floating leaves are all NaN.

    For what should be large, such as an accuracy, give it with a minus.

    Args:
        states: leaves [members, ...].
        loss: [members], floating.

    Raises:
        ValueError: `loss` of another shape, leaves without one common first axis, or no loss that
            is finite.

    >>> best({"w": torch.arange(3)}, torch.tensor([0.5, float("nan"), 0.2]))
    {'w': tensor(2)}
    """
    if loss.shape != (size(states),):
        raise ValueError(
            f"population.best: loss must have the shape [{size(states)}], a number for each "
            f"member, got {list(loss.shape)}"
        )
    index, found = best_row(loss)
    if is_eager() and not found:
        raise ValueError(f"population.best: no loss is finite, got {loss.tolist()}")
    return tree.map(
        lambda leaf: torch.where(found, leaf, torch.nan) if leaf.is_floating_point() else leaf,
        member(states, index),
    )


def ensemble(apply: Callable[..., Tensor], params: Tree, x: Tensor) -> Tensor:
    """Average the probabilities that the members give: softmax of logits, then the mean.

    A member that gives NaN for an example is left out of the mean for it; where all do, the mean is
    NaN. The log-probabilities of an ensemble are the logarithm of this mean, not the mean of
    theirs. Source: Lakshminarayanan et al., 2017.

    Args:
        apply: `(params, x) -> logits [batch, classes]`, that of a `Model`. For a model with buffers
            `lambda both, x: model.apply(*both, x)[0]`, with `(params, buffers)` as `params`.
        params: of the members, leaves [members, ...].
        x: [batch, ...], the same for all.

    Returns:
        Probabilities [batch, classes].

    >>> from fdl import nn, random
    >>> model = nn.linear(2, 3)
    >>> states = create(model, optim.sgd(0.1), random.split(random.key(0), 5))
    >>> ensemble(model.apply, states.params, torch.ones(4, 2)).shape
    torch.Size([4, 3])
    """
    logits = vmap(apply, (0, None))(params, x)
    each = logits.softmax(-1, dtype=at_least_32_bits(logits))
    counts = each.isfinite().all(-1, keepdim=True)
    return (torch.where(counts, each, 0).sum(0) / counts.sum(0)).to(logits.dtype)
