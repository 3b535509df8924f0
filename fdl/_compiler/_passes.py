"""Graph rewrites: for speed on the CPU, and where Inductor's result would differ from torch's.

torch passes matrix products to MKL, which is slow for narrow matrices, and uses no vectors of 512
bits on processors of other makers. oneDNN, which torch uses for convolutions, generates kernels for
the processor at hand: the products of a classifier with ten classes took a half to a third of the
time. Small products are not worth a call of either (`_products.py`), and tiny ones are sums, which
Inductor fuses with the operations around them.

A rule applies only if the node itself proves that the result is the same to rounding;
`tests/compiler/test_passes.py` has a table for each.
"""

from __future__ import annotations

from collections.abc import Callable
from math import copysign, isnan, prod
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node

from fdl._compiler._block_pass import compute_in_blocks
from fdl._compiler._common_subexpressions import merge_equal
from fdl._compiler._divisors import NONZERO, is_nonzero
from fdl._compiler._graph import LOOP, caller, nodes_of, value_of
from fdl._compiler._indices import IN_RANGE, drop_checks, hoist_checks, is_in_range
from fdl._compiler._loop_products import move_products_out
from fdl._compiler._lowerings import is_for_onednn
from fdl._compiler._merging import merge_families
from fdl._compiler._outer_products import reduce_outer_products
from fdl._compiler._products import PRODUCT, is_small
from fdl._compiler._rows import ROWS, is_worth_it
from fdl._compiler._zeros import replace_zero_products

aten, prims = torch.ops.aten, torch.ops.prims

TINY = 4096  # multiplications; a product with at most so many is written as a sum

Call = Callable[..., Node]  # adds a call to the graph: `caller`
Rule = Callable[[Call, Node], Node | None]


def rewrite(module: GraphModule, on_cpu: bool) -> None:
    """Apply the rules to a graph and to the bodies of its loops."""
    _simplify(module)  # all of them, before a rule gives a product another name
    _specialise(module, on_cpu)


def _simplify(module: GraphModule) -> None:
    for child in module.children():
        _simplify(cast(GraphModule, child))
    replace_zero_products(module.graph)
    merge_equal(module.graph)
    reduce_outer_products(module.graph)
    drop_checks(module.graph, IN_RANGE, is_in_range)
    drop_checks(module.graph, NONZERO, is_nonzero)
    move_products_out(module)
    for node in nodes_of(module.graph, "call_function"):
        if node.target is LOOP:
            body = module.get_submodule(cast(Any, node.args[0]).target)
            hoist_checks(node, cast(GraphModule, body).graph)


def _specialise(module: GraphModule, on_cpu: bool) -> None:
    for child in module.children():
        _specialise(cast(GraphModule, child), on_cpu)
    _apply(RULES if on_cpu else EVERYWHERE, module.graph)
    if on_cpu:
        compute_in_blocks(module)
        _apply(RULES_OF_PRODUCTS, module.graph)
        merge_families(module)
    module.recompile()


def _apply(rules: dict[Any, Rule], graph: Graph) -> None:
    for node in nodes_of(graph, "call_function"):
        rule = rules.get(node.target)
        new = rule(caller(graph, node), node) if rule is not None else None
        if new is not None:
            node.replace_all_uses_with(new)
    graph.eliminate_dead_code()


def _add(call: Call, node: Node) -> Node | None:
    """Keep x + 0, which is 0 for x = −0, but which Inductor replaces by x."""
    x, y = (cast(Any, z) for z in node.args)
    if not value_of(node).is_floating_point() or node.kwargs:
        return None
    if _is_zero(x) and isinstance(y, Node):
        x, y = y, x
    return call(aten.add.Tensor, x, y, alpha=2) if _is_zero(y) else None


def _mul(call: Call, node: Node) -> Node | None:
    """Write x · 0 with 0.0, which is NaN for x = ∞; torch 2.11 takes it for 0 with the integer."""
    x, y = cast(Any, node.args)
    is_whole = isinstance(y, int) and value_of(node).is_floating_point()
    return call(aten.mul.Tensor, x, float(y)) if is_whole else None


def _full(call: Call, node: Node) -> Node | None:
    """Round a number to the dtype that it fills, which Inductor forgets in 16 bits."""
    size, value = cast(Any, node.args)
    dtype = value_of(node).dtype
    if dtype.itemsize != 2 or not dtype.is_floating_point or not isinstance(value, float):
        return None
    rounded = torch.tensor(value, dtype=dtype).item()
    differs = rounded != value and not isnan(value)
    return call(aten.full.default, size, rounded, **node.kwargs) if differs else None


def _permute(call: Call, node: Node) -> Node | None:
    """Remove a permutation that changes nothing.

    As a constant of a loop, it makes the program of Inductor's C++ wrapper crash.
    """
    x, axes = cast(Any, node.args)
    n = len(axes)
    return cast(Node, x) if [axis % n for axis in axes] == list(range(n)) else None


def _mm(call: Call, node: Node) -> Node | None:
    return _product(call, node, None, *cast(Any, node.args))


def _addmm(call: Call, node: Node) -> Node | None:
    if node.kwargs:  # beta, alpha
        return None
    return _product(call, node, *cast(Any, node.args))


