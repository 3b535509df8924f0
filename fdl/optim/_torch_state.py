"""Continue a run of `torch.optim`, and convert it back: `from_torch`, `to_torch`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl import tree
from fdl._checks import describe
from fdl._numerics import at_least_32_bits
from fdl.optim._adafactor import adafactor
from fdl.optim._base import Optimizer, State
from fdl.optim._hyperparams import rates_of
from fdl.optim._lbfgs import lbfgs
from fdl.optim._lbfgs_state import LBFGSState
from fdl.optim._masking import multi_transform
from fdl.optim._muon import muon
from fdl.optim._rprop_asgd import asgd, rprop
from fdl.optim._torch_recipes import (
    adadelta,
    adagrad,
    adam,
    adamax,
    adamw,
    nadam,
    radam,
    rmsprop,
    sgd,
)
from fdl.tree import Tree

# ------------------------------------------------------------------------------ torch's state


def _lbfgs_to_torch(state: LBFGSState) -> dict[str, Any]:
    """Convert to the state that `torch.optim.LBFGS` keeps for its first parameter, bit by bit.

    The order of the leaves must be that of torch's parameters. Rates and `hyper.count` are not part
    of torch's state, and torch makes its scratch list `al` itself.

    >>> _lbfgs_to_torch(lbfgs().init({"w": torch.ones(2)}))
    {'func_evals': 0, 'n_iter': 0}
    """
    counts = {"func_evals": int(state.func_evals), "n_iter": int(state.n_iter)}
    if not counts["n_iter"]:  # torch's state before the first direction
        return counts
    first = len(state.ro) - int(state.num_old)
    histories = {
        name: [row.clone() for row in getattr(state, name)[first:]]
        for name in ("old_dirs", "old_stps", "ro")
    }
    vectors = {name: getattr(state, name).clone() for name in ("d", "H_diag", "prev_flat_grad")}
    # Python numbers, since torch casts tensors to the dtype of the parameters when loading them.
    numbers = {name: float(getattr(state, name)) for name in ("t", "prev_loss")}
    return {**counts, **histories, **vectors, **numbers}


def _lbfgs_from_torch(torch_state: dict[str, Any], like: LBFGSState) -> LBFGSState:
    """Convert from the state that `torch.optim.LBFGS` keeps for its first parameter.

    Args:
        torch_state: that state, which is empty before the first step.
        like: an initial state for the same parameters; its rates are kept.

    Raises:
        ValueError: `torch_state` has another number of elements, or more pairs than `like`.

    >>> like = lbfgs().init({"w": torch.ones(2)})
    >>> _lbfgs_from_torch({"func_evals": 3, "n_iter": 0}, like).func_evals
    tensor(3)
    """

    def read(name: str, old: Tensor) -> Tensor:
        return torch.as_tensor(torch_state[name], dtype=old.dtype, device=old.device).clone()

    def fill(name: str, old: Tensor) -> Tensor:
        rows, empty = torch_state[name], torch.zeros_like(old)
        return torch.cat([empty[len(rows) :], torch.stack(rows).to(old)]) if rows else empty

    counts = [name for name in ("func_evals", "n_iter") if name in torch_state]
    new: dict[str, Any] = {name: read(name, getattr(like, name)) for name in counts}
    if "d" not in torch_state:
        return like._replace(**new)
    length, pairs = len(torch_state["d"]), len(torch_state["ro"])
    if length != len(like.d):
        raise ValueError(
            f"lbfgs: the state of torch must have {len(like.d)} elements like params, got {length}"
        )
    if pairs > len(like.ro):
        raise ValueError(
            f"lbfgs: history_size must be at least {pairs}, the pairs in the state of torch, got "
            f"{len(like.ro)}"
        )
    for name in ("d", "t", "H_diag", "prev_flat_grad", "prev_loss"):
        new[name] = read(name, getattr(like, name))
    for name in ("old_dirs", "old_stps", "ro"):
        new[name] = fill(name, getattr(like, name))
    return like._replace(**new, num_old=torch.full_like(like.num_old, pairs))


_BY_CLASS: dict[type, Callable[..., Optimizer]] = {
    torch.optim.ASGD: asgd,
    torch.optim.Adadelta: adadelta,
    torch.optim.Adafactor: adafactor,
    torch.optim.Adagrad: adagrad,
    torch.optim.Adam: adam,
    torch.optim.AdamW: adamw,
    torch.optim.Adamax: adamax,
    torch.optim.LBFGS: lbfgs,
    torch.optim.Muon: muon,
    torch.optim.NAdam: nadam,
    torch.optim.RAdam: radam,
    torch.optim.RMSprop: rmsprop,
    torch.optim.Rprop: rprop,
    torch.optim.SGD: sgd,
}
_COUNTS_NO_STEPS = (torch.optim.SGD, torch.optim.Muon)
# Tuples in torch's param groups that are several hyperparameters here.
_TUPLES = {
    "betas": ("beta1", "beta2"),
    "etas": ("etaminus", "etaplus"),
    "step_sizes": ("step_size_min", "step_size_max"),
    "eps": ("eps1", "eps2"),  # of Adafactor; elsewhere eps is a number
}


def from_torch(torch_optimizer: torch.optim.Optimizer, params: Tree) -> tuple[Optimizer, Tree]:
    """Convert a `torch.optim` optimizer to a pure one and its state, to continue the run.

    Every param group keeps its options; several groups become the parts of a `multi_transform` with
    labels "0", "1" and so on. Nothing is shared with the torch optimizer, which is not changed.

    Args:
        torch_optimizer: an instance of a class of `torch.optim` itself, not of a subclass.
        params: its own parameter tensors, as a tree; for a module
            `tree.unflatten_dict(dict(module.named_parameters()))`.

    Raises:
        TypeError: there is no equivalent of the optimizer here.
        ValueError: `params` are not exactly its parameters, or for LBFGS not in its order, or
            parameters of one group have made different numbers of steps (each path is listed).

    >>> w = torch.ones(1, requires_grad=True)
    >>> theirs = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    >>> w.grad = torch.ones(1)
    >>> theirs.step()
    >>> opt, state = from_torch(theirs, {"w": w})
    >>> params = {"w": w.detach().clone()}
    >>> opt.update({"w": torch.ones(1)}, state, params)[0]
    {'w': tensor([-0.1900])}
    """
    make = _BY_CLASS.get(type(torch_optimizer))
    if make is None:
        raise TypeError(
            f"from_torch: {type(torch_optimizer).__name__} has no equivalent in fdl; "
            f"supported: {sorted(c.__name__ for c in _BY_CLASS)}"
        )
    labels = _groups(torch_optimizer, params, "from_torch")
    if isinstance(torch_optimizer, torch.optim.LBFGS):  # one vector of all parameters
        (group,) = torch_optimizer.param_groups
        opt = _make(make, group)
        theirs = torch_optimizer.state.get(group["params"][0], {})
        return opt, _lbfgs_from_torch(theirs, opt.init(tree.map(torch.Tensor.detach, params)))
    opts = {str(i): _make(make, group) for i, group in enumerate(torch_optimizer.param_groups)}
    counts = {label: _steps(torch_optimizer, params, labels, label) for label in opts}
    torch_states = {
        path: torch_optimizer.state.get(leaf, {})
        for path, leaf in tree.flatten_dict(params).items()
    }
    detached = tree.map(torch.Tensor.detach, params)

    def fill(opt: Optimizer, part: Tree, label: str) -> Tree:
        def filled(node: Any) -> Any:
            if not isinstance(node, State):
                return node
            hyper = node.hyper._replace(count=torch.full_like(node.hyper.count, counts[label]))
            slots = {
                name: tree.unflatten_dict(
                    {
                        path: _copied(torch_states[path].get(name), like=initial)
                        for path, initial in tree.flatten_dict(slot).items()
                    },
                    like=slot,
                )
                for name, slot in node.slots.items()
            }
            return State(hyper, slots)

        return pytree.tree_map(filled, opt.init(part), is_leaf=lambda n: isinstance(n, State))

    if len(opts) == 1:
        return opts["0"], fill(opts["0"], detached, "0")
    opt = multi_transform(opts, lambda path, leaf: labels[path])
    return opt, {
        label: fill(part, _part(detached, labels, label), label) for label, part in opts.items()
    }


def _part(params: Tree, labels: dict[str, str], label: str) -> Tree:
    return tree.partition(params, lambda path, leaf: labels[path] == label)[0]


def _make(make: Callable[..., Optimizer], group: dict[str, Any]) -> Optimizer:
    """Build the pure function with the options of a param group."""
    options = {name: group[name] for name in inspect.signature(make).parameters if name in group}
    return make(**pytree.tree_map_only(Tensor, lambda x: x.detach().reshape(()), options))


def _copied(value: Any, like: Tensor) -> Tensor:
    return like if value is None else value.detach().to(like.dtype, copy=True)


def _groups(torch_optimizer: torch.optim.Optimizer, params: Tree, caller: str) -> dict[str, str]:
    """Map each path to the number of its param group, as a label."""
    if not isinstance(torch_optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"{caller}: torch_optimizer must be an optimizer of torch, got "
            f"{describe(torch_optimizer)}"
        )
    number = {
        id(leaf): str(i)
        for i, group in enumerate(torch_optimizer.param_groups)
        for leaf in group["params"]
    }
    flat = tree.flatten_dict(params)
    lines = [f"{path}: not in the optimizer" for path, p in flat.items() if id(p) not in number]
    seen: dict[int, str] = {}
    for path, leaf in flat.items():
        if id(leaf) in seen:
            lines.append(f"{path}: the same tensor as {seen[id(leaf)]}; keep one of them")
        seen[id(leaf)] = path
    missing = len(number.keys() - seen.keys())
    if missing:
        lines.append(f"{missing} parameters of the optimizer are not in the tree")
    if not lines and isinstance(torch_optimizer, torch.optim.LBFGS) and list(seen) != list(number):
        lines = [
            f"{path}: not in the order of the optimizer, for which params are one vector"
            for path in flat
        ]
    if lines:
        raise ValueError(
            f"{caller}: params must be the optimizer's own tensors, which are matched by identity, "
            "not copies:\n  " + "\n  ".join(lines)
        )
    return {path: number[id(leaf)] for path, leaf in flat.items()}


def _steps(
    torch_optimizer: torch.optim.Optimizer, params: Tree, labels: dict[str, str], label: str
) -> int:
    """Return the number of steps of a group, for which there is one count here."""
    states = {
        path: torch_optimizer.state[leaf]
        for path, leaf in tree.flatten_dict(params).items()
        if labels[path] == label and torch_optimizer.state.get(leaf)
    }
    if isinstance(torch_optimizer, _COUNTS_NO_STEPS):
        # These only read if there has been a first step.
        return int(any(state.get("momentum_buffer") is not None for state in states.values()))
    steps = {path: int(state["step"]) for path, state in states.items()}
    if len(set(steps.values())) > 1:
        raise ValueError(
            f"from_torch: the parameters of group {label} have made different numbers of steps; "
            "put parameters with equal numbers into one group:\n  "
            + "\n  ".join(f"{path}: {count}" for path, count in steps.items())
        )
    return next(iter(steps.values()), 0)


def to_torch(state: Tree, params: Tree, torch_optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Convert a state back to a `state_dict` of the torch optimizer passed to `from_torch`.

    Load it with `torch_optimizer.load_state_dict`. The param groups get the current rates,
    including those that follow a schedule. Parameters without a state in the torch optimizer get
    none, if others have one (they are frozen). Copy the parameters to the module separately.

    Args:
        state: state of the optimizer that `from_torch` returned.
        params: the torch optimizer's own parameter tensors, as a tree, as for `from_torch`.
        torch_optimizer: the optimizer to load the result into; it is not changed.

    Raises:
        ValueError: `params` are not exactly its parameters (each path is listed), or `state` does
            not belong to the optimizer that `from_torch` returns for it.

    >>> w = torch.ones(1, requires_grad=True)
    >>> theirs = torch.optim.Adam([w], lr=0.1)
    >>> opt, state = from_torch(theirs, {"w": w})
    >>> params = {"w": w.detach().clone()}
    >>> _, state = opt.update({"w": torch.ones(1)}, state, params)
    >>> theirs.load_state_dict(to_torch(state, {"w": w}, theirs))
    >>> theirs.state[w]["step"], theirs.state[w]["exp_avg"]
    (tensor(1.), tensor([0.1000]))
    """
    labels = _groups(torch_optimizer, params, "to_torch")
    like = from_torch(torch_optimizer, params)[1]
    lines = tree.diff(like, state, values=False)
    if lines:
        raise ValueError(
            "to_torch: the state does not belong to this optimizer:\n  " + "\n  ".join(lines)
        )
    result = torch_optimizer.state_dict()
    if isinstance(torch_optimizer, torch.optim.LBFGS):
        (group,) = result["param_groups"]
        _put_rates(group, rates_of(state.hyper))
        return {**result, "state": {group["params"][0]: _lbfgs_to_torch(state)}}
    single = len(torch_optimizer.param_groups) == 1
    numbers = {
        id(leaf): number
        for group, packed in zip(torch_optimizer.param_groups, result["param_groups"], strict=True)
        for leaf, number in zip(group["params"], packed["params"], strict=True)
    }
    flat = tree.flatten_dict(params)
    result["state"] = {}
    for i, group in enumerate(result["param_groups"]):
        nodes = _nodes(state if single else state[str(i)])
        for node in nodes:
            _put_rates(group, rates_of(node.hyper))
        count = int(nodes[0].hyper.count)
        paths = [path for path in flat if labels[path] == str(i)]
        known = [path for path in paths if torch_optimizer.state.get(flat[path])] or paths
        if count:
            for path in known:
                result["state"][numbers[id(flat[path])]] = _put_slots(
                    nodes, path, flat[path], count, torch_optimizer
                )
    return result


