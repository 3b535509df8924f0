"""Optimizers for parts of a tree of parameters: `masked`, `freeze`, `multi_transform`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fdl import tree
from fdl._checks import check_dict
from fdl.optim._as_optimizer import OptimizerLike, as_optimizer
from fdl.optim._base import Optimizer
from fdl.tree import Tree, Where
from fdl.tree._map import match
from fdl.tree._paths import as_dicts, select
from fdl.tree._summary import describe_leaf

Mask = Where | Tree | Callable[[Tree], Tree]  # a tree is one of bools, like the parameters
Labels = Mapping[str, Mask] | Callable[[str, Any], str]


def multi_transform(opts: Mapping[str, OptimizerLike], labels: Labels) -> Optimizer:
    """Apply an optimizer to each part of the parameters, like the param groups of `torch.optim`.

    The state is a dict of the optimizers' states by label; each covers only its own leaves. Optax
    also calls this `partition`.

    Args:
        opts: optimizers by label.
        labels: the leaves of each label, as in `masked`; or one function `(path, leaf) -> label`.

    Raises:
        TypeError: one of `opts` is not an optimizer.
        ValueError: the labels are not those of `opts`; (at init) a leaf has no label or several, or
            a label has no leaves; each path is listed.

    >>> from fdl import optim
    >>> params = {"body": torch.ones(1), "head": torch.ones(1)}
    >>> opt = multi_transform({"slow": optim.sgd(0.1), "fast": optim.sgd(1.0)},
    ...                       {"slow": "body", "fast": "head"})
    >>> opt.update(params, opt.init(params), params)[0]
    {'body': tensor([-0.1000]), 'head': tensor([-1.])}
    """
    check_dict("multi_transform", "opts", opts, "a dict from labels to optimizers")
    if not callable(labels):
        what = "a dict from labels to leaves, or a function (path, leaf) -> label"
        check_dict("multi_transform", "labels", labels, what)
    checked = {
        label: as_optimizer("multi_transform", opt, f"opts[{label!r}]")
        for label, opt in opts.items()
    }
    if not callable(labels) and labels.keys() != checked.keys():
        raise ValueError(
            f"multi_transform: labels must be those of the optimizers, {sorted(checked)}, "
            f"got {sorted(labels)}"
        )
    return _by_label("multi_transform", checked, lambda params: _labels(params, checked, labels))


def _labels(params: Tree, opts: Mapping[str, Optimizer], labels: Labels) -> dict[str, str]:
    """Map each path to its label."""
    if callable(labels):
        matching = {path: [labels(path, leaf)] for path, leaf in tree.flatten_dict(params).items()}
    else:
        chosen = {
            label: selected(params, where, f"multi_transform: {label}")
            for label, where in labels.items()
        }
        matching = {
            path: [label for label in labels if chosen[label][path]]
            for path in tree.flatten_dict(params)
        }
    lines = [
        f"{path}: {own or 'no label'}"
        for path, own in matching.items()
        if len(own) != 1 or own[0] not in opts
    ]
    if lines:
        raise ValueError(
            f"multi_transform: each leaf needs exactly one label of {sorted(opts)}:\n  "
            + "\n  ".join(lines)
        )
    return {path: label for path, (label,) in matching.items()}


def selected(params: Tree, where: Mask, caller: str) -> dict[str, bool]:
    """Map each path to True if `where` selects it.

    Args:
        params: the parameters.
        where: as in `masked`.
        caller: function to name in the message.

    Raises:
        ValueError: a glob, or a function, selects no path; or a tree has another structure than
            `params`, or a leaf that is not a bool (each path is listed).

    >>> selected({"w": torch.ones(1), "b": torch.ones(1)}, "w", "here")
    {'w': True, 'b': False}
    >>> selected({"w": torch.ones(1), "b": torch.ones(1)}, {"w": True, "b": False}, "here")
    {'w': True, 'b': False}
    """
    mask: Any = where
    if callable(mask) and _is_of_params(mask):
        mask = mask(params)
    if not callable(mask) and not all(isinstance(leaf, str) for leaf in tree.leaves(mask)):
        chosen = _bools(params, mask, caller)
    else:
        chosen = select(params, mask, caller)
    if chosen and callable(where) and not any(chosen.values()):
        raise ValueError(f"{caller}: {where!r} selects no path; there are {list(chosen)}")
    return chosen


def _is_of_params(function: Callable[..., Any]) -> bool:
    """Return True for a function of the parameters, False for one of a path and a leaf."""
    if torch.compiler.is_compiling():  # Dynamo cannot inspect every function
        if inspect.isfunction(function):
            return function.__code__.co_argcount == 1
        method: Any = function if inspect.ismethod(function) else type(function).__call__
        return method.__code__.co_argcount == 2  # with `self`
    try:
        inspect.signature(function).bind("path", "leaf")
    except TypeError:
        return True
    return False


def _bools(params: Tree, mask: Tree, caller: str) -> dict[str, bool]:
    """Map each path to the bool of a mask, or raise."""
    if isinstance(mask, bool) and list(tree.flatten_dict(params)) != [""]:
        raise ValueError(
            f"{caller}: a mask must have a bool for each parameter, got {mask} alone; leave it out "
            "for all parameters"
        )
    leaves = match(params, mask, f"{caller}: mask")
    chosen = dict(zip(tree.flatten_dict(params), leaves, strict=True))
    lines = [
        f"{path}: expected True or False, got {describe_leaf(leaf)}"
        for path, leaf in chosen.items()
        if not isinstance(leaf, bool)
    ]
    if lines:
        raise ValueError(
            f"{caller}: a mask must have a bool for each parameter:\n  " + "\n  ".join(lines)
        )
    return chosen


def masked(opt: OptimizerLike, where: Mask) -> Optimizer:
    """Transform only the gradients that `where` selects; the others pass unchanged.

    The state covers only the selected leaves.

    Args:
        opt: applied to the selected gradients.
        where: as in `tree.partition`, a glob on dotted paths, several globs, or a predicate
            `(path, leaf)` on parameters; or as in optax, a tree of bools like the parameters, or a
            function of the parameters that returns one. For stacked leaves see
            `add_decayed_weights`.

    Raises:
        TypeError: `opt` is not an optimizer.
        ValueError: (at init) a glob, or a function, selects nothing; or the tree does not have a
            bool for each parameter (each path is listed).

    >>> from fdl import optim
    >>> params = {"w": torch.ones(1), "b": torch.ones(1)}
    >>> opt = masked(optim.scale(2.0), "w")
    >>> opt.update(params, opt.init(params), params)[0]
    {'w': tensor([2.]), 'b': tensor([1.])}
    """
    return masked_for("masked", as_optimizer("masked", opt), where)


def masked_for(caller: str, opt: Optimizer, where: Mask | None) -> Optimizer:
    """Make the optimizer of `masked` for another function that takes a mask.

    Args:
        caller: function to name in error messages.
        opt: applied to the selected gradients.
        where: as in `masked`; all gradients if None.

    >>> from fdl import optim
    >>> list(masked_for("here", optim.scale(2.0), "w").init({"w": torch.ones(1)}))
    ['masked']
    """
    if where is None:
        return opt

    def label_paths(params: Tree) -> dict[str, str]:
        chosen = selected(params, where, caller)
        return {path: "masked" if chosen[path] else "" for path in chosen}

    return _by_label(caller, {"masked": opt}, label_paths)


def freeze(opt: OptimizerLike, where: Mask) -> Optimizer:
    """Keep the parameters that `where` selects constant, and optimize the others.

    Unlike `optax.freeze`, it wraps the optimizer. Frozen leaves have no slots (per-parameter
    state), and their updates are `None`: neither weight decay nor momentum moves them. Put clipping
    inside, `freeze(chain(clip, sgd), where)`, so that their gradients do not count in the norm.
    Their gradients are computed all the same: to save that, split the parameters with
    `tree.partition` and differentiate with respect to one part.

    Args:
        opt: applied to the others.
        where: as in `masked`.

    Raises:
        TypeError: `opt` is not an optimizer.
        ValueError: as for `masked` (at init).

    >>> from fdl import optim
    >>> params = {"body": torch.ones(1), "head": torch.ones(1)}
    >>> opt = freeze(optim.sgd(0.1), "body")
    >>> opt.update(params, opt.init(params), params)[0]
    {'body': None, 'head': tensor([-0.1000])}
    """
    trained = as_optimizer("freeze", opt)

    def update(grads: Tree, state: Tree, params: Tree, **extra: Any) -> tuple[Tree, Tree]:
        return tree.map(lambda g: None, grads), state

    def label_paths(params: Tree) -> dict[str, str]:
        chosen = selected(params, where, "freeze")
        return {path: "frozen" if chosen[path] else "trained" for path in chosen}

    opts = {"frozen": Optimizer(lambda params: (), update), "trained": trained}
    return _by_label("freeze", opts, label_paths)


def _by_label(
    caller: str, opts: dict[str, Optimizer], label_paths: Callable[[Tree], dict[str, str]]
) -> Optimizer:
    """Apply to each leaf the optimizer of its label; leaves of other labels pass unchanged."""

    def part(params: Tree, labels: dict[str, str], label: str) -> Tree:
        return tree.partition(params, lambda path, leaf: labels[path] == label)[0]

    def init(params: Tree) -> Tree:
        labels = label_paths(params)
        return {label: opt.init(part(params, labels, label)) for label, opt in opts.items()}

    def update(
        grads: Tree, state: Tree, params: Tree, *, value_fn: Any = None, **extra: Any
    ) -> tuple[Tree, Tree]:
        if not isinstance(state, dict) or state.keys() != opts.keys():
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"{caller}: expected the states of {sorted(opts)}, got {got}")
        labels = label_paths(params)
        match(params, grads, f"{caller}: grads")
        flat = tree.flatten_dict(params)

        def part_value_fn(moved: Tree) -> Any:
            """Evaluate the loss as a function of one part of the parameters."""
            return value_fn(tree.unflatten_dict(flat | tree.flatten_dict(moved), like=params))

        updates, states = tree.flatten_dict(grads), {}
        for label, opt in opts.items():
            part_updates, states[label] = opt.update(
                part(grads, labels, label),
                state[label],
                part(params, labels, label),
                value_fn=None if value_fn is None else part_value_fn,
                **extra,
            )
            updates |= tree.flatten_dict(part_updates)
        return tree.unflatten_dict(updates, like=as_dicts(params)), states  # may have None

    return Optimizer(init, update)