def _product(call: Call, node: Node, bias: Node | None, a: Node, b: Node) -> Node | None:
    (m, k), n = value_of(a).shape, value_of(b).shape[1]
    dtype = value_of(node).dtype
    # Sums of integers would be int64; torch's kernel accumulates 16-bit numbers in float32.
    if m * n * k <= TINY and dtype in (torch.float32, torch.float64):
        # [m, k, 1] · [1, k, n], summed over k
        products = call(
            aten.mul.Tensor, call(aten.unsqueeze.default, a, 2), call(aten.unsqueeze.default, b, 0)
        )
        new = call(aten.sum.dim_IntList, products, [1])
        return new if bias is None else call(aten.add.Tensor, new, bias)
    fits = bias is None or value_of(bias).shape == (n,)
    if fits and is_small(value_of(a), value_of(b)):
        return call(PRODUCT, a, b, bias)
    if m * n * k > TINY and dtype == torch.float32 and fits and is_for_onednn(m, k, n):
        transposed = call(aten.permute.default, b, [1, 0])
        return call(torch.ops.fdl.linear.default, a, transposed, bias)
    return None


def _bmm(call: Call, node: Node) -> Node | None:
    a, b = cast(Any, node.args)
    return call(PRODUCT, a, b, None) if is_small(value_of(a), value_of(b)) else None


def _scatter_add(call: Call, node: Node) -> Node | None:
    into, dim, index, source = cast(Any, node.args)
    if not _is_zeros(into) or dim not in (-1, value_of(into).ndim - 1):
        return None
    if _are_distinct(index):
        return call(aten.scatter.src, into, dim, index, source)
    return _scatter_by_comparison(call, into, index, source)


def _are_distinct(index: Node) -> bool:
    """Check for the indices of a max pooling whose windows do not overlap.

    No two gradients go to the same pixel then, so a store can replace the atomic addition.
    """
    positions = prod(value_of(index).shape[-1:])
    while index.target in (aten.view.default, aten.reshape.default, IN_RANGE):
        index = cast(Node, index.args[0])
    if index.target is not prims._low_memory_max_pool_offsets_to_indices.default:
        return False
    _, kernel, _, stride, padding, dilation = cast(Any, index.args)
    spans = (d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
    disjoint = all(span <= s for span, s in zip(spans, stride, strict=True)) and not any(padding)
    # Indices count the pixels of one image: each row has to be the windows of one image.
    return bool(disjoint and positions == prod(value_of(index).shape[-len(kernel) :]))


def _scatter_by_comparison(call: Call, into: Node, index: Node, source: Node) -> Node | None:
    """Write one entry per row by comparison, as in the derivative of cross entropy.

    A scatter is a call with a buffer to fill; a comparison fuses with its neighbours.
    """
    shape, index_shape = value_of(into).shape, value_of(index).shape
    if index_shape != (*shape[:-1], 1) or value_of(source).shape != index_shape:
        return None
    options = {"dtype": value_of(index).dtype, "device": value_of(index).device}
    columns = call(prims.iota.default, shape[-1], start=0, step=1, requires_grad=False, **options)
    zero = call(aten.full.default, [], 0, dtype=value_of(source).dtype, device=options["device"])
    return call(aten.where.self, call(aten.eq.Tensor, columns, index), source, zero)


def _index(call: Call, node: Node) -> Node | None:
    x, indices = cast(Any, node.args)
    if len(indices) != 1 or not is_worth_it(value_of(x), value_of(indices[0])):
        return None
    return call(ROWS, x, indices[0])


def _avg_pool_backward(call: Call, node: Node) -> Node | None:
    """Divide by the size of each window first if some extend beyond the padding.

    Inductor divides by the size of the kernel (pytorch#198119).
    """
    grad, x, kernel, stride, padding, ceil_mode, count_padding, divisor = cast(Any, node.args)
    if not (ceil_mode and count_padding) or divisor is not None:
        return None
    stride, padding = stride or kernel, padding or [0] * len(kernel)
    area: Any = 1
    for axis in range(-len(kernel), 0):
        size, windows = value_of(x).shape[axis], value_of(grad).shape[axis]
        options = {"dtype": torch.int64, "device": value_of(grad).device, "requires_grad": False}
        # What is left of the padded axis from the start of each window on.
        left = {"start": size + 2 * padding[axis], "step": -stride[axis]}
        sides = call(
            aten.minimum.default,
            call(prims.iota.default, windows, **left, **options),
            call(aten.full.default, [], kernel[axis], dtype=torch.int64, device=options["device"]),
        )
        for _ in range(-axis - 1):
            sides = call(aten.unsqueeze.default, sides, -1)
        area = call(aten.mul.Tensor, sides, area)
    shares = call(aten.div.Tensor, grad, area)
    return call(node.target, shares, x, kernel, stride, padding, ceil_mode, count_padding, 1)


def _is_zeros(node: Node) -> bool:
    return node.target is aten.full.default and bool(node.args[1] == 0)


def _is_zero(x: Any) -> bool:
    """Check for the number 0, not −0, or a tensor filled with it."""
    while isinstance(x, Node) and x.target is aten.expand.default:
        x = x.args[0]
    if isinstance(x, Node):
        x = x.args[1] if x.target is aten.full.default else 1
    return bool(x == 0 and copysign(1, x) == 1)


# A rule returns the replacement of a node, or None to keep it.
EVERYWHERE: dict[Any, Rule] = {  # for correctness, also on CUDA
    aten.add.Tensor: _add,
    aten.full.default: _full,
    aten.mul.Tensor: _mul,
    aten.permute.default: _permute,
    aten.avg_pool2d_backward.default: _avg_pool_backward,
    aten.avg_pool3d_backward.default: _avg_pool_backward,
}
RULES: dict[Any, Rule] = {
    **EVERYWHERE,
    aten.scatter_add.default: _scatter_add,
    aten.index.Tensor: _index,
}
RULES_OF_PRODUCTS: dict[Any, Rule] = {  # of those that are not computed in blocks
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.bmm.default: _bmm,
}
