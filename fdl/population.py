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
from fdl._compiler._scan import scan
from fdl._modes import is_eager
from fdl._numerics import at_least_32_bits, best_row
from fdl._training import TrainState
from fdl.nn import Model, StatefulModel
from fdl.optim import Optimizer
from fdl.tree import Tree
from fdl.tree._checks import check_tensors

__all__ = ["best", "create", "ensemble", "in_turn", "member", "size"]


def create(
    model: Model | StatefulModel,
    opt: Optimizer,
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
    if keys.ndim != 2 or keys.shape[1] != 2 or not len(keys):
        raise ValueError(
            f"population.create: keys must have the shape [members, 2], got {list(keys.shape)}; "
            "make them with random.split(key, members)"
        )
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


def in_turn(
    f: Callable[..., Tree], in_dims: tuple[int | None, ...] | int = 0
) -> Callable[..., Tree]:
    """Run `f` for one member after the other: `torch.vmap(f, in_dims)`, but as a `scan`.

    With `fdl.jit` it is one program as well. Where a single model keeps the device busy nothing is
    lost, memory for what lies in between is that of one member, and a convolution stays one: under
    `vmap` it has groups, which takes a CPU about twice as long.

    Args:
        f: a pure function of trees of tensors.
        in_dims: for each argument 0, where it has the first axis [members], or None where all
            share it; one number for all.

    Returns:
        A function of the same arguments; every leaf of its result has the first axis [members].

    Raises:
        TypeError: `in_dims` is neither an int nor a tuple; a mapped leaf is no tensor (at call).
        ValueError: an axis other than 0 or None, or none that is 0; at call, a number of arguments
            other than that of `in_dims`, or mapped leaves without one common first axis.

    >>> in_turn(torch.dot, (0, None))(torch.eye(2), torch.tensor([3.0, 4.0]))
    tensor([3., 4.])
    """
    if not isinstance(in_dims, (tuple, int)):
        raise TypeError(f"population.in_turn: in_dims must be 0 or a tuple, got {in_dims!r}")
    if isinstance(in_dims, tuple) and (0 not in in_dims or not {0, None}.issuperset(in_dims)):
        raise ValueError(f"population.in_turn: in_dims must be 0 or None, one of them 0: {in_dims}")
    if isinstance(in_dims, int) and in_dims != 0:
        raise ValueError(f"population.in_turn: in_dims must be 0 or a tuple, got {in_dims}")

    def call(*args: Tree) -> Tree:
        dims = in_dims if isinstance(in_dims, tuple) else (0,) * len(args)
        if len(dims) != len(args):
            raise ValueError(
                f"population.in_turn: in_dims has {len(dims)} entries for {len(args)} arguments"
            )

        mapped = {str(i): arg for i, arg in enumerate(args) if dims[i] == 0}
        check_tensors(tree.leaves(mapped), mapped, "population.in_turn: every mapped leaf")
        shapes = {f"args.{p}": list(leaf.shape) for p, leaf in tree.flatten_dict(mapped).items()}
        if (
            len({tuple(shape[:1]) for shape in shapes.values()} - {()}) != 1
            or [] in shapes.values()
        ):
            raise ValueError(
                "population.in_turn: mapped arguments need one common first axis, the members, got "
                f"{shapes}; in_dims says which are mapped (0) and which all share (None)"
            )

        def one(carry: Tree, row: list[Tree]) -> tuple[Tree, Tree]:
            own = iter(row)
            return carry, f(
                *(arg if dim is None else next(own) for arg, dim in zip(args, dims, strict=True))
            )

        return scan(one, (), list(mapped.values()))[1]

    return call


def size(states: Tree) -> int:
    """Return the number of members.

    Raises:
        ValueError: there are no leaves, or they have no common first axis.

    >>> size({"w": torch.zeros(3, 2), "b": torch.zeros(3)})
    3
    """
    shapes = {path: list(leaf.shape) for path, leaf in tree.flatten_dict(states).items()}
    counts = {shape[0] if shape else None for shape in shapes.values()}
    if len(counts) != 1 or None in counts:
        raise ValueError(
            f"population: leaves need one common first axis, the members, got {shapes}"
        )
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
    count = size(states)
    if isinstance(index, Tensor):
        return tree.map(lambda leaf: leaf.index_select(0, index.reshape(1)).squeeze(0), states)
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
    if loss.shape != (size(states),):
        raise ValueError(
            f"population.best: loss must have the shape [{size(states)}], one number per member, "
            f"got {list(loss.shape)}"
        )
    index, any_finite = best_row(loss)
    if is_eager() and not any_finite:
        raise ValueError(f"population.best: no loss is finite, got {loss.tolist()}")
    return tree.map(
        lambda leaf: torch.where(any_finite, leaf, torch.nan) if leaf.is_floating_point() else leaf,
        member(states, index),
    )


def ensemble(apply: Callable[..., Tensor], params: Tree, x: Tensor) -> Tensor:
    """Average the members' probabilities: the softmax of the logits, then the mean over members.

    If a member's probabilities for an example contain NaN, the member is left out of that mean; if
    all do, the mean is NaN. The log-probabilities of an ensemble are the logarithm of this mean,
    not the mean of the members' log-probabilities.

    Args:
        apply: `(params, x) -> logits [batch, classes]`, such as the `apply` of a `Model`. For a
            model with buffers, pass `lambda both, x: model.apply(*both, x)[0]` and
            `(params, buffers)` as `params`.
        params: the members' parameters, leaves `[members, ...]`.
        x: `[batch, ...]`, the same for all members.

    Returns:
        Probabilities `[batch, classes]`.

    Source: Lakshminarayanan et al., Simple and Scalable Predictive Uncertainty Estimation using
    Deep Ensembles, 2017, https://arxiv.org/abs/1612.01474

    >>> from fdl import nn, random
    >>> model = nn.linear(2, 3)
    >>> states = create(model, optim.sgd(0.1), random.split(random.key(0), 5))
    >>> ensemble(model.apply, states.params, torch.ones(4, 2)).shape
    torch.Size([4, 3])
    """
    logits = vmap(apply, (0, None))(params, x)
    probabilities = logits.softmax(-1, dtype=at_least_32_bits(logits))
    counts = probabilities.isfinite().all(-1, keepdim=True)
    return (torch.where(counts, probabilities, 0).sum(0) / counts.sum(0)).to(logits.dtype)
