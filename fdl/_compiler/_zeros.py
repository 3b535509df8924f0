"""Zero tangents: torch's rules for them while tracing, and products with zeros.

Where an argument of an operation has no tangent, forward mode computes with a tensor of zeros that
needs no memory, `_efficientzerotensor`. Its products are zeros again, also 0 · ∞, and a sum with it
is the other term, also −0. Fake tensors are no such tensors, so that a traced one carries a mark.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fdl._compiler._graph import is_view

aten = torch.ops.aten
MARK = "_fdl_zero_tangent"
SUMS = (aten.add.Tensor, aten.sub.Tensor)
BINARY = (*SUMS, aten.mul.Tensor, aten.div.Tensor)
PRODUCTS = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1}  # the first factor


def run_operation(op: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation; with a zero tangent among the arguments, by torch's rules for these."""
    if op is aten._efficientzerotensor.default:
        return _marked(aten.zeros.default(*args, **kwargs))  # a fake one is on another device
    if args and _is_zero(args[0]) and getattr(op, "is_view", False):
        result = op(*args, **kwargs)
        return _marked(result) if isinstance(result, Tensor) else result
    if op in BINARY and any(map(_is_zero, args)) and all(isinstance(z, Tensor) for z in args):
        return _run_binary(op, *args, **kwargs)
    return op(*args, **kwargs)


def _run_binary(op: Any, x: Tensor, y: Tensor, **alpha: Any) -> Tensor:
    shape, dtype = torch.broadcast_shapes(x.shape, y.shape), torch.result_type(x, y)
    both = _is_zero(x) and _is_zero(y)
    if op is aten.mul.Tensor or (both if op in SUMS else _is_zero(x) and not both):
        return _marked(aten.zeros.default(shape, dtype=dtype, device=x.device))
    if op not in SUMS or (_is_zero(x) and alpha):
        return cast(Tensor, op(x, y, **alpha))
    term = y if _is_zero(x) else x
    copy = term.to(dtype).expand(shape).clone()
    return -copy if term is y and op is aten.sub.Tensor else copy


def _is_zero(x: Any) -> bool:
    return hasattr(x, MARK)


def _marked(zeros: Tensor) -> Tensor:
    setattr(zeros, MARK, True)
    return zeros


def replace_zero_products(graph: Graph) -> None:
    """Replace matrix products with zeros by sums of zeros, which need no product.

    In 0 · B an entry is NaN if its column in B has one that is not finite, and 0 otherwise.
    """
    for op, first in PRODUCTS.items():
        for node in graph.find_nodes(op="call_function", target=op):
            a, b = cast(Any, node.args[first:])
            if node.kwargs or not node.meta["val"].is_floating_point():
                continue
            if _is_full_of_zeros(a):
                _replace_product(graph, node, b, -2)
            elif _is_full_of_zeros(b):
                _replace_product(graph, node, a, -1)


def _replace_product(graph: Graph, product: Node, factor: Node, axis: int) -> None:
    shape = list(product.meta["val"].shape)

    def call(op: Any, *args: Any) -> Node:
        new = graph.call_function(op, args)
        values = (z.meta["val"] if isinstance(z, Node) else z for z in args)
        new.meta["val"] = op(*values)
        return new

    with graph.inserting_before(product), product.meta["val"].fake_mode:
        sums = call(aten.sum.dim_IntList, call(aten.mul.Tensor, factor, 0.0), [axis], True)
        new = call(aten.expand.default, sums, shape)
        for bias in product.args[:-2]:
            new = call(aten.add.Tensor, new, bias)
    product.replace_all_uses_with(new)


def _is_full_of_zeros(node: Node) -> bool:
    while is_view(node) or node.target in (aten.reshape.default, aten.clone.default):
        node = cast(Node, node.args[0])
    return node.target is aten.full.default and node.args[1] == 0
