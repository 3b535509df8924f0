"""The protocol of optimizers and of transformations of gradients.

`init(params) -> state`, `update(grads, state, params) -> (updates, state)`, and
`apply_updates(params, updates)` adds the updates. Nothing is mutated, so an optimizer can be
differentiated, vmapped and compiled. `leafwise` makes a transformation from the maths of one leaf.

Everything is computed and stored in at least 32 bits: `in_32_bits` upcasts 16-bit parameters and
gradients on the way in and rounds the updates once, on the way out of the outermost optimizer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl import tree
from fdl._kinds import register
from fdl.optim._foreach import map_columns, map_leaves
from fdl.optim._hyperparams import (
    AT_LEAST_0,
    Hyper,
    Range,
    ScalarOrSchedule,
    check_rate,
    init_hyper,
    next_hyper,
    rates_now,
)
from fdl.optim._leaves import Leaves
from fdl.tree import Tree
from fdl.tree._map import match
from fdl.tree._paths import dotted
from fdl.tree._structure import flatten, unflatten


class Optimizer(NamedTuple):
    """A transformation of gradients, or a chain of them, as two pure functions.

    `update` takes `(grads, state, params, *, value=None, value_fn=None, count=None)`: `value` is
    the loss, `value_fn` maps parameters to it, and `count` is the number of examples that the loss
    is the mean of. Most optimizers ignore all three, and an `update` of your own need not have the
    parameter `count`. A gradient may be `None`: its parameter and slots stay as they are.

    Updates have the dtypes of the parameters. For 16-bit parameters everything is computed and
    stored in float32, and the updates are rounded once, at the end.

    >>> from fdl import optim
    >>> opt = optim.sgd(lr=0.1)
    >>> params = {"w": torch.tensor([1.0])}
    >>> updates, state = opt.update({"w": torch.tensor([2.0])}, opt.init(params), params)
    >>> apply_updates(params, updates)
    {'w': tensor([0.8000])}
    """

    init: Callable[[Tree], Tree]
    update: Callable[..., tuple[Tree, Tree]]


@register
class State(NamedTuple):
    """The state of a transformation made by `leafwise`: hyperparameters and slots.

    Slots (per-parameter state) are trees like the parameters: momenta, second moments and the like.

    >>> from fdl import optim
    >>> optim.trace(0.9).init({"w": torch.ones(1)}).slots
    {'momentum_buffer': {'w': tensor([0.])}}
    """

    hyper: Hyper
    slots: dict[str, Tree]  # by the names of torch.optim, each with the paths of the parameters


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
        rule: a pure function; it is not called for a gradient that is None.
        rates: hyperparameters by name: numbers, 0-d tensors or schedules.
        slots: per-parameter state by name, each a function from a leaf to its initial value.
        ranges: ranges of rates, in words and as a predicate:
            `{"momentum": ("in [0, 1)", lambda x: 0 <= x < 1)}`. The others must be at least 0.

    Raises:
        ValueError: a rate out of its range; (at init and update) a leaf or a gradient that is not
            floating, gradients of another structure or shape (each path is listed).

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
    for rate_name, rate in rates.items():
        check_rate(name, rate_name, rate, (ranges or {}).get(rate_name, AT_LEAST_0))
    initial = slots or {}

    def init(params: Tree) -> State:
        check_floating(params, name)
        return State(
            init_hyper(rates, params), {slot: tree.map(f, params) for slot, f in initial.items()}
        )

    def update(grads: Tree, state: State, params: Tree, **extra: Any) -> tuple[Tree, State]:
        kept = {slot: state.slots[slot] for slot in initial}
        now = rates_now(rates, state.hyper)
        updates, kept = apply_rule(name, rule, grads, kept, params, state.hyper.count, now)
        return updates, State(next_hyper(rates, state.hyper), kept)

    return in_32_bits(init, update)


def apply_rule(
    name: str,
    rule: Callable[..., Result],
    grads: Tree,
    slots: Mapping[str, Tree],
    params: Tree,
    count: Tensor,
    scalars: Mapping[str, Tensor],
) -> tuple[Tree, dict[str, Tree]]:
    """Apply the rule of `leafwise` to each leaf, and return updates and new slots.

    Args:
        name: name of the optimizer, with which error messages begin.
        rule: see `leafwise`.
        grads: gradients; the leaves where one is None stay as they are, and so do their slots.
        slots: trees like `params`, by name.
        params: the parameters, of at least 32 bits.
        count: int64 [], updates done.
        scalars: further arguments of the rule, float64 [], such as the rates.
    """
    leaves, structure = flatten(params)
    columns = [match(params, slots[slot], f"{name}: {slot}", structure) for slot in slots]
    t = (count + 1).double()

    def step(g: Tensor | None, p: Tensor, *kept: Tensor) -> tuple[Any, ...]:
        if g is None:
            return g, *kept
        # A file of an earlier version may hold slots of 16 bits.
        old = dict(zip(slots, map(upcast, kept), strict=True))
        with_axis = {slot: _with_axis(x, p) for slot, x in old.items()}
        u, new = rule(_with_axis(g.to(p.dtype), p), _with_axis(p, p), t, **with_axis, **scalars)
        new_slots = [new[slot].to(x.dtype).reshape_as(x) for slot, x in old.items()]
        return u.to(p.dtype).reshape_as(p), *new_slots

    grads_of_leaves = match_grads(grads, params, name)
    updates, *columns = map_columns(step, grads_of_leaves, leaves, *columns) or [[], *columns]
    new = [unflatten(column, structure) for column in columns]
    return unflatten(updates, structure), dict(zip(slots, new, strict=True))


def _with_axis(x: Tensor, leaf: Tensor) -> Tensor:
    """Add an axis to a tensor of a 0-d leaf, so that a float64 rate does not promote it."""
    if type(leaf) is Leaves:  # which are not 0-d
        return x
    return x.reshape(1) if leaf.ndim == 0 and x.dtype == leaf.dtype and x.ndim == 0 else x


def in_32_bits(init: Callable[[Tree], Tree], update: Callable[..., tuple[Tree, Tree]]) -> Optimizer:
    """Make an optimizer that sees 16-bit parameters and gradients as float32.

    It computes and stores in 32 bits, and rounds the updates once, to the dtypes of the parameters.
    Optimizers inside it see float32, and so round nothing.

    Args:
        init: `init` of the optimizer, for floating parameters of at least 32 bits.
        update: `update` of the optimizer, likewise; it is passed every keyword.

    >>> opt = in_32_bits(lambda params: params, lambda grads, state, params, **_: (grads, state))
    >>> params = {"w": torch.ones(1).half()}
    >>> opt.update(params, opt.init(params), params)
    ({'w': tensor([1.], dtype=torch.float16)}, {'w': tensor([1.])})
    """

    def start(params: Tree) -> Tree:
        return init(_upcast_leaves(params))

    def step(grads: Tree, state: Tree, params: Tree, **extra: Any) -> tuple[Tree, Tree]:
        if not any(map(is_narrow, tree.leaves(grads) + tree.leaves(params))):
            return update(grads, state, params, **extra)
        value_fn = extra.get("value_fn")
        if value_fn is not None:
            extra["value_fn"] = lambda wide: value_fn(tree.map(_round_like, wide, params))
        updates, state = update(_upcast_leaves(grads), state, _upcast_leaves(params), **extra)
        return tree.map(lambda p, u: u if u is None else _round_like(u, p), params, updates), state

    return Optimizer(start, step)


NARROW = frozenset(
    dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize < 4
)


def is_narrow(x: Any) -> bool:
    """Return True for a floating tensor of less than 32 bits.

    >>> is_narrow(torch.ones(1).half()), is_narrow(torch.ones(1)), is_narrow(None)
    (True, False, False)
    """
    return isinstance(x, Tensor) and x.dtype in NARROW


def upcast(x: Any) -> Any:
    """Turn a floating tensor of less than 32 bits into float32, and return anything else as it is.

    >>> upcast(torch.ones(1).bfloat16()), upcast(torch.ones(1).double()), upcast(None)
    (tensor([1.]), tensor([1.], dtype=torch.float64), None)
    """
    return x.float() if is_narrow(x) else x


def _upcast_leaves(params: Tree) -> Tree:
    return tree.map(upcast, params)


def _round_like(wide: Tensor, like: Tensor) -> Tensor:
    return wide.to(like.dtype) if is_narrow(like) else wide


def match_grads(grads: Tree, params: Tree, caller: str) -> list[Tensor | None]:
    """List the gradients in the order of the leaves of `params`; `None` is allowed.

    Args:
        grads: a tree like `params`.
        params: the parameters.
        caller: function to name in the message.

    Raises:
        ValueError: another structure, another shape, or not floating (each path is listed).

    >>> match_grads({"b": None, "w": torch.ones(1)}, {"w": torch.ones(1), "b": 0}, "here")
    [tensor([1.]), None]
    """
    leaves, structure = flatten(params)
    matched = match(params, grads, f"{caller}: grads", structure)
    if not all(map(_fits, matched, leaves)):
        lines = [
            f"{path}: expected a floating tensor {list(p.shape)}, got {g.dtype} {list(g.shape)}"
            for path, g, p in zip(tree.flatten_dict(params), matched, leaves, strict=True)
            if not _fits(g, p)
        ]
        raise ValueError(
            f"{caller}: gradients do not fit their parameters:\n  " + "\n  ".join(lines)
        )
    return matched


def _fits(g: Tensor | None, p: Tensor) -> bool:
    return g is None or (g.is_floating_point() and g.shape == p.shape)


def check_floating(params: Tree, caller: str) -> None:
    """Raise unless every leaf is a floating tensor; the paths of the others are listed.

    >>> check_floating({"w": torch.ones(1)}, "here")
    """
    lines = [
        f"{path}: {leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__}"
        for path, leaf in tree.flatten_dict(params).items()
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point())
    ]
    if lines:
        raise ValueError(
            f"{caller}: parameters must be floating tensors; tree.partition splits these off:\n  "
            + "\n  ".join(lines)
        )


def map_grads(f: Callable[..., Any], grads: Tree, *rest: Tree) -> Tree:
    """Map over gradients; a gradient of `None` stays `None`.

    >>> map_grads(lambda g: -g, {"w": torch.ones(1), "frozen": None})
    {'w': tensor([-1.]), 'frozen': None}
    """
    return map_leaves(lambda g, *others: None if g is None else f(g, *others), grads, *rest)


def update_of(caller: str, opt: Any, name: str = "opt") -> Callable[..., tuple[Tree, Tree]]:
    """Return the `update` of an optimizer, extended to accept every keyword of `Optimizer`.

    Args:
        caller: function to name in the message.
        opt: an optimizer, to be checked.
        name: name of the argument it was passed as.

    Raises:
        TypeError: `opt` is not an optimizer.

    >>> from fdl import optim
    >>> params = {"w": torch.ones(1)}
    >>> update_of("here", optim.scale(2.0))(params, (), params, count=3)[0]
    {'w': tensor([2.])}
    """
    if not isinstance(opt, Optimizer):
        hint = f"; call it: {opt.__name__}(...)" if inspect.isfunction(opt) else ""
        raise TypeError(f"{caller}: {name} must be an Optimizer, got {opt!r}{hint}")
    if torch.compiler.is_compiling():  # Dynamo cannot inspect a function that it is tracing
        return opt.update
    kinds = inspect.signature(opt.update).parameters
    if "count" in kinds or any(kind.kind is kind.VAR_KEYWORD for kind in kinds.values()):
        return opt.update
    return lambda *args, count=None, **extra: opt.update(*args, **extra)


def chain(*parts: Optimizer) -> Optimizer:
    """Apply transformations one after another; the state is the tuple of their states.

    Raises:
        TypeError: one of `parts` is not an optimizer.
        ValueError: (at update) the state is that of another number of transformations.

    >>> from fdl import optim
    >>> opt = optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(lr=0.1))
    >>> optim.hyperparams(opt.init({"w": torch.ones(1)}))["max_norm"]
    tensor(1., dtype=torch.float64)
    """
    steps = [update_of("chain", part, f"part {i}") for i, part in enumerate(parts)]

    def init(params: Tree) -> Tree:
        return tuple(part.init(params) for part in parts)

    def update(grads: Tree, state: Tree, params: Tree, **extra: Any) -> tuple[Tree, Tree]:
        if len(state) != len(parts):
            raise ValueError(
                f"chain: expected the states of {len(parts)} transformations, got {len(state)}"
            )
        states = []
        for step, old in zip(steps, state, strict=True):
            grads, new = step(grads, old, params, **extra)
            states.append(new)
        return grads, tuple(states)

    return in_32_bits(init, update)


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """Add updates to parameters, in the dtype of each; an update of `None` changes nothing.

    Raises:
        ValueError: the structures differ (every path is listed).

    >>> apply_updates({"w": torch.ones(1), "frozen": torch.ones(1)},
    ...               {"w": torch.ones(1), "frozen": None})
    {'w': tensor([2.]), 'frozen': tensor([1.])}
    """
    return map_leaves(lambda p, u: p if u is None else (p + u).to(p.dtype), params, updates)


def slots(state: Tree) -> dict[str, Tree]:
    """Collect the slots (per-parameter state) in an optimizer's state: trees by name.

    A name that occurs more than once is prefixed with its path in the state, as in `hyperparams`.

    >>> from fdl import optim
    >>> list(slots(optim.adam().init({"w": torch.ones(1)})))
    ['exp_avg', 'exp_avg_sq']
    """
    pairs, _ = pytree.tree_flatten_with_path(state, is_leaf=lambda node: isinstance(node, State))
    named = [
        (dotted(entries), name, slot)
        for entries, node in pairs
        if isinstance(node, State)
        for name, slot in node.slots.items()
    ]
    names = [name for _, name, _ in named]
    return {
        name if names.count(name) == 1 else f"{path}.{name}": slot for path, name, slot in named
    }
