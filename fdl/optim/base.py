"""The protocol that every optimizer and every transformation of gradients follows.

`init(params) -> state`, `update(grads, state, params) -> (updates, state)`, and
`apply_updates(params, updates)` adds the updates. Nothing is mutated, so an optimizer can be
differentiated, vmapped and compiled.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl import tree
from fdl.tree import Tree

__all__ = [
    "Hyper",
    "Optimizer",
    "Schedule",
    "apply_updates",
    "chain",
    "hyperparams",
    "with_hyperparams",
]

Schedule = Callable[[Tensor], Tensor]  # int64 [] updates done -> the value for the next one
Rate = float | Tensor | Schedule


class Optimizer(NamedTuple):
    """A transformation of gradients, or a chain of them, as two pure functions.

    `update` takes `(grads, state, params, *, value=None, value_fn=None)`, where `value` is the loss
    and `value_fn` maps parameters to it; what has no use for them ignores them.

    >>> from fdl import optim
    >>> opt = optim.sgd(lr=0.1)
    >>> params = {"w": torch.tensor([1.0])}
    >>> updates, state = opt.update({"w": torch.tensor([2.0])}, opt.init(params), params)
    >>> apply_updates(params, updates)
    {'w': tensor([0.8000])}
    """

    init: Callable[[Tree], Tree]
    update: Callable[..., tuple[Tree, Tree]]


class Hyper(NamedTuple):
    """The hyperparameters of one transformation, inside its state.

    >>> from fdl import optim
    >>> optim.scale_by_learning_rate(0.5).init({"w": torch.ones(1)}).hyper.free
    {'lr': tensor(0.5000, dtype=torch.float64)}
    """

    free: dict[str, Tensor]  # float64 []; with_hyperparams replaces them
    scheduled: dict[str, Tensor]  # float64 []; what the schedules say for the next update
    count: Tensor  # type: ignore[assignment]  # int64 [], updates done


def check_rate(caller: str, name: str, rate: Rate, *, low: float = 0.0) -> None:
    """Raise unless a rate is a finite number of at least `low`, a 0-d tensor or a schedule.

    Args:
        caller: opens the message.
        name: of the rate, for the message.
        rate: only of a number is the value looked at.
        low: the least number allowed.

    >>> check_rate("sgd", "lr", 0.1)
    """
    if isinstance(rate, (int, float)):
        if not (math.isfinite(rate) and rate >= low):
            raise ValueError(f"{caller}: {name} must be finite and at least {low:g}, got {rate}")
    elif isinstance(rate, Tensor):
        if rate.ndim:
            raise ValueError(
                f"{caller}: {name} must be a number or a 0-d tensor, got {list(rate.shape)}; for "
                "a population, vmap over the states"
            )
    elif not callable(rate):
        raise TypeError(
            f"{caller}: {name} must be a number, a 0-d tensor or a schedule, got {rate!r}"
        )


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
    device = next((leaf.device for leaf in tree.leaves(params)), torch.device("cpu"))
    free = {
        name: torch.as_tensor(rate, dtype=torch.float64, device=device).clone()
        for name, rate in rates.items()
        if not callable(rate)
    }
    count = torch.zeros((), dtype=torch.int64, device=device)
    return Hyper(free, _scheduled(rates, count), count)


def next_hyper(rates: Mapping[str, Rate], hyper: Hyper) -> Hyper:
    """Count one update more and read the schedules for the next one.

    >>> rates = {"lr": lambda count: 0.1 * 0.5**count}
    >>> next_hyper(rates, init_hyper(rates, {})).scheduled
    {'lr': tensor(0.0500, dtype=torch.float64)}
    """
    count = hyper.count + 1
    return Hyper(hyper.free, _scheduled(rates, count), count)


def _scheduled(rates: Mapping[str, Rate], count: Tensor) -> dict[str, Tensor]:
    # Cloned: a schedule may return one and the same tensor each time.
    return {
        name: torch.as_tensor(rate(count), dtype=torch.float64, device=count.device).clone()
        for name, rate in rates.items()
        if callable(rate)
    }


def rate_of(hyper: Hyper, name: str, like: Tensor) -> Tensor:
    """Read a rate in the dtype of a leaf, since float64 would promote it.

    >>> rate_of(init_hyper({"lr": 0.1}, {}), "lr", torch.ones(1))
    tensor(0.1000)
    """
    rates = hyper.free if name in hyper.free else hyper.scheduled
    return rates[name].to(like.dtype)


def map_grads(f: Callable[..., Any], grads: Tree, *rest: Tree) -> Tree:
    """Map over gradients; where one is `None` the result is `None` as well.

    >>> map_grads(lambda g: -g, {"w": torch.ones(1), "frozen": None})
    {'w': tensor([-1.]), 'frozen': None}
    """
    return tree.map(lambda g, *others: None if g is None else f(g, *others), grads, *rest)


def chain(*parts: Optimizer) -> Optimizer:
    """Apply transformations one after the other; the state is the tuple of their states.

    >>> from fdl import optim
    >>> opt = optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(lr=0.1))
    >>> hyperparams(opt.init({"w": torch.ones(1)}))["max_norm"]
    tensor(1., dtype=torch.float64)
    """

    def init(params: Tree) -> Tree:
        return tuple(part.init(params) for part in parts)

    def update(
        grads: Tree, state: Tree, params: Tree, *, value: Any = None, value_fn: Any = None
    ) -> tuple[Tree, Tree]:
        if len(state) != len(parts):
            raise ValueError(
                f"chain: expected the states of {len(parts)} transformations, got {len(state)}"
            )
        states = []
        for part, old in zip(parts, state, strict=True):
            grads, new = part.update(grads, old, params, value=value, value_fn=value_fn)
            states.append(new)
        return grads, tuple(states)

    return Optimizer(init, update)


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """Add updates to parameters, in the dtype of each parameter; `None` leaves it as it is.

    Raises:
        ValueError: the structures differ (every path is listed).

    >>> apply_updates({"w": torch.ones(1), "frozen": torch.ones(1)},
    ...               {"w": torch.ones(1), "frozen": None})
    {'w': tensor([2.]), 'frozen': tensor([1.])}
    """
    return tree.map(lambda p, u: p if u is None else p + u.to(p.dtype), params, updates)


def _flatten(state: Tree) -> tuple[list[tuple[str, Any]], pytree.TreeSpec]:
    """List (path of the holder, node) down to each `Hyper`, and how to put the nodes together."""
    pairs, spec = pytree.tree_flatten_with_path(state, is_leaf=lambda n: isinstance(n, Hyper))
    # The field `hyper` of a transformation's state says nothing to a reader: leave it out.
    return [
        (tree.dotted(entries[:-1]) if isinstance(node, Hyper) else "", node)
        for entries, node in pairs
    ], spec


def _names(state: Tree) -> dict[str, tuple[str, str, Tensor, bool]]:
    """Name each hyperparameter: bare where that is unique, else with the path of its holder."""
    found = [
        (path, name, value, rates is node.free)
        for path, node in _flatten(state)[0]
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
    is its value for the next update.

    >>> from fdl import optim
    >>> hyperparams(optim.sgd(lr=0.1).init({"w": torch.ones(1)}))
    {'lr': tensor(0.1000, dtype=torch.float64)}
    >>> two = optim.chain(optim.add_decayed_weights(0.1), optim.add_decayed_weights(0.2))
    >>> list(hyperparams(two.init({"w": torch.ones(1)})))
    ['0.weight_decay', '1.weight_decay']
    """
    return {name: value for name, (_, _, value, _) in _names(state).items()}


