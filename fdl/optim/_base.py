"""The protocol of optimizers and of transformations of gradients.

`init(params) -> state`, `update(grads, state, params) -> (updates, state)`, and
`apply_updates(params, updates)` adds the updates. Nothing is mutated, so an optimizer can be
differentiated, vmapped and compiled. `leafwise` makes a transformation from the maths of one leaf.

Everything is computed and stored in at least 32 bits: `in_32_bits` upcasts 16-bit parameters and
gradients on the way in and rounds the updates once, on the way out of the outermost optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl import tree
from fdl._kinds import register
from fdl.optim._foreach import map_leaves
from fdl.optim._hyperparams import Hyper
from fdl.optim._leaves import Leaves
from fdl.tree import Tree
from fdl.tree._map import match
from fdl.tree._paths import dotted
from fdl.tree._structure import flatten


class Optimizer(NamedTuple):
    """A transformation of gradients, or a chain of them, as two pure functions.

    `update` takes `(grads, state, params, *, value=None, value_fn=None, count=None)`: `value` is
    the loss, `value_fn` maps parameters to it, and `count` is the number of examples that the loss
    is the mean of. Most optimizers ignore all three, and an `update` of your own need not have
    them. A gradient may be `None`: its parameter and slots stay as they are.

    What takes an optimizer takes any pair of functions `(init, update)`, or object with both, such
    as the transformations of TorchOpt. What the signature of `update` does not have is not passed;
    if it has `inplace`, that is False. The names of states that files refer to are fdl's own, so
    load the state of another library with `like=`.

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
    return x.to(torch.float32) if is_narrow(x) else x


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
    if not all(map(fits, matched, leaves)):
        lines = [
            f"{path}: expected a floating tensor {list(p.shape)}, got {g.dtype} {list(g.shape)}"
            for path, g, p in zip(tree.flatten_dict(params), matched, leaves, strict=True)
            if not fits(g, p)
        ]
        raise ValueError(
            f"{caller}: gradients do not fit their parameters:\n  " + "\n  ".join(lines)
        )
    return matched


def fits(g: Tensor | None, p: Tensor) -> bool:
    """Return True for a floating gradient of the shape of its parameter, and for None.

    >>> fits(torch.ones(2), torch.ones(2)), fits(torch.ones(1), torch.ones(2)), fits(None, None)
    (True, False, True)
    """
    if type(g) is Leaves and type(p) is Leaves:
        return g.node.whole == p.node.whole
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


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """Add updates to parameters, in the dtype of each; an update of `None` changes nothing.

    Raises:
        ValueError: the structures differ (every path is listed).

    >>> apply_updates({"w": torch.ones(1), "frozen": torch.ones(1)},
    ...               {"w": torch.ones(1), "frozen": None})
    {'w': tensor([2.]), 'frozen': tensor([1.])}
    """

    def add(p: Tensor, u: Tensor | None) -> Tensor:
        return p if u is None else (p + u).to(p.dtype)

    return map_leaves(add, params, updates, caller="apply_updates")


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
