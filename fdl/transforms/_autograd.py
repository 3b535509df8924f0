"""Gradients by `torch.autograd.grad`, where those of `torch.func` cannot be taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl import tree
from fdl._checks import describe
from fdl._modes import active, in_forward_mode
from fdl.optim._base import check_floating
from fdl.transforms._checks import check_scalar
from fdl.tree import Tree
from fdl.tree._structure import flatten, unflatten

NAME = "autograd_grad_and_value"


def autograd_grad_and_value(f: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., Any]:
    """Equal `torch.func.grad_and_value`, but by `torch.autograd.grad`; a `grad_fn` of `train_step`.

    It is for functions that call a `torch.autograd.Function` without `setup_context`, which
    `torch.func` refuses, as gpytorch and the adaptive solvers of torchdiffeq have them. For all
    others `torch.func.grad_and_value` gives the same bits and composes. This one works eagerly, in
    `fdl.jit` and in `fdl.scan`, not under `vmap`, `grad` and `jvp`, nor in `torch.compile`; what it
    returns is constant, so there are no second derivatives.

    Args:
        f: a function that returns a scalar, or a pair of a scalar and any tree.
        has_aux: f returns such a pair.

    Returns:
        A function of the arguments of f. It returns `(grads, value)`, or `(grads, (value, aux))`,
        with gradients with respect to the first argument.

    Raises:
        ValueError: at call: a leaf of the first argument is not floating, or requires a gradient
            itself (each path is listed); f does not return a scalar.
        TypeError: at call: f does not return a pair, although `has_aux`.
        NotImplementedError: at call: a transformation is active, `torch.compile` is tracing, or
            `torch.inference_mode` is on.

    >>> class Square(torch.autograd.Function):
    ...     @staticmethod
    ...     def forward(ctx, x):
    ...         ctx.save_for_backward(x)
    ...         return x * x
    ...     @staticmethod
    ...     def backward(ctx, g):
    ...         return 2 * ctx.saved_tensors[0] * g
    >>> autograd_grad_and_value(lambda params: Square.apply(params["w"]))({"w": torch.tensor(3.0)})
    ({'w': tensor(6.)}, tensor(9.))
    """

    def call(params: Tree, *args: Any, **kwargs: Any) -> tuple[Tree, Any]:
        _check(params)
        with torch.enable_grad():
            leaves, structure = flatten(params)
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            result = f(unflatten(leaves, structure), *args, **kwargs)
            if has_aux and not (isinstance(result, tuple) and len(result) == 2):
                raise TypeError(f"{NAME}: f must return (value, aux), got {describe(result)}")
            value = check_scalar(NAME, "f", result[0] if has_aux else result)
            grads = (
                torch.autograd.grad(value, leaves, materialize_grads=True)
                if value.requires_grad
                else map(torch.zeros_like, leaves)
            )
        constants = pytree.tree_map_only(Tensor, Tensor.detach, result)
        return unflatten([g.detach() for g in grads], structure), constants

    return call


def _check(params: Tree) -> None:
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{NAME}: torch.compile cannot trace torch.autograd.grad; use fdl.jit"
        )
    if torch.is_inference_mode_enabled():  # in which nothing is recorded, not even by enable_grad
        raise NotImplementedError(
            f"{NAME}: torch.inference_mode records no gradients; use torch.no_grad, or none of them"
        )
    transformations = {*active()} & {"Vmap", "Grad", "Jvp"}
    if transformations or in_forward_mode():
        within = ", ".join(sorted(name.lower() for name in transformations or {"jvp"}))
        raise NotImplementedError(
            f"{NAME}: torch.autograd.grad does not work inside {within}; use "
            "torch.func.grad_and_value, or loop over the members instead of vmap"
        )
    check_floating(params, NAME)
    lines = [path for path, leaf in tree.flatten_dict(params).items() if leaf.requires_grad]
    if lines and torch.is_grad_enabled():
        raise ValueError(
            f"{NAME}: these leaves require gradients, which would be lost, since the result is "
            "constant; detach them first:\n  " + "\n  ".join(lines)
        )
