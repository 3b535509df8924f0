"""Zero tangents: torch's rules for them while tracing, and products with zeros.

Where an argument of an operation has no tangent, forward mode computes with a tensor of zeros that
needs no memory, `_efficientzerotensor`. Its products are zeros again, also 0 · ∞, and a sum with it
is the other term, also −0. Fake tensors are no such tensors, so that a traced one carries a mark.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fdl._compiler._graph import caller, is_view

aten = torch.ops.aten
MARK = "_fdl_zero_tangent"
MATRIX_PRODUCTS = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1}  # first factor


def run_operation(op: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation; with a zero tangent among the arguments, by torch's rules for these."""
    if op is aten._efficientzerotensor.default:
        return _marked(aten.zeros.default(*args, **kwargs))  # a fake one is on another device
    if op is aten._has_same_storage_numel.default:
        _unmark(args)  # from here on it is the tangent of a dual number, which has memory
    if op in RULES and any(map(_is_zero, args)):
        return RULES[op](*args, **kwargs)
    result = op(*args, **kwargs)
    if args and _is_zero(args[0]) and getattr(op, "is_view", False) and isinstance(result, Tensor):
        _marked(result)
    return result


def _mul(x: Any, y: Any) -> Tensor:
    return _marked(torch.zeros_like(x * y))


def _div(x: Any, y: Any) -> Tensor:
    return x / y if _is_zero(y) else _mul(x, y)


def _add(x: Any, y: Any, alpha: float = 1) -> Tensor:
    if not isinstance(y, Tensor):
        return torch.add(x, y, alpha=alpha)
    if _is_zero(x) and _is_zero(y):
        return _mul(x, y)
    term, scale = (x, 1) if _is_zero(y) else (y, alpha)
    copy = term.to(torch.result_type(x, y)).expand(torch.broadcast_shapes(x.shape, y.shape)).clone()
    return copy if scale == 1 else copy * scale


def _sub(x: Any, y: Any, alpha: float = 1) -> Tensor:
    return _add(x, y, alpha=-alpha)


RULES: dict[Any, Callable[..., Tensor]] = {
    aten.add.Tensor: _add,
    aten.sub.Tensor: _sub,
    aten.mul.Tensor: _mul,
    aten.mul.Scalar: _mul,
    aten.div.Tensor: _div,
    aten.div.Scalar: _div,
}


def _is_zero(x: Any) -> bool:
    return hasattr(x, MARK)


def _unmark(values: Any) -> None:
    for zeros in filter(_is_zero, values):
        delattr(zeros, MARK)


def _marked(zeros: Tensor) -> Tensor:
    setattr(zeros, MARK, True)
    return zeros


def replace_zero_products(graph: Graph) -> None:
    """Replace matrix products with zeros by sums of zeros, which need no product.

    In 0 · B an entry is NaN if its column in B has one that is not finite, and 0 otherwise.
    """
    for op, first in MATRIX_PRODUCTS.items():
        for node in graph.find_nodes(op="call_function", target=op):
            a, b = cast(Any, node.args[first:])
            if node.kwargs or not node.meta["val"].is_floating_point():
                continue
            if _is_full_of_zeros(a):
                _replace_product(graph, node, b, -2)
            elif _is_full_of_zeros(b):
                _replace_product(graph, node, a, -1)


def _replace_product(graph: Graph, node: Node, factor: Node, axis: int) -> None:
    call = caller(graph, node)
    sums = call(aten.sum.dim_IntList, call(aten.mul.Tensor, factor, 0.0), [axis], True)
    new = call(aten.expand.default, sums, list(node.meta["val"].shape))
    for bias in node.args[:-2]:
        new = call(aten.add.Tensor, new, bias)
    node.replace_all_uses_with(new)


def _is_full_of_zeros(node: Node) -> bool:
    while is_view(node) or node.target in (aten.reshape.default, aten.clone.default):
        node = cast(Node, node.args[0])
    return node.target is aten.full.default and bool(node.args[1] == 0)
