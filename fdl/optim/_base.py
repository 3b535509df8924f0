"""The protocol that every optimizer and every transformation of gradients follows.

`init(params) -> state`, `update(grads, state, params) -> (updates, state)`, and
`apply_updates(params, updates)` adds the updates. Nothing is mutated, so an optimizer can be
differentiated, vmapped and compiled. `leafwise` makes a transformation of the maths of one leaf.

Everything is computed and remembered in at least 32 bits: `in_32_bits` lifts parameters of 16 bits
on the way in and rounds their updates once, on the way out of the outermost optimizer.
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
from fdl.optim._hyperparams import Hyper, Rate, check_rate, init_hyper, next_hyper, rates_now
from fdl.tree import Tree
from fdl.tree._map import match
from fdl.tree._paths import dotted


class Optimizer(NamedTuple):
    """A transformation of gradients, or a chain of them, as two pure functions.

    `update` takes `(grads, state, params, *, value=None, value_fn=None, count=None)`: `value` is
    the loss, `value_fn` maps parameters to it, and `count` says how many examples the loss is the
    mean of. What has no use for them ignores them, and an `update` of your own without a parameter
    `count` is not given it. A gradient may be `None`: that leaf and its slots stay as they are.

    Updates have the dtypes of the parameters. For parameters of 16 bits everything is computed and
    remembered in float32, and the updates are rounded once, at the end.

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
    """The state of a transformation made by `leafwise`.

    >>> from fdl import optim
    >>> optim.trace(0.9).init({"w": torch.ones(1)}).slots
    {'momentum_buffer': {'w': tensor([0.])}}
    """

    hyper: Hyper
    slots: dict[str, Tree]  # by torch.optim's names, each a tree with the paths of the parameters


