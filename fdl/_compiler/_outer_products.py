"""Do not compute the gradients of single examples where only their norms and sums are needed.

The gradient of example n by the weights of a linear layer is an outer product aₙ bₙᵀ. Its squared
norm is ‖aₙ‖² ‖bₙ‖², and a weighted sum over the examples is a product of two matrices. Source:
Goodfellow, Efficient Per-Example Gradient Computations, 2015, https://arxiv.org/abs/1510.01799
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch.fx import Graph, Node

from fdl._compiler._graph import VIEWS, caller, literal, nodes_of, value_of

aten, prims = torch.ops.aten, torch.ops.prims
CONVERT = prims.convert_element_type.default
SAME = (*VIEWS, aten.expand.default)


class Outer(NamedTuple):
    """The product of a: `[n, rows, 1]` and b: `[n, 1, columns]`."""

    a: Node
    b: Node


Weighting = tuple[str, Node]  # "mask" or "factor" of the examples: `[n, 1, 1]`


def reduce_outer_products(graph: Graph) -> None:
    """Replace the norms and sums of outer products of which nothing else is read."""
    for node in nodes_of(graph, "call_function"):
        outer = _outer(node)
        if outer is None:
            continue
        norms: list[tuple[Node, torch.dtype]] = []
        sums: list[tuple[Node, list[Weighting]]] = []
        if _all_reduced(node, norms, sums):
            for total, dtype in norms:
                total.replace_all_uses_with(_squared_norm(outer, total, dtype))
            for total, weightings in sums:
                total.replace_all_uses_with(_weighted_sum(outer, total, weightings))


def _outer(node: Node) -> Outer | None:
    if node.target is not aten.mul.Tensor or value_of(node).ndim != 3:
        return None
    a, b = node.args
    n, rows, columns = value_of(node).shape
    if not isinstance(a, Node) or not isinstance(b, Node) or min(rows, columns) < 2:
        return None
    if value_of(a).shape == (n, 1, columns):
        a, b = b, a
    fits = value_of(a).shape == (n, rows, 1) and value_of(b).shape == (n, 1, columns)
    floats = value_of(node).is_floating_point() and value_of(a).dtype == value_of(b).dtype
    return Outer(a, b) if fits and floats else None


def _all_reduced(
    node: Node,
    norms: list[tuple[Node, torch.dtype]],
    sums: list[tuple[Node, list[Weighting]]],
    weightings: tuple[Weighting, ...] = (),
) -> bool:
    """Follow the users of a product; return False if one reads the product itself."""
    shape = value_of(node).shape
    for user in node.users:
        if user.target in SAME and value_of(user).shape == shape and not weightings:
            fits = _all_reduced(user, norms, sums)
        elif user.target is CONVERT and not weightings:
            rounded: list[tuple[Node, list[Weighting]]] = []
            fits = _all_reduced(user, norms, rounded) and not rounded
        elif _is_norm(user, node, norms) and not weightings:
            fits = True
        elif user.target is aten.sum.dim_IntList:
            fits = user.args[1:] == ([0],) and not user.kwargs
            sums.append((user, list(weightings)))
        else:
            weighting = _weighting(user, node)
            fits = weighting is not None and _all_reduced(
                user, norms, sums, (*weightings, weighting)
            )
        if not fits:
            return False
    return bool(node.users)


def _is_norm(square: Node, product: Node, norms: list[tuple[Node, torch.dtype]]) -> bool:
    """Check for the sum of squares over rows and columns."""
    if square.target is not aten.mul.Tensor or square.args != (product, product):
        return False
    for total in square.users:
        if total.target is not aten.sum.dim_IntList or total.kwargs:
            return False
        if sorted(axis % 3 for axis in cast(Any, total.args[1])) != [1, 2]:
            return False
        norms.append((total, value_of(square).dtype))
    return True


def _weighting(user: Node, node: Node) -> Weighting | None:
    examples = (value_of(node).shape[0], 1, 1)
    if user.op == "output" or value_of(user).dtype != value_of(node).dtype:
        return None
    if user.target is aten.where.self and user.args[1] is node and literal(user.args[2]) == 0:
        condition = cast(Node, user.args[0])
        return ("mask", condition) if value_of(condition).shape == examples else None
    if user.target is aten.mul.Tensor:
        factors = [x for x in user.args if x is not node]
        if len(factors) == 1 and isinstance(factors[0], Node):
            return ("factor", factors[0]) if value_of(factors[0]).shape == examples else None
    return None


def _squared_norm(outer: Outer, total: Node, dtype: torch.dtype) -> Node:
    call = caller(total.graph, total)
    parts = []
    for x in outer:
        y = call(CONVERT, x, dtype) if value_of(x).dtype != dtype else x
        parts.append(call(aten.sum.dim_IntList, call(aten.mul.Tensor, y, y), *total.args[1:]))
    return call(aten.mul.Tensor, *parts)


def _weighted_sum(outer: Outer, total: Node, weightings: list[Weighting]) -> Node:
    call = caller(total.graph, total)
    a, b = outer
    zero = call(aten.full.default, [], 0, dtype=value_of(a).dtype, device=value_of(a).device)
    for kind, x in weightings:
        if kind == "factor":
            a = call(aten.mul.Tensor, a, x)
        else:
            a, b = (call(aten.where.self, x, z, zero) for z in (a, b))
    rows, columns = value_of(total).shape
    n = value_of(a).shape[0]
    left = call(aten.permute.default, call(aten.view.default, a, [n, rows]), [1, 0])
    return call(aten.mm.default, left, call(aten.view.default, b, [n, columns]))
