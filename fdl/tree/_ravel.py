"""A tree as one vector, for algorithms that know vectors alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from fdl._checks import describe
from fdl.tree._checks import check_tensors
from fdl.tree._paths import Tree, sorted_order
from fdl.tree._structure import flatten, unflatten
from fdl.tree._summary import dtype_name


def ravel(tree: Tree) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """Concatenate the leaves of a tree to one vector; return it and the function back to a tree.

    Equals `jax.flatten_util.ravel_pytree`: the keys of every dict count in sorted order, so that
    the vectors of parameters and gradients fit each other, whatever the order in which they were
    filled. Leaves of several dtypes are converted to the one that torch promotes them to, in which
    a large int64 may lose bits; `partition` splits a tree before.

    It can be differentiated, mapped and compiled, and so can `unravel`, of which all results have
    memory of their own.

    Args:
        tree: a tree of tensors, on one device.

    Returns:
        The vector `[size(tree)]`, float32 if there are no leaves; and `unravel`, from such a vector
        to a tree of the structure, shapes and dtypes of `tree`. If all leaves have one dtype,
        `unravel` keeps that of its vector: a float64 vector of SciPy gives a float64 tree.

    Raises:
        TypeError: a leaf is not a tensor (with its path); at `unravel`, the vector is none, or the
            leaves have several dtypes and the vector's is not that to which `ravel` promoted them.
        ValueError: at `unravel`, the vector has another length or number of axes.

    >>> vector, unravel = ravel({"w": torch.ones(2, 2), "b": torch.zeros(1)})
    >>> vector
    tensor([0., 1., 1., 1., 1.])
    >>> unravel(2 * vector)
    {'w': tensor([[2., 2.],
            [2., 2.]]), 'b': tensor([0.])}
    """
    leaves, structure = flatten(tree)
    check_tensors(leaves, tree, "tree.ravel: every leaf")
    if not leaves:
        return torch.zeros(0), partial(_unravel, structure, [], [], [], None)
    order = sorted_order(tree)
    dtypes = [leaf.dtype for leaf in leaves]
    common = reduce(torch.promote_types, dtypes)
    vector = torch.cat([leaves[i].reshape(-1).to(common) for i in order])
    shapes = [leaf.shape for leaf in leaves]
    mixed = common if len(set(dtypes)) > 1 else None
    return vector, partial(_unravel, structure, order, shapes, dtypes, mixed)


def _unravel(
    structure: Any,
    order: list[int],
    shapes: list[torch.Size],
    dtypes: list[torch.dtype],
    mixed: torch.dtype | None,
    vector: Tensor,
) -> Tree:
    """Undo `ravel`; `mixed` is the dtype of the vector if the leaves have several."""
    if not isinstance(vector, Tensor):
        raise TypeError(f"unravel: expected a tensor, got {describe(vector)}")
    sizes = [math.prod(shape) for shape in shapes]
    if vector.shape != (sum(sizes),):
        raise ValueError(
            f"unravel: expected a vector [{sum(sizes)}], as ravel returned, got "
            f"{list(vector.shape)}"
        )
    if mixed is not None and vector.dtype != mixed:
        raise TypeError(
            f"unravel: expected {dtype_name(mixed)}, to which ravel promoted leaves of several "
            f"dtypes, got {dtype_name(vector.dtype)}"
        )
    pieces = dict(zip(order, vector.split([sizes[i] for i in order]), strict=True)) if order else {}
    leaves = [
        pieces[i]
        .reshape(shape)
        .to(
            vector.dtype if mixed is None else dtype,
            copy=True,
            memory_format=torch.contiguous_format,
        )
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    return unflatten(leaves, structure)
