"""`scan` inside `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._higher_order_ops.scan import scan as scan_for_dynamo

from fdl import tree
from fdl._compiler._scan_eager import contiguous_copy, row_of, scan_as_loop
from fdl.tree import Tree
from fdl.tree._map import match


def scan_as_operator(f: Callable[..., Any], init: Tree, xs: Tree, length: int) -> tuple[Tree, Tree]:
    # The operator takes flat lists, and its body must not have side effects. So the structure of y
    # has to be known beforehand: trace f once more. Inductor drops this unused copy.
    init_leaves, carry_spec = pytree.tree_flatten(init)
    xs_leaves, x_spec = pytree.tree_flatten(xs)
    first = f(init, row_of(xs, 0))
    if any(leaf.requires_grad for leaf in tree.leaves(first)):
        # Gradients are wrong by Inductor (pytorch#153679) and, in 2.11, by autograd (#184528).
        return scan_as_loop(f, init, xs, length)
    y_spec = pytree.tree_structure(first[1])
    # It also needs a carry, xs and, in torch 2.11, a y.
    device = next((leaf.device for leaf in [*init_leaves, *xs_leaves]), None)
    init_leaves = init_leaves or [torch.zeros((), device=device)]
    xs_leaves = xs_leaves or [torch.zeros(length, device=device)]

    def unflatten(carry: list[Tensor]) -> Tree:
        return pytree.tree_unflatten(carry[: carry_spec.num_leaves], carry_spec)

    def body(leaves: list[Tensor], x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        carry = unflatten(leaves)
        new, y = f(carry, pytree.tree_unflatten(x[: x_spec.num_leaves], x_spec))
        # Outputs must not alias inputs, as unchanged leaves do, and strides must be stable.
        outputs = match(carry, new, "scan") or leaves
        ys = tree.leaves(y) or [torch.zeros((), device=device)]
        return [contiguous_copy(leaf) for leaf in outputs], [contiguous_copy(leaf) for leaf in ys]

    carry, ys = scan_for_dynamo(body, [contiguous_copy(leaf) for leaf in init_leaves], xs_leaves)
    return unflatten(carry), pytree.tree_unflatten(ys[: y_spec.num_leaves], y_spec)
