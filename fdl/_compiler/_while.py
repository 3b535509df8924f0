"""`while_loop` and `fori_loop`: loops whose number of steps may depend on values.

How a `while_loop` runs depends on where it is called:

- eagerly: as a Python loop, also under `torch.func` transformations;
- inside `jit`: as torch's `while_loop` operator (`_while_traced.py`);
- inside `torch.compile`: as torch's operator, which has no rule for `vmap`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._C import _functorch as functorch
from torch._higher_order_ops.while_loop import while_loop as while_loop_for_dynamo

from fdl import tree
from fdl._checks import check_function
from fdl._compiler._branches import check_integer, is_batched
from fdl._compiler._purity import innermost
from fdl._compiler._scan import _hide, _show, scan
from fdl._compiler._scan_eager import check_carry, contiguous_copy
from fdl._compiler._while_traced import NO_REVERSE, as_pred, while_traced
from fdl._modes import is_tracing
from fdl.tree import Tree
from fdl.tree._checks import check_tensors

Carry = TypeVar("Carry")


def while_loop(
    cond_fun: Callable[[Carry], Any], body_fun: Callable[[Carry], Carry], init: Carry
) -> Carry:
    """Repeat `carry = body_fun(carry)` while `cond_fun(carry)`; equals `jax.lax.while_loop`.

    Under `vmap` each member stops by itself: it keeps its carry while others go on. Forward-mode
    derivatives work; reverse mode would need memory for an unknown number of steps.

    Args:
        cond_fun: a pure function from the carry to a bool, a 0-d tensor.
        body_fun: a pure function from the carry to a carry of the same structure, shapes and
            dtypes.
        init: the first carry, a tree of tensors.

    Returns:
        The carry for which `cond_fun` is false.

    Raises:
        TypeError: a leaf of the carry is not a tensor, or `cond_fun` does not return a 0-d tensor.
        ValueError: `body_fun` changed the structure, a shape or a dtype.
        NotImplementedError: a gradient is taken through the loop, in reverse mode.

    >>> while_loop(lambda x: x < 100, lambda x: x * 2, torch.tensor(3))
    tensor(192)
    >>> doubled = torch.func.vmap(lambda x: while_loop(lambda x: x < 100, lambda x: x * 2, x))
    >>> doubled(torch.arange(1, 5))
    tensor([128, 128, 192, 128])
    """
    check_function("while_loop", "cond_fun", cond_fun)
    check_function("while_loop", "body_fun", body_fun)
    init = _hide(init)
    check_tensors(tree.leaves(init), init, "while_loop: every leaf of init")

    def condition(carry: Tree) -> Tensor:
        return as_pred(cond_fun(_show(carry)))

    def body(carry: Tree) -> Tree:
        return check_carry(carry, _hide(body_fun(_show(carry))), "while_loop", "body_fun")

    if torch.compiler.is_compiling():
        return _show(_as_operator(condition, body, init))
    return _show((while_traced if is_tracing() else _in_python)(condition, body, init))


def fori_loop(
    lower: int | Tensor,
    upper: int | Tensor,
    body_fun: Callable[[Tensor, Carry], Carry],
    init: Carry,
) -> Carry:
    """Run `carry = body_fun(i, carry)` for `i` from `lower` to `upper - 1`, as `jax.lax.fori_loop`.

    With two ints it is a `scan`, and has gradients; otherwise it is a `while_loop`.

    Args:
        lower: the first `i`, an int or a 0-d integer tensor.
        upper: the end, which is not reached, an int or a 0-d integer tensor.
        body_fun: a pure function of `i`, a 0-d integer tensor, and the carry, which returns a carry
            of the same structure, shapes and dtypes.
        init: the first carry, a tree of tensors.

    Returns:
        The last carry; `init` if there are no steps.

    Raises:
        TypeError: a leaf of the carry is not a tensor, or a bound is not an integer.
        ValueError: `body_fun` changed the structure, a shape or a dtype.
        NotImplementedError: a gradient is taken in reverse mode, and a bound is a tensor.

    >>> fori_loop(1, 5, lambda i, product: product * i, torch.tensor(1))
    tensor(24)
    """
    check_function("fori_loop", "body_fun", body_fun, "(i, carry) -> carry")
    for name, bound in (("lower", lower), ("upper", upper)):
        if not isinstance(bound, int):
            check_integer("fori_loop", name, bound)
    device = next((leaf.device for leaf in tree.leaves(init) if isinstance(leaf, Tensor)), None)

    def step(i: Tensor, carry: Tree) -> Tree:
        return check_carry(_hide(carry), _hide(body_fun(i, _show(carry))), "fori_loop", "body_fun")

    if isinstance(lower, int) and isinstance(upper, int):
        if upper <= lower:
            return init
        counter = torch.arange(lower, upper, device=device)
        carry = scan(lambda carry, i: (step(i, carry), ()), _hide(init), counter)[0]
    else:
        first = torch.as_tensor(lower, device=device) + torch.zeros_like(torch.as_tensor(upper))
        carry = while_loop(
            lambda carry: carry[0] < upper,
            lambda carry: (carry[0] + 1, step(*carry)),
            (first, _hide(init)),
        )[1]
    return cast(Carry, _show(carry))


def _in_python(
    condition: Callable[[Tree], Tensor], body: Callable[[Tree], Tree], carry: Tree
) -> Tree:
    _check_forward(carry)
    pred = condition(carry)
    while innermost(pred).any():  # of all members
        new = body(carry)
        _check_forward(new)
        if is_batched(pred):
            new = tree.map(lambda x, y, p=pred: torch.where(p, x, y), new, carry)
        carry = new
        pred = condition(carry)
    return carry


def _check_forward(carry: Tree) -> None:
    """Raise if a gradient in reverse mode would pass through the carry."""
    for x in tree.leaves(carry) if torch.is_grad_enabled() else ():
        while not x.requires_grad and functorch.is_functorch_wrapped_tensor(x):
            x = functorch.get_unwrapped(x)
        if x.requires_grad:
            raise NotImplementedError(NO_REVERSE)


def _as_operator(
    condition: Callable[[Tree], Tensor], body: Callable[[Tree], Tree], carry: Tree
) -> Tree:
    leaves, spec = pytree.tree_flatten(carry)

    def flat_condition(*leaves: Tensor) -> Tensor:
        return condition(pytree.tree_unflatten(leaves, spec)).clone()

    def flat_body(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(contiguous_copy, tree.leaves(body(pytree.tree_unflatten(leaves, spec)))))

    new = while_loop_for_dynamo(flat_condition, flat_body, tuple(map(contiguous_copy, leaves)))
    return pytree.tree_unflatten(list(new), spec)
