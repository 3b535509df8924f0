"""Hyperparameters are tensors in the state of an optimizer: to read, to replace, to vmap over."""

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

Schedule = Callable[[Tensor], Tensor]  # float64 [] updates done -> the value for the next one
Rate = float | Tensor | Schedule


@register
class Hyper(NamedTuple):
    """The hyperparameters of one transformation, inside its state.

    >>> from fdl import optim
    >>> optim.scale_by_learning_rate(0.5).init({"w": torch.ones(1)}).hyper.free
    {'lr': tensor(0.5000, dtype=torch.float64)}
    """

    free: dict[str, Tensor]  # float64 []; with_hyperparams replaces them
    scheduled: dict[str, Tensor]  # float64 []; what the schedules say of the next update, to read
    count: Tensor  # type: ignore[assignment]  # int64 [], updates done


# What a number must be, where that is not "at least 0".
_UNIT = ("in [0, 1)", lambda x: 0 <= x < 1)
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    **dict.fromkeys(["beta1", "beta2", "beta3", "decay", "etaminus"], _UNIT),
    "rho": ("in [0, 1]", lambda x: 0 <= x <= 1),
    "slow_step": ("in [0, 1]", lambda x: 0 <= x <= 1),
    "beta": ("in (0, 1)", lambda x: 0 < x < 1),
    "etaplus": ("above 1", lambda x: x > 1),
    "d": ("at least 1", lambda x: x >= 1),
    "beta2_decay": ("at most 0", lambda x: x <= 0),
}


def check_rate(caller: str, name: str, rate: Rate) -> None:
    """Raise unless a rate is a finite number in the range of its name, a 0-d tensor or a schedule.

    Args:
        caller: opens the message.
        name: of the hyperparameter, which also says its range: at least 0 if nothing else.
        rate: not looked at are the values of a schedule, and of a tensor that is traced or in a
            transformation.

    >>> check_rate("sgd", "lr", 0.1)
    """
    if isinstance(rate, Tensor):
        if rate.ndim:
            raise ValueError(
                f"{caller}: {name} must be a number or a 0-d tensor, got {list(rate.shape)}; for "
                "a population, vmap over the states"
            )
        check_range(caller, name, *known_values(rate))
    elif isinstance(rate, (int, float)):
        check_range(caller, name, rate)
    elif not callable(rate):
        raise TypeError(
            f"{caller}: {name} must be a number, a 0-d tensor or a schedule, got {rate!r}"
        )


def check_range(caller: str, name: str, *values: float) -> None:
    """Raise unless each value is finite and in the range of its name.

    >>> check_range("sgd", "lr", 0.1, 0.2)
    """
    words, allowed = _RANGES.get(name, ("at least 0", lambda x: x >= 0))
    for value in values:
        if not (-math.inf < value < math.inf and allowed(value)):  # NaN is in no range
            raise ValueError(f"{caller}: {name} must be finite and {words}, got {value}")


def known_values(x: Tensor) -> list[float]:
    """List the values of a tensor; none where it is traced, or in a transformation such as `vmap`.

    >>> known_values(torch.tensor([1.0, 2.0]))
    [1.0, 2.0]
    """
    if torch.compiler.is_compiling() or is_tracing():
        return []
    if torch._C._functorch.is_functorch_wrapped_tensor(x) or isinstance(x, FakeTensor) or x.is_meta:
        return []
    return x.detach().reshape(-1).tolist()


def is_zero(rate: Rate) -> bool:
    """Say whether a rate is the Python number 0, which leaves out what it would scale.

    >>> is_zero(0.0), is_zero(torch.tensor(0.0))
    (True, False)
    """
    return isinstance(rate, (int, float)) and rate == 0


def init_hyper(rates: Mapping[str, Rate], params: Tree) -> Hyper:
    """Put rates into a state, on the device of the parameters.

    >>> init_hyper({"lr": lambda count: 0.1 * 0.5**count}, {}).scheduled
    {'lr': tensor(0.1000, dtype=torch.float64)}
    """
    device = device_of(params)
    count = torch.zeros((), dtype=torch.int64, device=device)
    return Hyper(_as_tensors(rates, device), _scheduled(rates, count), count)


def device_of(params: Tree) -> torch.device:
    """Say where the parameters lie, and so what a state holds besides; the CPU if there are none.

    >>> device_of({"w": torch.ones(1)})
    device(type='cpu')
    """
    return next((leaf.device for leaf in tree.leaves(params)), torch.device("cpu"))


def rates_of(hyper: Hyper) -> dict[str, Tensor]:
    """Read every rate as the state reports it, free or scheduled.

    >>> rates_of(init_hyper({"lr": 0.5}, {}))
    {'lr': tensor(0.5000, dtype=torch.float64)}
    """
    return {**hyper.free, **hyper.scheduled}


def rates_now(rates: Mapping[str, Rate], hyper: Hyper) -> dict[str, Tensor]:
    """Give every rate for this update: numbers from the state, schedules at its count.

    What the state reports of a schedule is not used, as it may be another one's: that of a run
    which is resumed with a longer schedule, say.

    >>> hyper = init_hyper({"lr": lambda count: 0.1 * 0.5**count}, {})
    >>> rates_now({"lr": lambda count: 0.3 * 0.5**count}, hyper)
    {'lr': tensor(0.3000, dtype=torch.float64)}
    """
    return {**_numbers(rates, hyper), **_scheduled(rates, hyper.count)}