def _nodes(state: Tree) -> list[State]:
    nodes = pytree.tree_leaves(state, is_leaf=lambda node: isinstance(node, State))
    return [node for node in nodes if isinstance(node, State)]


def _put_rates(group: dict[str, Any], rates: dict[str, Tensor]) -> None:
    """Write rates into a param group, as numbers or as tensors like the old ones."""
    for name, old in group.items():
        if isinstance(old, (tuple, list)) and name in _TUPLES:
            parts = zip(_TUPLES[name], old, strict=True)
            group[name] = tuple(rates[p].item() if p in rates else was for p, was in parts)
        elif name in rates:
            new = rates[name]
            is_tensor = isinstance(old, Tensor)
            group[name] = new.to(old.dtype).reshape(old.shape) if is_tensor else new.item()


def _put_slots(
    nodes: list[State],
    path: str,
    leaf: Tensor,
    count: int,
    torch_optimizer: torch.optim.Optimizer,
) -> dict[str, Tensor]:
    scalar = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    slots: dict[str, Tensor] = {}
    if not isinstance(torch_optimizer, _COUNTS_NO_STEPS):
        slots["step"] = torch.tensor(float(count), dtype=scalar)
    for node in nodes:
        for name, slot in node.slots.items():
            value = tree.flatten_dict(slot)[path].detach()
            if value.numel() or not leaf.numel():  # unused slots of adafactor are empty
                # torch keeps scalars of a leaf in its default dtype.
                dtype = leaf.dtype if value.dtype == at_least_32_bits(leaf) else scalar
                slots[name] = value.to(dtype, copy=True)
    return slots
