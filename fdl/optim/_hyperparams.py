"""Hyperparameters as tensors in the state of an optimizer: to read, replace, and vmap over."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses import FakeTensor

from fdl import tree
from fdl._kinds import register
from fdl._modes import is_tracing
from fdl.tree import Tree
from fdl.tree._paths import dotted

Schedule = Callable[[Tensor], Tensor]  # updates done, float64 [] -> value for the next update
ScalarOrSchedule = float | Tensor | Schedule


@register
class Hyper(NamedTuple):
    """The hyperparameters of one transformation, inside its state.

    >>> from fdl import optim
    >>> optim.scale_by_learning_rate(0.5).init({"w": torch.ones(1)}).hyper.free
    {'lr': tensor(0.5000, dtype=torch.float64)}
    """

    free: dict[str, Tensor]  # float64 []; with_hyperparams replaces them
    scheduled: dict[str, Tensor]  # float64 []; values of the schedules at the next update, to read
    count: Tensor  # type: ignore[assignment]  # int64 [], updates done


Range = tuple[str, Callable[[float], bool]]  # the condition in words, and as a predicate

AT_LEAST_0: Range = ("at least 0", lambda x: x >= 0)
BELOW_1: Range = ("in [0, 1)", lambda x: 0 <= x < 1)
UP_TO_1: Range = ("in [0, 1]", lambda x: 0 <= x <= 1)
# The ranges of this library's own rates, where they are not AT_LEAST_0.
RANGES: dict[str, Range] = {
    **dict.fromkeys(["beta1", "beta2", "beta3", "decay", "etaminus"], BELOW_1),
    **dict.fromkeys(["rho", "slow_step"], UP_TO_1),
    "beta": ("in (0, 1)", lambda x: 0 < x < 1),
    "etaplus": ("above 1", lambda x: x > 1),
    "d": ("at least 1", lambda x: x >= 1),
    "beta2_decay": ("at most 0", lambda x: x <= 0),
}


def check_rate(caller: str, name: str, rate: ScalarOrSchedule, allowed: Range = AT_LEAST_0) -> None:
    """Raise unless a rate is a finite number in its range, a 0-d tensor or a schedule.

    Args:
        caller: function to name in the message.
        name: name of the hyperparameter.
        rate: the values of a schedule, and of a tensor that is traced or inside a transformation,
            are not checked.
        allowed: the range.

    >>> check_rate("sgd", "lr", 0.1)
    """
    if isinstance(rate, Tensor):
        if rate.ndim:
            raise ValueError(
                f"{caller}: {name} must be a number or a 0-d tensor, got {list(rate.shape)}; for "
                "a population, vmap over the states"
            )
        check_range(caller, name, allowed, *known_values(rate))
    elif isinstance(rate, (int, float)):
        check_range(caller, name, allowed, rate)
    elif not callable(rate):
        raise TypeError(
            f"{caller}: {name} must be a number, a 0-d tensor or a schedule, got {rate!r}"
        )


def named_rates(caller: str, argument: str, values: tuple[Any, ...], *names: str) -> dict[str, Any]:
    """Name the rates that are given together, such as `betas`.

    >>> named_rates("adam", "betas", (0.9, 0.999), "beta1", "beta2")
    {'beta1': 0.9, 'beta2': 0.999}
    """
    if not isinstance(values, tuple | list) or len(values) != len(names):
        raise TypeError(
            f"{caller}: {argument} must be a tuple of {len(names)} rates, got {values!r}"
        )
    return dict(zip(names, values, strict=True))


def check_range(caller: str, name: str, allowed: Range, *values: float) -> None:
    """Raise unless each value is finite and in a range.

    Args:
        caller: function to name in the message.
        name: name of the hyperparameter.
        allowed: the range.
        *values: the values to check.

    >>> check_range("sgd", "lr", AT_LEAST_0, 0.1, 0.2)
    """
    words, contains = allowed
    for value in values:
        if not (math.isfinite(value) and contains(value)):
            raise ValueError(f"{caller}: {name} must be finite and {words}, got {value}")


def known_values(x: Tensor) -> list[float]:
    """List the values of a tensor; empty if it is traced or in a transformation such as `vmap`.

    >>> known_values(torch.tensor([1.0, 2.0]))
    [1.0, 2.0]
    """
    if torch.compiler.is_compiling() or is_tracing():
        return []
    if torch._C._functorch.is_functorch_wrapped_tensor(x) or isinstance(x, FakeTensor) or x.is_meta:
        return []
    return x.detach().reshape(-1).tolist()


def is_zero(rate: ScalarOrSchedule) -> bool:
    """Return True for the Python number 0, which leaves out the term it would scale.

    >>> is_zero(0.0), is_zero(torch.tensor(0.0))
    (True, False)
    """
    return isinstance(rate, (int, float)) and rate == 0


def init_hyper(rates: Mapping[str, ScalarOrSchedule], params: Tree) -> Hyper:
    """Put rates into a state, on the device of the parameters.

    >>> init_hyper({"lr": lambda count: 0.1 * 0.5**count}, {}).scheduled
    {'lr': tensor(0.1000, dtype=torch.float64)}
    """
    device = device_of(params)
    count = torch.zeros((), dtype=torch.int64, device=device)
    return Hyper(_as_tensors(rates, device), _scheduled(rates, count), count)


def device_of(params: Tree) -> torch.device:
    """Return the device of the parameters, on which a state lies as well; the CPU without any.

    >>> device_of({"w": torch.ones(1)})
    device(type='cpu')
    """
    return next((leaf.device for leaf in tree.leaves(params)), torch.device("cpu"))


def rates_of(hyper: Hyper) -> dict[str, Tensor]:
    """Read every rate that the state reports, free or scheduled.

    >>> rates_of(init_hyper({"lr": 0.5}, {}))
    {'lr': tensor(0.5000, dtype=torch.float64)}
    """
    return {**hyper.free, **hyper.scheduled}


def rates_now(rates: Mapping[str, ScalarOrSchedule], hyper: Hyper) -> dict[str, Tensor]:
    """Return every rate for this update: numbers from the state, schedules at its count.

    The value that the state reports for a schedule is not used: the run may have been resumed with
    another schedule, a longer one for example.

    >>> hyper = init_hyper({"lr": lambda count: 0.1 * 0.5**count}, {})
    >>> rates_now({"lr": lambda count: 0.3 * 0.5**count}, hyper)
    {'lr': tensor(0.3000, dtype=torch.float64)}
    """
    return {**_numbers(rates, hyper), **_scheduled(rates, hyper.count)}


def next_hyper(rates: Mapping[str, ScalarOrSchedule], hyper: Hyper) -> Hyper:
    """Count one more update, and report the values of the schedules for the next one.

    >>> rates = {"lr": lambda count: 0.1 * 0.5**count}
    >>> next_hyper(rates, init_hyper(rates, {})).scheduled
    {'lr': tensor(0.0500, dtype=torch.float64)}
    """
    count = hyper.count + 1
    return Hyper(_numbers(rates, hyper), _scheduled(rates, count), count)


def _numbers(rates: Mapping[str, ScalarOrSchedule], hyper: Hyper) -> dict[str, Tensor]:
    """Take numbers from the state; from `rates` where the state followed a schedule."""
    free = {name: value for name, value in hyper.free.items() if not callable(rates.get(name))}
    return free | _as_tensors(
        {name: rate for name, rate in rates.items() if name not in free}, hyper.count.device
    )


def _as_tensors(rates: Mapping[str, ScalarOrSchedule], device: torch.device) -> dict[str, Tensor]:
    return {
        name: torch.as_tensor(rate, dtype=torch.float64, device=device).clone()
        for name, rate in rates.items()
        if not callable(rate)
    }


def _scheduled(rates: Mapping[str, ScalarOrSchedule], count: Tensor) -> dict[str, Tensor]:
    # In float64, since PyTorch computes 0.9**count in float32 if the count is int64. Cloned, since
    # a schedule may return the same tensor each time.
    return {
        name: torch.as_tensor(
            rate(count.double()), dtype=torch.float64, device=count.device
        ).clone()
        for name, rate in rates.items()
        if callable(rate)
    }


def flatten_to_hyper(state: Tree) -> tuple[list[tuple[str, Any]], pytree.TreeSpec]:
    """Flatten a state down to each `Hyper`: pairs (path of the holder, node), and the tree spec.

    >>> from fdl import optim
    >>> pairs, _ = flatten_to_hyper(optim.sgd(0.1, 0.9).init({"w": torch.ones(1)}))
    >>> [path for path, node in pairs if isinstance(node, Hyper)]
    ['0', '1']
    """
    pairs, spec = pytree.tree_flatten_with_path(state, is_leaf=lambda n: isinstance(n, Hyper))
    # The last entry of the path is the field `hyper`, which tells a reader nothing: leave it out.
    return [
        (dotted(entries[:-1]) if isinstance(node, Hyper) else "", node) for entries, node in pairs
    ], spec


def _names(state: Tree) -> dict[str, tuple[str, str, Tensor, bool]]:
    """Map each hyperparameter, by name or if that is not unique by path, to what is known of it."""
    entries = [
        (path, name, value, rates is node.free)
        for path, node in flatten_to_hyper(state)[0]
        if isinstance(node, Hyper)
        for rates in (node.free, node.scheduled)
        for name, value in rates.items()
    ]
    names = [name for _, name, _, _ in entries]
    return {
        name if names.count(name) == 1 else f"{path}.{name}": (path, name, value, free)
        for path, name, value, free in entries
    }


def hyperparams(state: Tree) -> dict[str, Tensor]:
    """Read every hyperparameter of an optimizer's state: float64 0-d tensors by name.

    A name that occurs more than once is prefixed with its path in the state. For a schedule the
    value is that of the next update, as computed by the update that made this state: another
    schedule takes effect at once, and is reported from then on. The tensors are copies.

    >>> from fdl import optim
    >>> hyperparams(optim.sgd(lr=0.1).init({"w": torch.ones(1)}))
    {'lr': tensor(0.1000, dtype=torch.float64)}
    >>> two = optim.chain(optim.add_decayed_weights(0.1), optim.add_decayed_weights(0.2))
    >>> list(hyperparams(two.init({"w": torch.ones(1)})))
    ['0.weight_decay', '1.weight_decay']
    """
    return {name: value.clone() for name, (_, _, value, _) in _names(state).items()}


def with_hyperparams(state: Tree, **values: float | Tensor) -> Tree:
    """Replace hyperparameters in an optimizer's state, by the names that `hyperparams` returns.

    The new state has the structure, shapes and dtypes of the old one, so nothing is compiled again.
    A tensor must have the shape of the one it replaces; a number fills it. For names with a dot
    write `with_hyperparams(state, **{"0.lr": 0.1})`.

    A state does not say which optimizer made it, so ranges go by name: that of the rate of this
    name in `fdl.optim`, else at least 0. A state that already holds a value outside that range
    belongs to an optimizer of your own; then a value only has to be finite.

    Raises:
        ValueError: a name that is absent or follows a schedule (those that can be set are listed),
            a number out of its range, a tensor of another shape.

    >>> from fdl import optim
    >>> state = optim.sgd(lr=0.1).init({"w": torch.ones(1)})
    >>> hyperparams(with_hyperparams(state, lr=0.05))
    {'lr': tensor(0.0500, dtype=torch.float64)}
    """
    names = _names(state)
    settable = [name for name, (_, _, _, free) in names.items() if free]
    new: dict[tuple[str, str], Tensor] = {}
    for name, value in values.items():
        if name not in settable:
            why = "follows a schedule" if name in names else "is not in this state"
            raise ValueError(f"with_hyperparams: {name!r} {why}; can be set: {settable}")
        path, bare, old, _ = names[name]
        allowed = _range_of(bare, old)
        if not isinstance(value, Tensor):
            check_rate("with_hyperparams", bare, value, allowed)
            value = torch.full_like(old, value)
        elif value.shape != old.shape:
            raise ValueError(
                f"with_hyperparams: {name!r} has the shape {list(old.shape)}, got "
                f"{list(value.shape)}; for a population, vmap over the states"
            )
        check_range("with_hyperparams", bare, allowed, *known_values(value))
        # A copy: the state may be donated, and its memory must not be the caller's.
        new[path, bare] = value.to(dtype=old.dtype, device=old.device, copy=True)
    nodes, spec = flatten_to_hyper(state)
    return pytree.tree_unflatten([_replace(node, path, new) for path, node in nodes], spec)


def _range_of(name: str, old: Tensor) -> Range:
    """Look up the range of a name, unless the value in the state shows that it has another one."""
    words, contains = RANGES.get(name, AT_LEAST_0)
    if all(map(contains, known_values(old))):
        return words, contains
    return "a number", math.isfinite


def _replace(node: Any, path: str, new: Mapping[tuple[str, str], Tensor]) -> Any:
    if not isinstance(node, Hyper):
        return node
    free = {name: new.get((path, name), value) for name, value in node.free.items()}
    return node._replace(free=free)
