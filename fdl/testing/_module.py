"""Prove that a model equals an `nn.Module`: outputs, buffers, gradients, training."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fdl import random, tree
from fdl._checks import check_at_least_0, check_positive, describe
from fdl._training._checks import as_batch, length
from fdl.data import Batch
from fdl.nn import Model, StatefulModel
from fdl.nn._model import check_model
from fdl.optim._as_optimizer import OptimizerLike, as_optimizer
from fdl.testing._paths import take_values
from fdl.testing._sides import LossFn, MakeOptimizer, Side, of_model, of_module
from fdl.testing._trees import differences, largest_of, listed
from fdl.tree import Tree

# Beside rtol, relative to the largest value: what sums of float64 that cancel are wrong by, as in
# the gradient of a bias before batch normalisation, which is 0.
ROUNDING = 1e-12
GROWTH = 1e3  # of rounding, over steps of training
NOISE = 1e-6  # of the longest way: how far a parameter may move if its gradient is rounding alone


def check_equals_module(
    model: Model | StatefulModel,
    module: nn.Module,
    batch: Any,
    loss: LossFn | tuple[LossFn, LossFn],
    *,
    optimizers: tuple[OptimizerLike, MakeOptimizer] | None = None,
    steps: int = 10,
    names: Mapping[str, str] | None = None,
    rtol: float = 1e-9,
) -> None:
    """Raise unless a model computes and trains as an `nn.Module`, in float64.

    The model gets the module's values by path, and both are compared in turn: paths and shapes;
    outputs and buffers in evaluation and in training; loss and gradients, as those of `backward()`;
    and, with `optimizers`, how parameters move and buffers change in each step of training. All
    stages are reported, those that agree too, and the first step at which training differs. The
    module is copied, not changed.

    A value may differ by `rtol` times itself and 1e-12 times the largest of its leaf, of a gradient
    1e-12 times the largest of all gradients. In training these are 1000 times as large, and
    relative to how far parameters have moved; a parameter whose gradient is rounding alone, like a
    bias before batch normalisation, may be off by 1e-6 of the farthest.

    Args:
        model: the port.
        module: the original; its own values are the start. Its forward takes `x`, as the model's
            `apply` does: of several inputs make one in a small module around it. Submodules in
            evaluation mode, while it is itself in training mode, are frozen and stay so.
        batch: a `Batch` or a pair (x, y), without a mask; floating values are cast to float64.
        loss: a function (prediction, y) for both, as `supervised` takes it; or a pair: that of the
            model, and that of the module.
        optimizers: a pair: that of the model, and a function from the module to its optimizer, such
            as `lambda module: torch.optim.SGD(module.parameters(), lr=0.1)`.
        steps: the number of steps of training, all on the batch.
        names: paths of the model, or beginnings of them, to those in the module, where they differ:
            `{"hidden": "layers.0"}`.
        rtol: relative tolerance.

    Raises:
        AssertionError: they differ; the message names stages, paths and worst values.
        TypeError: an argument is of another type than described.
        ValueError: the model or the module draws random numbers in training, the batch is empty or
            masked, or `names` has a path that the model lacks.

    >>> from fdl import losses, nn, optim
    >>> from torch.nn import GELU, Linear, Sequential
    >>> torch_net = Sequential(Linear(3, 4), GELU(), Linear(4, 2))
    >>> batch = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    >>> net = nn.sequential(nn.linear(3, 4), nn.gelu, nn.linear(4, 2))
    >>> pair = optim.adam(0.1), lambda module: torch.optim.Adam(module.parameters(), lr=0.1)
    >>> check_equals_module(net, torch_net, batch, losses.cross_entropy, optimizers=pair)
    >>> net = nn.sequential(nn.linear(3, 4), nn.relu, nn.linear(4, 2))
    >>> check_equals_module(net, torch_net, batch, losses.cross_entropy)
    Traceback (most recent call last):
    AssertionError: check_equals_module: the model differs from Sequential
      paths and shapes: agree
      outputs in evaluation: differ
    ...
    """
    check_model("check_equals_module", model)
    ours, theirs = _checked_pairs(module, loss, optimizers)
    check_positive("check_equals_module", "steps", steps)
    check_at_least_0("check_equals_module", rtol=rtol)
    batch = _checked_batch(batch)
    twin = copy.deepcopy(module).double()
    params, buffers, paths = take_values(_initial(model), twin, names or {})
    one = of_model(model, params, buffers, batch, *ours)
    other = of_module(twin, module.training, paths, batch, *theirs)
    _check_draws_nothing("model", one)
    _check_draws_nothing("module", other)
    found = {"paths and shapes": [], **_stages(one, other, rtol)}
    if optimizers is not None:
        found[f"{steps} steps of training"] = _training(one, other, params, steps, rtol)
    if any(found.values()):
        lines = [f"{stage}: {'differ' if found[stage] else 'agree'}" + listed(found[stage], "    ")
                 for stage in found]  # fmt: skip
        raise AssertionError(
            f"check_equals_module: the model differs from {type(module).__name__}"
            + "".join(f"\n  {line}" for line in lines)
        )


def _stages(one: Side, other: Side, rtol: float) -> dict[str, list[str]]:
    """Compare what model and module compute, and list the differences by stage."""
    found = {}
    for train, mode in ((False, "evaluation"), (True, "training")):
        (y, buffers), (expected, kept) = one.forward(train, 0), other.forward(train, 0)
        found[f"outputs in {mode}"] = _near(y, expected, rtol)
        found[f"buffers after {mode}"] = _near(buffers, kept, rtol)
    (value, grads), (wanted, slopes) = one.gradients(), other.gradients()
    found["loss"] = _near(value, wanted, rtol)
    found["gradients"] = _near(grads, slopes, rtol, ROUNDING * largest_of(slopes))
    if tree.leaves(slopes) and not largest_of((grads, slopes)):
        found["gradients"].append("all are 0: the loss does not depend on the parameters")
    return found


def _training(one: Side, other: Side, start: Tree, steps: int, rtol: float) -> list[str]:
    """Compare how far parameters have moved, and buffers, until the first step that differs."""
    begin, noisy, way = tree.flatten_dict(start), _noisy(other.gradients()[1]), 0.0
    for step, found, wanted in zip(range(1, steps + 1), one.steps(), other.steps(), strict=False):
        moved, expected = (
            {path: x - begin[path] for path, x in tree.flatten_dict(params).items()}
            for params, _ in (found, wanted)
        )
        way = largest_of(list(expected.values()))
        lines = _near(found[1], wanted[1], rtol, slack=GROWTH)
        for path, x in moved.items():
            atol = (NOISE if path in noisy else ROUNDING) * way
            lines += _near(
                tree.unflatten_dict({path: x}),
                tree.unflatten_dict({path: expected[path]}),
                rtol,
                atol,
                GROWTH,
            )
        if lines:
            return [f"first at step {step}; of parameters, how far they have moved:", *lines]
    return [] if way else ["no parameter has moved: nothing has been compared"]


def _noisy(grads: Tree) -> set[str]:
    """Return the paths of gradients that are rounding, which Adam and others make larger."""
    bound = 100 * ROUNDING * largest_of(grads)
    return {path for path, x in tree.flatten_dict(grads).items() if 0 < largest_of(x) <= bound}


def _near(
    actual: Tree, expected: Tree, rtol: float, atol: float = 0.0, slack: float = 1.0
) -> list[str]:
    """List differences beyond `rtol` and rounding, or these times `slack`."""
    share = ROUNDING / rtol if rtol else 0.0
    return differences(actual, expected, rtol=slack * rtol, atol=atol, of_largest=share)


def _initial(model: Model | StatefulModel) -> tuple[Tree, Tree]:
    """Return parameters and buffers of a model, in float64."""
    initial = tree.cast(model.init(random.key(0)), torch.float64)
    return initial if isinstance(model, StatefulModel) else (initial, {})


def _check_draws_nothing(which: str, side: Side) -> None:
    """Raise unless two calls in training, with other keys and seeds, return equal bits."""
    lines = differences(side.forward(True, 0), side.forward(True, 1), rtol=0, equal_nan=True)
    if lines:
        raise ValueError(
            f"check_equals_module: the {which} draws random numbers in training, or keeps state "
            "between calls: two calls with other keys differ. Set its rates to 0, as in "
            "nn.dropout(0.0) and torch.nn.Dropout(0.0), and compare what it draws by itself"
        )


def _checked_pairs(module: Any, loss: Any, optimizers: Any) -> tuple[tuple[Any, Any], ...]:
    """Return the model's and the module's (loss, optimizer or None)."""
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"check_equals_module: module must be an nn.Module, got {describe(module)}; the order "
            "is (model, module, batch, loss)"
        )
    pair = loss if isinstance(loss, tuple) else (loss, loss)
    if len(pair) != 2 or not all(callable(each) for each in pair):
        raise TypeError(
            "check_equals_module: loss must be a function (prediction, y), or a pair of them, the "
            f"model's and the module's, got {describe(loss)}"
        )
    if optimizers is None:
        return (pair[0], None), (pair[1], None)
    good = type(optimizers) is tuple and len(optimizers) == 2  # no Optimizer, which is a pair too
    if not (good and callable(optimizers[1])):
        raise TypeError(
            "check_equals_module: optimizers must be a pair (optim.sgd(0.1), lambda module: "
            f"torch.optim.SGD(module.parameters(), lr=0.1)), got {describe(optimizers)}"
        )
    opt = as_optimizer("check_equals_module", optimizers[0], "the first of optimizers")
    return (pair[0], opt), (pair[1], optimizers[1])


def _checked_batch(batch: Any) -> Batch:
    """Return a batch in float64, and raise if nothing can be compared on it."""
    batch = as_batch("check_equals_module", batch)
    if isinstance(batch.mask, torch.Tensor):
        raise ValueError(
            "check_equals_module: batch must have no mask, which a module does not take"
        )
    if not length(batch):
        raise ValueError("check_equals_module: batch must have examples, got none")
    cast: Batch = tree.cast(batch, torch.float64)
    return cast
