"""Second derivatives: Hessians, and products with curvature matrices that are never formed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

from fdl import random, tree
from fdl._checks import check_function, check_positive
from fdl._compiler._map import map_batches
from fdl.optim._base import check_floating
from fdl.random._checks import check_key
from fdl.transforms._checks import check_chunk, check_scalar
from fdl.transforms._second_order import written_out
from fdl.tree import Tree


def hvp(f: Callable[[Tree], Tensor], params: Tree, v: Tree) -> Tree:
    """Multiply the Hessian of `f` at `params` by `v`, without forming it (Pearlmutter, 1994).

    Computed as the gradient of the gradient's product with v, reverse over reverse. Forward over
    reverse takes as long, and does not yet compile inside two `vmap`s.

    Args:
        f: a function from parameters to a scalar; close over the batch.
        params: a tree of floating tensors.
        v: a tree of the same paths, shapes and dtypes.

    Raises:
        ValueError: leaves that are not floating tensors, `v` differs from `params` (each path is
            listed), or the value of `f` is not a scalar.

    >>> hvp(lambda p: (p["w"] ** 3).sum(), {"w": torch.tensor([1.0, 2.0])}, {"w": torch.ones(2)})
    {'w': tensor([ 6., 12.])}
    """
    v = _like("hvp", params, v)
    scalar = scalar_of("hvp", "f", f)
    return cast(Any, vjp(grad(scalar), params)[1])(v)[0]


def gnvp(f: Callable[[Tree], Tree], loss: Callable[[Tree], Tensor], params: Tree, v: Tree) -> Tree:
    """Multiply the Gauss–Newton matrix Jᵀ H J by `v`: J of `f`, H the Hessian of `loss`.

    This is the Hessian of loss ∘ f without the curvature of f: positive semidefinite if the loss is
    convex, and the Fisher matrix if the loss is the negative log-likelihood of an exponential
    family, such as cross entropy and squared error (Schraudolph, 2002; Martens, 2014).

    Args:
        f: a function from parameters to predictions, a tree of floating tensors; close over the
            inputs.
        loss: a function from predictions to a scalar; close over the targets.
        params: a tree of floating tensors.
        v: a tree of the same paths, shapes and dtypes.

    Raises:
        ValueError: leaves that are not floating tensors, `v` differs from `params` (each path is
            listed), or the value of `loss` is not a scalar.

    >>> x = torch.tensor([[1.0], [2.0]])
    >>> squares = lambda z: (z**2).sum() / 2
    >>> gnvp(lambda p: x @ p["w"], squares, {"w": torch.ones(1)}, {"w": torch.ones(1)})   # xᵀx
    {'w': tensor([5.])}
    """
    check_function("gnvp", "f", f)
    v = _like("gnvp", params, v)
    run = written_out(f)
    predictions, pull = cast(Any, vjp(run, params))
    along = jvp(run, (params,), (v,))[1]
    curved = jvp(grad(scalar_of("gnvp", "loss", loss)), (predictions,), (along,))[1]
    return pull(curved)[0]


def hutchinson_trace(
    matvec: Callable[[Tree], Tree],
    like: Tree,
    key: Tensor,
    samples: int,
    chunk: int | None = None,
) -> Tensor:
    """Estimate the trace of a linear map as the mean of zᵀ A z over random signs z; scalar.

    Unbiased, and exact if A is diagonal; the variance of one sample is 2 Σ Aᵢⱼ² over i ≠ j if A is
    symmetric. Leaf i of sample s, in the order of sorted paths, draws from
    `fold_in(fold_in(key, s), i)`. Source: Hutchinson, 1990.

    Args:
        matvec: v ↦ A v, from a tree to a tree like it, such as `lambda v: hvp(f, params, v)`.
        like: a tree of floating tensors with the structure, shapes and dtypes that A takes.
        key: the key of all signs.
        samples: number of vectors z.
        chunk: how many vectors to multiply at once; all if None.

    Raises:
        ValueError: `samples` or `chunk` < 1, `like` has leaves that are not floating tensors, or A
            changes the structure, a shape or a dtype (each path is listed).

    >>> double = lambda v: {"w": 2 * v["w"]}
    >>> hutchinson_trace(double, {"w": torch.zeros(3)}, random.key(0), samples=1)
    tensor(6.)
    """
    check_function("hutchinson_trace", "matvec", matvec, "from a tree to a tree like it")
    check_chunk("hutchinson_trace", chunk)
    check_key("hutchinson_trace", key)
    check_positive("hutchinson_trace", "samples", samples)
    check_floating(like, "hutchinson_trace: like")
    order = sorted(tree.flatten_dict(like))

    def one(number: Tensor) -> Tensor:
        sample_key = random.fold_in(key, number)
        signs = [
            random.bernoulli(random.fold_in(sample_key, order.index(path)), 0.5, leaf.shape)
            .to(leaf.dtype)
            .mul(2)
            .sub(1)
            for path, leaf in tree.flatten_dict(like).items()
        ]
        z = pytree.tree_unflatten(signs, pytree.tree_structure(like))
        image = _like("hutchinson_trace: the result of matvec", z, written_out(matvec)(z))
        products = tree.map(lambda a, b: (a * b).sum(), z, image)
        return torch.stack(tree.leaves(products)).sum()

    return map_batches(vmap(one), torch.arange(samples, device=key.device), chunk).mean()


def hessian(f: Callable[[Tree], Tensor], chunk: int | None = None) -> Callable[[Tree], Tree]:
    """Make the Hessian `params -> h`, `h[a][b]` the block `[*shape of a, *shape of b]`.

    Each row is a product by `hvp`, reverse over reverse. `torch.func.hessian` computes all rows at
    once, forward over reverse; for layers of torch with fused kernels it is wrong (batch
    normalisation) or raises (attention, `torch.cdist`).

    Args:
        f: a function from a tree of floating tensors to a scalar.
        chunk: how many rows to compute at once; all if None.

    Raises:
        ValueError: `chunk` < 1; at call, leaves that are not floating tensors, or the value
            of `f` is not a scalar.

    >>> hessian(lambda p: p["a"] * p["b"] ** 2)({"a": torch.tensor(3.0), "b": torch.tensor(2.0)})
    {'a': {'a': tensor(0.), 'b': tensor(4.)}, 'b': {'a': tensor(4.), 'b': tensor(6.)}}
    """
    check_chunk("hessian", chunk)
    scalar = scalar_of("hessian", "f", f)

    def blocks(params: Tree) -> Tree:
        check_floating(params, "hessian")
        leaves, spec = pytree.tree_flatten(params)
        ends = [0, *accumulate(leaf.numel() for leaf in leaves)]
        numbers = torch.arange(ends[-1], device=leaves[0].device)

        def row(number: Tensor) -> Tree:
            unit = [
                (numbers[a:b] == number).to(leaf.dtype).reshape(leaf.shape)
                for leaf, a, b in zip(leaves, ends, ends[1:], strict=False)
            ]
            return cast(Any, vjp(grad(scalar), params)[1])(pytree.tree_unflatten(unit, spec))[0]

        rows = map_batches(vmap(row), numbers, chunk)
        blocks_of = [
            tree.map(
                lambda r, p=p, a=a, b=b: r[a:b].unflatten(0, p.shape) if p.ndim else r[a], rows
            )
            for p, a, b in zip(leaves, ends, ends[1:], strict=False)
        ]
        return pytree.tree_unflatten(blocks_of, spec)

    return blocks


def _like(caller: str, like: Tree, v: Tree) -> Tree:
    """Check that `v` is like `like`, and return it with its keys in the same order."""
    check_floating(like, caller)
    lines = tree.diff(like, v, values=False)
    if lines:
        raise ValueError(
            f"{caller}: trees differ in structure, shape or dtype:\n  " + "\n  ".join(lines)
        )
    return tree.map(lambda _, leaf: leaf, like, v)


def scalar_of(caller: str, name: str, f: Callable[[Tree], Tensor]) -> Callable[[Tree], Tensor]:
    """Make `f` raise unless its value is a scalar, and correct in derivatives of every order."""
    check_function(caller, name, f)
    run = written_out(f)
    return lambda params: check_scalar(caller, name, run(params))