def with_hyperparams(state: Tree, **values: float | Tensor) -> Tree:
    """Replace hyperparameters in an optimizer's state, by the names `hyperparams` gives.

    The new state has the same form as the old one, so nothing is compiled again. A tensor must
    have the shape of the one it replaces; a number fills it. For names with a dot write
    `with_hyperparams(state, **{"0.lr": 0.1})`.

    Raises:
        ValueError: an absent or schedule-driven name (what can be set is listed), a number that
            is not finite, a tensor of another shape.

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
            check_rate("with_hyperparams", name, value, low=-math.inf)
            value = torch.full_like(old, value)
        elif value.shape != old.shape:
            raise ValueError(
                f"with_hyperparams: {name!r} has the shape {list(old.shape)}, got "
                f"{list(value.shape)}; for a population, vmap over the states"
            )
        # A copy: what the state holds may be donated, and must not be the caller's.
        new[path, bare] = value.to(dtype=old.dtype, device=old.device, copy=True)
    nodes, spec = _flatten(state)
    return pytree.tree_unflatten([_replace(node, path, new) for path, node in nodes], spec)


def _replace(node: Any, path: str, new: Mapping[tuple[str, str], Tensor]) -> Any:
    if not isinstance(node, Hyper):
        return node
    free = {name: new.get((path, name), value) for name, value in node.free.items()}
    return node._replace(free=free)
