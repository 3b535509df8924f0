"""Transformations made from the maths of one leaf, and chains of transformations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor

from fdl import tree
from fdl._checks import check_dict, check_function
from fdl._modes import is_eager
from fdl.optim._as_optimizer import OptimizerLike, as_optimizer
from fdl.optim._base import (
    Optimizer,
    State,
    check_floating,
    fits,
    in_32_bits,
    match_grads,
    upcast,
)
from fdl.optim._foreach import map_columns
from fdl.optim._hyperparams import (
    AT_LEAST_0,
    Range,
    ScalarOrSchedule,
    check_rate,
    init_hyper,
    next_hyper,
    rates_now,
)
from fdl.optim._leaves import Leaves, NotElementwise
from fdl.tree import Tree
from fdl.tree._map import match
from fdl.tree._structure import flatten, unflatten

Result = tuple[Tensor, dict[str, Tensor]]  # of a rule: the update, and the new slots by name


def leafwise(
    name: str,
    rule: Callable[..., Result],
    rates: Mapping[str, ScalarOrSchedule],
    slots: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ranges: Mapping[str, Range] | None = None,
) -> Optimizer:
    """Make a transformation from the maths of one leaf.

    `rule(g, p, t, **slots, **rates)` returns the update and the new slots. `t`, the number of this
    update counted from 1, and the rates are float64 0-d tensors: PyTorch's type promotion then
    keeps the dtype of a leaf, and `1 - beta2**t` is exact. For the same reason a 0-d leaf is passed
    to the rule as `[1]`.

    Args:
        name: name of the optimizer, with which its error messages begin.
        rule: a pure function; it is not called for a gradient that is None. Eagerly, an elementwise
            rule is called once for many leaves, with tensors that stand for those of all leaves,
            and each operation runs for all of them in one of torch's foreach functions.
        rates: hyperparameters by name: numbers, 0-d tensors or schedules.
        slots: per-parameter state by name, each a function from a leaf to its initial value.
        ranges: ranges of rates, in words and as a predicate:
            `{"momentum": ("in [0, 1)", lambda x: 0 <= x < 1)}`. The others must be at least 0.

    Raises:
        ValueError: a rate out of its range; (at init and update) a leaf or a gradient that is not
            floating, gradients of another structure or shape (each path is listed).

    >>> import torch
    >>> momentum = leafwise(
    ...     "momentum",
    ...     lambda g, p, t, m, beta1: (beta1 * m + g, {"m": beta1 * m + g}),
    ...     {"beta1": 0.9},
    ...     {"m": torch.zeros_like},
    ... )
    >>> params = {"w": torch.ones(1)}
    >>> momentum.update(params, momentum.init(params), params)[0]
    {'w': tensor([1.])}
    """
    check_dict(name, "rates", rates, "a dict from names to rates")
    check_dict(name, "slots", slots or {}, "a dict from names to functions of a leaf")
    check_dict(name, "ranges", ranges or {}, "a dict from names of rates to their ranges")
    check_function(name, "rule", rule)
    for rate_name, rate in rates.items():
        check_rate(name, rate_name, rate, (ranges or {}).get(rate_name, AT_LEAST_0))
    initial = slots or {}

    def init(params: Tree) -> State:
        check_floating(params, name)
        return State(
            init_hyper(rates, params), {slot: tree.map(f, params) for slot, f in initial.items()}
        )

    def update(grads: Tree, state: State, params: Tree, **extra: Any) -> tuple[Tree, State]:
        updates, (new,) = _apply_links([link], grads, [state], params)
        return updates, new

    link, optimizer = Link(name, rule, rates, initial), _in_32_bits_by_leaf(init, update)
    if is_eager():  # Dynamo loses objects with weak references
        _LINKS[optimizer.update] = link
    return optimizer


def _in_32_bits_by_leaf(
    init: Callable[[Tree], Tree], update: Callable[..., tuple[Tree, Tree]]
) -> Optimizer:
    """Equal `in_32_bits` for an `update` by `apply_rules`, without its passes over trees."""
    wide = in_32_bits(init, update)

    def step(grads: Tree, state: Tree, params: Tree, **extra: Any) -> tuple[Tree, Tree]:
        return (update if is_eager() else wide.update)(grads, state, params, **extra)

    return Optimizer(wide.init, step)


class Link(NamedTuple):
    """The arguments of `leafwise`, with which `chain` applies several transformations at once."""

    name: str
    rule: Callable[..., Result]
    rates: Mapping[str, ScalarOrSchedule]
    slots: Mapping[str, Callable[[Tensor], Tensor]]


_LINKS: WeakKeyDictionary[Callable[..., Any], Link] = WeakKeyDictionary()  # by `update`


def _apply_links(
    links: Sequence[Link], grads: Tree, states: Sequence[State], params: Tree
) -> tuple[Tree, list[State]]:
    """Update with transformations made by `leafwise`, all of them leaf by leaf if they can be."""
    for link, state in zip(links, states, strict=True):
        _check_state(link, state)
    steps = [
        Step(
            link.name,
            link.rule,
            {slot: state.slots[slot] for slot in link.slots},
            state.hyper.count,
            rates_now(link.rates, state.hyper),
        )
        for link, state in zip(links, states, strict=True)
    ]
    applied = None
    with suppress(NotElementwise):
        applied = apply_rules(steps, grads, params)
    if applied is None:  # some of them may be
        return _one_after_another(links).update(grads, states, params)
    updates, slots = applied
    hypers = [next_hyper(link.rates, s.hyper) for link, s in zip(links, states, strict=True)]
    return updates, [*map(State, hypers, slots)]


def _check_state(link: Link, state: Any) -> None:
    """Raise unless the state has the slots of a transformation, and no rate that it lacks."""
    if isinstance(state, State):
        rates = {*state.hyper.free, *state.hyper.scheduled} - {*link.rates}
        if state.slots.keys() == link.slots.keys() and not rates:
            return
        got = f"one with {', '.join([*state.slots, *sorted(rates)]) or 'no slots'}"
    else:
        got = type(state).__name__
    expected = f"one with {', '.join(link.slots) or 'no slots'}"
    raise ValueError(
        f"{link.name}: the state is that of another optimizer: expected {expected}, got {got}; "
        "opt.init(params) makes a new one"
    )


def _one_after_another(links: Sequence[Link]) -> Optimizer:
    def update(
        grads: Tree, states: Sequence[State], params: Tree, **extra: Any
    ) -> tuple[Tree, list[State]]:
        new: list[State] = []
        for link, state in zip(links, states, strict=True):
            grads, own = _apply_links([link], grads, [state], params)
            new += own
        return grads, new

    return in_32_bits(lambda params: params, update)


class Step(NamedTuple):
    """A rule, see `leafwise`, with what it is applied to in one update."""

    name: str  # of the optimizer, with which error messages begin
    rule: Callable[..., Result]
    slots: Mapping[str, Tree]  # trees like the parameters
    count: Tensor  # type: ignore[assignment]  # int64 [], updates done
    scalars: Mapping[str, Tensor]  # further arguments of the rule, float64 [], such as the rates


def apply_rules(
    steps: Sequence[Step], grads: Tree, params: Tree
) -> tuple[Tree, list[dict[str, Tree]]]:
    """Apply rules one after another to each leaf; return updates, and the new slots of each rule.

    Everything is computed in at least 32 bits, and updates are rounded once, to the dtypes of the
    parameters.

    Args:
        steps: rules, at least one.
        grads: gradients; the leaves where one is None stay as they are, and so do their slots.
        params: the parameters.

    Raises:
        NotElementwise: of several rules, one has to be applied leaf by leaf.
    """
    leaves, structure = flatten(params)
    columns = [match(params, grads, f"{steps[0].name}: grads", structure), leaves]
    for step in steps:
        for slot, values in step.slots.items():
            columns.append(match(params, values, f"{step.name}: {slot}", structure))
    times = [(step.count + 1).double() for step in steps]

    def apply(g: Any, p: Tensor, *kept: Tensor) -> tuple[Any, ...]:
        if g is None:
            return g, *kept
        if not fits(g, p):
            match_grads(grads, params, steps[0].name)  # raises with every path
        wide, rest, new = upcast(p), iter(kept), []
        for step, t in zip(steps, times, strict=True):
            # A file of an earlier version may hold slots of 16 bits.
            old = {slot: upcast(next(rest)) for slot in step.slots}
            with_axis = {slot: _with_axis(x, wide) for slot, x in old.items()}
            operands = _with_axis(g.to(wide.dtype), wide), _with_axis(wide, wide), t
            u, slots = step.rule(*operands, **with_axis, **step.scalars)
            g = u.to(wide.dtype).reshape_as(wide)
            new += [slots[slot].to(x.dtype).reshape_as(x) for slot, x in old.items()]
        return g.to(p.dtype), *new

    results = map_columns(apply, *columns, together=len(steps) > 1) or [[], *columns[2:]]
    updates, *new = [unflatten(column, structure) for column in results]
    trees = iter(new)
    return updates, [{slot: next(trees) for slot in step.slots} for step in steps]


def _with_axis(x: Tensor, leaf: Tensor) -> Tensor:
    """Add an axis to a tensor of a 0-d leaf, so that a float64 rate does not promote it."""
    if type(leaf) is Leaves:  # which are not 0-d
        return x
    return x.reshape(1) if leaf.ndim == 0 and x.dtype == leaf.dtype and x.ndim == 0 else x


def chain(*parts: OptimizerLike) -> Optimizer:
    """Apply transformations one after another; the state is the tuple of their states.

    Raises:
        TypeError: one of `parts` is not an optimizer.
        ValueError: (at update) the state is that of another number of transformations.

    >>> import torch
    >>> from fdl import optim
    >>> opt = optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(lr=0.1))
    >>> optim.hyperparams(opt.init({"w": torch.ones(1)}))["max_norm"]
    tensor(1., dtype=torch.float64)
    """
    opts = [as_optimizer("chain", part, f"part {i}") for i, part in enumerate(parts)]
    links = [_LINKS.get(opt.update) for opt in opts] if is_eager() else [None] * len(opts)

    def init(params: Tree) -> Tree:
        return tuple(opt.init(params) for opt in opts)

    def update(grads: Tree, state: Tree, params: Tree, **extra: Any) -> tuple[Tree, Tree]:
        if len(state) != len(opts):
            raise ValueError(
                f"chain: expected the states of {len(opts)} transformations, got {len(state)}; if "
                "they are of another optimizer, opt.init(params) makes new ones"
            )
        states: list[Tree] = []
        while len(states) < len(opts):
            i = len(states)
            run = [link for link in takewhile(bool, links[i:]) if link] if is_eager() else []
            if run:  # neighbours, in one pass over the leaves
                grads, new = _apply_links(run, grads, state[i : i + len(run)], params)
                states += new
            else:
                grads, new = opts[i].update(grads, state[i], params, **extra)
                states.append(new)
        return grads, tuple(states)

    return (_in_32_bits_by_leaf if all(links) else in_32_bits)(init, update)
