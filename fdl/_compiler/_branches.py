"""`cond` and `switch`: branches as functions.

How a `cond` runs depends on where it is called and on its predicate:

- eagerly, with one value: as an `if`;
- inside `jit` on the CPU, with one value: as torch's `cond` operator (`_branches_traced.py`);
- otherwise, as where a `vmap` gives each member a value of its own: both branches run, and `where`
  chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._C import _functorch as functorch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from fdl import _modes, tree
from fdl._checks import as_tuple, check_function
from fdl._compiler._branches_traced import cond_traced, match_branches
from fdl._compiler._custom_functions import CannotClose
from fdl._compiler._graph import is_smooth
from fdl._compiler._scan import _hide, _show
from fdl._modes import is_tracing
from fdl.tree import Tree


def cond(
    pred: Tensor | bool,
    true_fn: Callable[..., Any],
    false_fn: Callable[..., Any],
    *operands: Any,
) -> Any:
    """Call one of two functions; equals `jax.lax.cond`.

    Only the branch that is taken runs, also inside `jit` on the CPU. Where a `vmap` gives each
    member a predicate of its own, inside `torch.compile` and on CUDA inside `jit`, both run, and
    each member gets the values and the derivatives of its own branch.

    Args:
        pred: a bool, or a 0-d tensor, which counts as true unless it is 0.
        true_fn: a pure function of `operands`.
        false_fn: another one, whose result has the structure, shapes and dtypes of the first.
        operands: trees of tensors; any other leaf is passed on as it is.

    Returns:
        The result of the branch.

    Raises:
        TypeError: `pred` is not a bool or 0-d tensor, or a leaf of a result is not a tensor.
        ValueError: the results differ in structure, a shape or a dtype (only where both functions
            run or are traced).

    >>> cond(torch.tensor(True), torch.sqrt, torch.zeros_like, torch.tensor(4.0))
    tensor(2.)
    >>> slope = torch.func.grad(lambda x: cond(x > 0, torch.sqrt, torch.zeros_like, x))
    >>> torch.func.vmap(slope)(torch.tensor([4.0, 0.0, -1.0]))
    tensor([0.2500, 0.0000, 0.0000])
    """
    check_function("cond", "true_fn", true_fn)
    check_function("cond", "false_fn", false_fn)
    if isinstance(pred, bool):
        return true_fn(*operands) if pred else false_fn(*operands)
    check_scalar("cond", "pred", pred)
    pred = pred if pred.dtype == torch.bool else pred != 0
    if torch.compiler.is_compiling() or is_batched(pred) or (is_tracing() and pred.is_cuda):
        return _show(_choose(pred, _hiding(true_fn), _hiding(false_fn), operands))
    if is_tracing():
        try:
            return _show(cond_traced(pred, _hiding(true_fn), _hiding(false_fn), operands))
        except CannotClose:
            return _show(_choose(pred, _hiding(true_fn), _hiding(false_fn), operands))
    return true_fn(*operands) if pred else false_fn(*operands)


def switch(index: Tensor | int, branches: Sequence[Callable[..., Any]], *operands: Any) -> Any:
    """Call `branches[index]`; equals `jax.lax.switch`.

    Args:
        index: an int, or a 0-d integer tensor; too small or too large, it means the first or last.
        branches: pure functions of `operands`; all results have one structure, and the same shapes
            and dtypes.
        operands: trees of tensors; any other leaf is passed on as it is.

    Returns:
        The result of the branch.

    Raises:
        TypeError: `index` is not an int or 0-d integer tensor.
        ValueError: `branches` is empty, or as by `cond`.

    >>> switch(torch.tensor(7), [torch.sin, torch.zeros_like, torch.neg], torch.tensor(1.0))
    tensor(-1.)
    """
    branches = as_tuple("switch", "branches", branches, "a list of functions")
    for i, branch in enumerate(branches):
        check_function("switch", f"branches[{i}]", branch)
    if not branches:
        raise ValueError("switch: branches must not be empty")
    if not isinstance(index, int):
        check_integer("switch", "index", index)

    def choose(low: int, high: int, *operands: Any) -> Any:
        if high - low == 1:
            return branches[low](*operands)
        middle = (low + high) // 2
        return cond(
            index < middle,
            lambda *operands: choose(low, middle, *operands),
            lambda *operands: choose(middle, high, *operands),
            *operands,
        )

    return choose(0, len(branches), *operands)


def _hiding(fn: Callable[..., Any]) -> Callable[..., Tree]:
    return lambda *operands: _hide(fn(*operands))


def check_scalar(caller: str, name: str, x: Any) -> None:
    """Raise unless `x` is a 0-d tensor."""
    if not isinstance(x, Tensor) or x.ndim:
        got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{caller}: {name} must be a 0-d tensor, got {got}")


def check_integer(caller: str, name: str, x: Any) -> None:
    """Raise unless `x` is a 0-d tensor of integers."""
    is_tensor = isinstance(x, Tensor) and x.ndim == 0
    if not is_tensor or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        got = f"{x.dtype}{list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{caller}: {name} must be an int or a 0-d integer tensor, got {got}")


def is_batched(x: Tensor) -> bool:
    """Check whether a `vmap` gives each member a value of its own."""
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def _choose(
    pred: Tensor, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Any
) -> Any:
    """Run both branches, and choose from their results."""
    yes = _run_where(pred, true_fn, operands)
    no = _run_where(~pred, false_fn, operands)
    leaves = match_branches(yes, no)
    chosen = [torch.where(pred, x, y) for x, y in zip(tree.leaves(yes), leaves, strict=True)]
    return pytree.tree_unflatten(chosen, pytree.tree_structure(yes))


def _run_where(taken: Tensor, fn: Callable[..., Any], operands: Any) -> Any:
    """Run a branch so that its derivatives are 0 where it is not taken."""
    if torch.compiler.is_compiling():  # Dynamo does not trace the mode: only the operands
        return fn(*pytree.tree_map_only(Tensor, partial(_only_where, taken), operands))
    mode = _OnlyWhere(taken)
    operands = pytree.tree_map_only(Tensor, mode.limit, operands)
    with mode:
        return fn(*operands)


def _only_where(taken: Tensor, x: Tensor) -> Tensor:
    return torch.where(taken, x, x.detach()) if is_smooth(x) else x


def _place() -> tuple[int, int]:
    """Return how many graphs are being traced, and how many transformations are active."""
    tracing = _modes.tracing.get()
    depth = len(functorch.get_interpreter_stack() or ())
    return 0 if tracing is None else len(tracing.tracers), depth


class _OnlyWhere(TorchFunctionMode):
    """Lets no derivative through to tensors from outside, except where a branch is taken.

    An infinite derivative of a branch that is not taken would make the gradient NaN: 0 · ∞.
    """

    def __init__(self, taken: Tensor) -> None:
        super().__init__()
        self.taken, self.place = taken, _place()
        self.made = WeakTensorKeyDictionary()  # in the branch
        self.limited: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of the first, kept alive

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, self.limit, (args, kwargs or {}))
        result = func(*args, **kwargs)
        self._note(result)
        return result

    def limit(self, x: Tensor) -> Tensor:
        # The body of a loop is traced outside of the transformations, where `taken` has no meaning.
        (traces, depth), (first_traces, first_depth) = _place(), self.place
        if traces != first_traces or depth < first_depth:
            return x
        if not is_smooth(x) or x in self.made:
            return x
        if id(x) not in self.limited:
            new = _only_where(self.taken, x)
            self._note(new)
            self.limited[id(x)] = x, new
        return self.limited[id(x)][1]

    def _note(self, result: Any) -> None:
        for x in pytree.tree_leaves(result):
            if isinstance(x, Tensor):
                self.made[x] = True