def next_hyper(rates: Mapping[str, Rate], hyper: Hyper) -> Hyper:
    """Count one update more, and report what the schedules say for the next one.

    >>> rates = {"lr": lambda count: 0.1 * 0.5**count}
    >>> next_hyper(rates, init_hyper(rates, {})).scheduled
    {'lr': tensor(0.0500, dtype=torch.float64)}
    """
    count = hyper.count + 1
    return Hyper(_numbers(rates, hyper), _scheduled(rates, count), count)


def _numbers(rates: Mapping[str, Rate], hyper: Hyper) -> dict[str, Tensor]:
    """Take the numbers of the state, and the code's where the state had a schedule."""
    free = {name: value for name, value in hyper.free.items() if not callable(rates.get(name))}
    return free | _as_tensors(
        {name: rate for name, rate in rates.items() if name not in free}, hyper.count.device
    )


def _as_tensors(rates: Mapping[str, Rate], device: torch.device) -> dict[str, Tensor]:
    return {
        name: torch.as_tensor(rate, dtype=torch.float64, device=device).clone()
        for name, rate in rates.items()
        if not callable(rate)
    }


def _scheduled(rates: Mapping[str, Rate], count: Tensor) -> dict[str, Tensor]:
    # In float64, since PyTorch computes 0.9**count of an int64 count in float32. Cloned, since a
    # schedule may return one and the same tensor each time.
    return {
        name: torch.as_tensor(
            rate(count.double()), dtype=torch.float64, device=count.device
        ).clone()
        for name, rate in rates.items()
        if callable(rate)
    }


def flatten_to_hyper(state: Tree) -> tuple[list[tuple[str, Any]], pytree.TreeSpec]:
    """List (path of the holder, node) down to each `Hyper`, and how to put the nodes together.

    >>> from fdl import optim
    >>> pairs, _ = flatten_to_hyper(optim.sgd(0.1, 0.9).init({"w": torch.ones(1)}))
    >>> [path for path, node in pairs if isinstance(node, Hyper)]
    ['0', '1']
    """
    pairs, spec = pytree.tree_flatten_with_path(state, is_leaf=lambda n: isinstance(n, Hyper))
    # The field `hyper` of a transformation's state says nothing to a reader: leave it out.
    return [
        (dotted(entries[:-1]) if isinstance(node, Hyper) else "", node) for entries, node in pairs
    ], spec


def _names(state: Tree) -> dict[str, tuple[str, str, Tensor, bool]]:
    """Name each hyperparameter: bare where that is unique, else with the path of its holder."""
    found = [
        (path, name, value, rates is node.free)
        for path, node in flatten_to_hyper(state)[0]
        if isinstance(node, Hyper)
        for rates in (node.free, node.scheduled)
        for name, value in rates.items()
    ]
    bare = [name for _, name, _, _ in found]
    return {
        name if bare.count(name) == 1 else f"{path}.{name}": (path, name, value, free)
        for path, name, value, free in found
    }


def hyperparams(state: Tree) -> dict[str, Tensor]:
    """Read every hyperparameter of an optimizer's state: float64 0-d tensors by name.

    A name that occurs more than once is given with its path in the state. What a schedule drives
    is its value for the next update, as of the update that made this state: another schedule takes
    effect at once, and is reported from then on. The tensors are copies.

    >>> from fdl import optim
    >>> hyperparams(optim.sgd(lr=0.1).init({"w": torch.ones(1)}))
    {'lr': tensor(0.1000, dtype=torch.float64)}
    >>> two = optim.chain(optim.add_decayed_weights(0.1), optim.add_decayed_weights(0.2))
    >>> list(hyperparams(two.init({"w": torch.ones(1)})))
    ['0.weight_decay', '1.weight_decay']
    """
    return {name: value.clone() for name, (_, _, value, _) in _names(state).items()}


def with_hyperparams(state: Tree, **values: float | Tensor) -> Tree:
    """Replace hyperparameters in an optimizer's state, by the names `hyperparams` gives.

    The new state has the same form as the old one, so nothing is compiled again. A tensor must
    have the shape of the one it replaces; a number fills it. For names with a dot write
    `with_hyperparams(state, **{"0.lr": 0.1})`.

    Raises:
        ValueError: an absent or schedule-driven name (what can be set is listed), a number out of
            its range, a tensor of another shape.

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
        if not isinstance(value, Tensor):
            check_rate("with_hyperparams", bare, value)
            value = torch.full_like(old, value)
        elif value.shape != old.shape:
            raise ValueError(
                f"with_hyperparams: {name!r} has the shape {list(old.shape)}, got "
                f"{list(value.shape)}; for a population, vmap over the states"
            )
        check_range("with_hyperparams", bare, *known_values(value))
        # A copy: what the state holds may be donated, and must not be the caller's.
        new[path, bare] = value.to(dtype=old.dtype, device=old.device, copy=True)
    nodes, spec = flatten_to_hyper(state)
    return pytree.tree_unflatten([_replace(node, path, new) for path, node in nodes], spec)


def _replace(node: Any, path: str, new: Mapping[tuple[str, str], Tensor]) -> Any:
    if not isinstance(node, Hyper):
        return node
    free = {name: new.get((path, name), value) for name, value in node.free.items()}
    return node._replace(free=free)