def leafwise(
    caller: str,
    rule: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    rates: Mapping[str, Rate],
    slots: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> Optimizer:
    """Make a transformation from the maths of one leaf.

    `rule(g, p, t, **slots, **rates)` returns the update and the new slots. In it `t` is the number
    of this update, from 1, and it and the rates are float64 0-d tensors: PyTorch's promotion then
    keeps a leaf's dtype, and `1 - beta2**t` is exact. A 0-d leaf comes as `[1]` for that reason.

    Args:
        caller: how an error begins.
        rule: pure maths; None gradients do not reach it.
        rates: hyperparameters by name: numbers, 0-d tensors or schedules.
        slots: what is remembered for each leaf: name → its first value, a function of the leaf.

    Raises:
        ValueError: a rate out of range; (at init and update) a leaf or a gradient that is not
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
    for name, rate in rates.items():
        check_rate(caller, name, rate)
    first = slots or {}

    def init(params: Tree) -> State:
        check_floating(params, caller)
        return State(
            init_hyper(rates, params), {name: tree.map(f, params) for name, f in first.items()}
        )

    def update(grads: Tree, state: State, params: Tree, **extra: Any) -> tuple[Tree, State]:
        leaves, spec = pytree.tree_flatten(params)
        columns = {name: match(params, state.slots[name], f"{caller}: {name}") for name in first}
        now = rates_now(rates, state.hyper)
        t = (state.hyper.count + 1).double()
        updates: list[Tensor | None] = []
        for i, (g, p) in enumerate(zip(match_grads(grads, params, caller), leaves, strict=True)):
            if g is None:
                updates.append(None)
                continue
            # Slots that an earlier version kept in 16 bits go on in 32.
            old = {name: lift(column[i]) for name, column in columns.items()}
            with_axis = {name: _with_axis(slot, p) for name, slot in old.items()}
            u, new = rule(_with_axis(g.to(p.dtype), p), _with_axis(p, p), t, **with_axis, **now)
            updates.append(u.to(p.dtype).reshape(p.shape))
            for name, slot in old.items():
                columns[name][i] = new[name].to(slot.dtype).reshape(slot.shape)
        slots = {name: pytree.tree_unflatten(column, spec) for name, column in columns.items()}
        return pytree.tree_unflatten(updates, spec), State(next_hyper(rates, state.hyper), slots)

    return in_32_bits(init, update)


def _with_axis(x: Tensor, leaf: Tensor) -> Tensor:
    """Give what belongs to a 0-d leaf an axis, so that a float64 rate does not promote it."""
    return x.reshape(1) if leaf.ndim == 0 and x.dtype == leaf.dtype and x.ndim == 0 else x


def in_32_bits(init: Callable[[Tree], Tree], update: Callable[..., tuple[Tree, Tree]]) -> Optimizer:
    """Make an optimizer that sees parameters and gradients of 16 bits as float32.

    So what it computes and remembers is in 32 bits, and its updates are rounded once, to the dtypes
    of the parameters. Optimizers inside see float32, and so round nothing.

    Args:
        init: of the optimizer, for floating parameters of at least 32 bits.
        update: likewise; it is given every keyword that comes.

    >>> opt = in_32_bits(lambda params: params, lambda grads, state, params, **_: (grads, state))
    >>> params = {"w": torch.ones(1).half()}
    >>> opt.update(params, opt.init(params), params)
    ({'w': tensor([1.], dtype=torch.float16)}, {'w': tensor([1.])})
    """

    def start(params: Tree) -> Tree:
        return init(_lifted(params))

    def step(grads: Tree, state: Tree, params: Tree, **extra: Any) -> tuple[Tree, Tree]:
        if not any(map(is_narrow, pytree.tree_leaves((grads, params)))):
            return update(grads, state, params, **extra)
        value_fn = extra.get("value_fn")
        if value_fn is not None:
            extra["value_fn"] = lambda wide: value_fn(tree.map(_rounded, wide, params))
        updates, state = update(_lifted(grads), state, _lifted(params), **extra)
        return tree.map(lambda p, u: u if u is None else _rounded(u, p), params, updates), state

    return Optimizer(start, step)


def is_narrow(x: Any) -> bool:
    """Say whether a leaf is a floating tensor of less than 32 bits.

    >>> is_narrow(torch.ones(1).half()), is_narrow(torch.ones(1)), is_narrow(None)
    (True, False, False)
    """
    return isinstance(x, Tensor) and torch.is_floating_point(x) and x.dtype.itemsize < 4


def lift(x: Any) -> Any:
    """Turn a floating tensor of less than 32 bits into float32; all else stays as it is.

    >>> lift(torch.ones(1).bfloat16()), lift(torch.ones(1).double()), lift(None)
    (tensor([1.]), tensor([1.], dtype=torch.float64), None)
    """
    return x.float() if is_narrow(x) else x


def _lifted(params: Tree) -> Tree:
    return tree.map(lift, params)


def _rounded(wide: Tensor, like: Tensor) -> Tensor:
    return wide.to(like.dtype) if is_narrow(like) else wide


def match_grads(grads: Tree, params: Tree, caller: str) -> list[Tensor | None]:
    """List the gradients in the order of the leaves of `params`; `None` is allowed.

    Args:
        grads: a tree like `params`.
        params: the parameters.
        caller: how an error begins.

    Raises:
        ValueError: another structure, another shape, or not floating (each path is listed).

    >>> match_grads({"b": None, "w": torch.ones(1)}, {"w": torch.ones(1), "b": 0}, "here")
    [tensor([1.]), None]
    """
    found = match(params, grads, f"{caller}: grads")
    leaves = tree.leaves(params)
    if not all(
        g is None or (g.is_floating_point() and g.shape == p.shape)
        for g, p in zip(found, leaves, strict=True)
    ):
        lines = [
            f"{path}: expected a floating tensor {list(p.shape)}, got {g.dtype} {list(g.shape)}"
            for path, g, p in zip(tree.flatten_dict(params), found, leaves, strict=True)
            if g is not None and not (g.is_floating_point() and g.shape == p.shape)
        ]
        raise ValueError(
            f"{caller}: gradients do not fit their parameters:\n  " + "\n  ".join(lines)
        )
    return found


def check_floating(params: Tree, caller: str) -> None:
    """Raise unless every leaf is a floating tensor; each other one is listed with its path.

    >>> check_floating({"w": torch.ones(1)}, "here")
    """
    lines = [
        f"{path}: {leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__}"
        for path, leaf in tree.flatten_dict(params).items()
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point())
    ]
    if lines:
        raise ValueError(
            f"{caller}: parameters must be floating tensors; take these out (tree.partition):\n  "
            + "\n  ".join(lines)
        )


def map_grads(f: Callable[..., Any], grads: Tree, *rest: Tree) -> Tree:
    """Map over gradients; where one is `None` the result is `None` as well.

    >>> map_grads(lambda g: -g, {"w": torch.ones(1), "frozen": None})
    {'w': tensor([-1.]), 'frozen': None}
    """
    return tree.map(lambda g, *others: None if g is None else f(g, *others), grads, *rest)


def update_of(caller: str, opt: Any, name: str = "opt") -> Callable[..., tuple[Tree, Tree]]:
    """Take the update of an optimizer as a function that may be given any keyword of `Optimizer`.

    Args:
        caller: how an error begins.
        opt: what a function was given for an optimizer.
        name: of that argument.

    Raises:
        TypeError: it is something else.

    >>> from fdl import optim
    >>> params = {"w": torch.ones(1)}
    >>> update_of("here", optim.scale(2.0))(params, (), params, count=3)[0]
    {'w': tensor([2.])}
    """
    if not isinstance(opt, Optimizer):
        hint = f"; call it: {opt.__name__}(...)" if inspect.isfunction(opt) else ""
        raise TypeError(f"{caller}: {name} must be an Optimizer, got {opt!r}{hint}")
    if torch.compiler.is_compiling():  # Dynamo cannot look at a signature that it is just making
        return opt.update
    kinds = inspect.signature(opt.update).parameters
    if "count" in kinds or any(kind.kind is kind.VAR_KEYWORD for kind in kinds.values()):
        return opt.update
    return lambda *args, count=None, **extra: opt.update(*args, **extra)


def chain(*parts: Optimizer) -> Optimizer:
    """Apply transformations one after the other; the state is the tuple of their states.

    Raises:
        TypeError: a part is not an optimizer.
        ValueError: the state has another number of parts (at update).

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
    """Add updates to parameters, in the dtype of each parameter; `None` leaves it as it is.

    Raises:
        ValueError: the structures differ (every path is listed).

    >>> apply_updates({"w": torch.ones(1), "frozen": torch.ones(1)},
    ...               {"w": torch.ones(1), "frozen": None})
    {'w': tensor([2.]), 'frozen': tensor([1.])}
    """
    return tree.map(lambda p, u: p if u is None else (p + u).to(p.dtype), params, updates)


def slots(state: Tree) -> dict[str, Tree]:
    """Find what an optimizer remembers of each leaf: trees by name, wherever they are in a state.

    A name that occurs more than once is given with its path in the state, as in `hyperparams`.

    >>> from fdl import optim
    >>> list(slots(optim.adam().init({"w": torch.ones(1)})))
    ['exp_avg', 'exp_avg_sq']
    """
    pairs, _ = pytree.tree_flatten_with_path(state, is_leaf=lambda node: isinstance(node, State))
    found = [
        (dotted(entries), name, slot)
        for entries, node in pairs
        if isinstance(node, State)
        for name, slot in node.slots.items()
    ]
    names = [name for _, name, _ in found]
    return {
        name if names.count(name) == 1 else f"{path}.{name}": slot for path, name, slot in found
    }


Result = tuple[Tensor, dict[str, Tensor]]
