"""The operations that keep the images of a batch apart, and how a block of them is computed.

A rule says which inputs of a node have the axis of images, and whether the node is one that it can
write; `emit` adds the steps to a block.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem
from typing import Any, NamedTuple, cast

import torch
from torch.fx import Node

from fdl._compiler._block_axes import (
    MAX_POOL,
    MOMENTS,
    PRODUCTS,
    SUMS,
    Axis,
    dims_of,
    joined,
    max_pool_backward,
    shape_of,
)
from fdl._compiler._block_code import (
    COMPARISONS,
    CONVERT,
    COPIES,
    ELEMENTWISE,
    FMA,
    MASKS,
    Block,
    Place,
    axis_of,
    expression_of,
    is_mask,
    keeps_axis,
    name_of,
    operands,
    rest,
    strides_after,
    whole,
)
from fdl._compiler._block_layers import (
    emit_average_pool,
    emit_average_pool_backward,
    emit_convolution,
    emit_convolution_backward,
    emit_max_pool,
    emit_max_pool_backward,
    fits_convolution,
    fits_pool,
)
from fdl._compiler._block_products import batched_factors, emit_product, fits_product
from fdl._compiler._block_sums import (
    emit_moments,
    emit_reduction,
    first,
    fits_moments,
    fits_reduction,
)
from fdl._compiler._graph import VIEWS, literal, value_of

aten = torch.ops.aten
PLAIN_FORMATS = (None, torch.contiguous_format, torch.preserve_format)


class Rule(NamedTuple):
    """How an operation is written."""

    inputs: Callable[[Node], list[Node]]  # those with the axis of images
    fits: Callable[[Node], bool]
    emit: Callable[[Block, Node], None]
    is_cheap: bool = False  # rather computed again than kept
    is_written: bool = True  # by a step of its own, not as part of an expression
    reads_expressions: bool = False  # inputs that are elementwise need not be in memory


# Elementwise functions


def batch_operands(node: Node) -> list[Node]:
    """List the operands that have the axis of images."""
    axis = axis_of(node)
    values = [x for x in operands(node) if isinstance(x, Node) and literal(x) is None]
    return [x for x in values if axis_of(x) == axis and value_of(x).ndim == value_of(node).ndim]


def fits_elementwise(node: Node) -> bool:
    if axis_of(node) is None or not reads_all(node) or not fits_kinds(node):
        return False
    alike = batch_operands(node)
    others = [
        x for x in operands(node) if isinstance(x, Node) and literal(x) is None and x not in alike
    ]
    if not alike or not all(is_shared(x, node) for x in others):
        return False
    dtypes = {value_of(x).dtype for x in [node, *alike, *others]}
    return len(dtypes - {torch.bool}) <= 1


def reads_all(node: Node) -> bool:
    """Check that the expression for an operation depends on all of its arguments."""
    harmless = {"alpha": (1,), "memory_format": PLAIN_FORMATS}
    arity = sum(f"{{{i}}}" in cast(str, expression_of(node)) for i in range(3))
    arguments = len(node.args) - (node.target is CONVERT)
    return arguments == arity == len(operands(node)) and all(
        value in harmless.get(name, ()) for name, value in node.kwargs.items()
    )


def fits_kinds(node: Node) -> bool:
    """Check which operands are masks, and whether the result is one."""
    kinds, result, name = [is_mask(x) for x in operands(node)], is_mask(node), name_of(node)
    if name in MASKS:
        return all(kinds) and result
    if name in COPIES:
        return kinds == [result]
    first_is_mask = name == "where" or node.target is CONVERT
    return kinds[0] == first_is_mask and not any(kinds[1:]) and result == (name in COMPARISONS)


def is_shared(x: Node, node: Node) -> bool:
    """Check for an operand that is the same for all images."""
    shape, axis = shape_of(x), cast(Axis, axis_of(node)).axis
    k = axis - (value_of(node).ndim - len(shape))
    return bool(k < 0 or shape[k] == 1) and not is_mask(x)


def emit_elementwise(block: Block, node: Node) -> None:
    block.place(node)


# Views


def emit_reshape(block: Block, node: Node) -> None:
    (x,) = first(node)
    place, shape = block.place(x), rest(node)
    strides = strides_after(place.shape, place.strides, shape)
    if strides is None:
        block.places[node] = whole(block.copy(place).pointer, shape)
    else:
        block.places[node] = Place(place.pointer, shape, strides, place.start)


def emit_view(block: Block, node: Node) -> None:
    (x,) = first(node)
    place, shape = block.place(x), rest(node)
    strides, start, n = list(place.strides), place.start, len(place.shape)
    more: Any = list(node.args[1:])
    if node.target is aten.expand.default:
        pairs = zip(place.shape, strides, strict=True)
        strides = [0] * (len(shape) - n) + [0 if size == 1 else stride for size, stride in pairs]
    elif node.target is aten.permute.default:
        strides = [strides[k % n] for k in more[0]]
    elif node.target is aten.unsqueeze.default:
        strides.insert(more[0] % (n + 1), 0)
    elif node.target is aten.select.int:
        k, i = more[0] % n, more[1]
        start += (i + place.shape[k] if i < 0 else i) * strides[k]
        del strides[k]
    elif node.target is aten.slice.Tensor:
        k, begin, _, step = cast(Any, [*more, *[0, None, None, 1][len(more) :]])
        size = place.shape[k % n]
        begin = 0 if begin is None else max(begin + size, 0) if begin < 0 else min(begin, size)
        start += begin * strides[k % n]
        strides[k % n] *= step
    else:  # squeeze
        gone = [k for k in dims_of(node, n) if shape_of(x)[k] == 1]
        strides = [stride for k, stride in enumerate(strides) if k not in gone]
    block.places[node] = Place(place.pointer, shape, tuple(strides), start)


# Concatenation and padding


def parts(node: Node) -> list[Node]:
    return list(cast(Any, node.args[0]))


def fits_cat(node: Node) -> bool:
    (dim,) = dims_of(node, value_of(node).ndim)
    axis = axis_of(node)
    return axis is not None and all(
        axis_of(x) == joined(dim, shape_of(x), axis) for x in parts(node)
    )


def emit_cat(block: Block, node: Node) -> None:
    (dim,) = dims_of(node, value_of(node).ndim)
    sources = [block.place(x) for x in parts(node)]
    to, start = block.new(node), 0
    for source in sources:
        block.copy(source, to._replace(shape=source.shape, start=start))
        start += source.shape[dim] * to.strides[dim]


def emit_nothing(block: Block, node: Node) -> None:
    """Leave it to the operation of which this is a result."""


elementwise = Rule(batch_operands, fits_elementwise, emit_elementwise, True, False)
reshape = Rule(first, keeps_axis, emit_reshape, True)
view = Rule(first, keeps_axis, emit_view, True)
reduction = Rule(first, fits_reduction, emit_reduction, reads_expressions=True)
RULES: dict[Any, Rule] = {
    **dict.fromkeys((*ELEMENTWISE, FMA), elementwise),
    **dict.fromkeys(VIEWS, reshape),
    aten.expand.default: view,
    aten.permute.default: view,
    aten.unsqueeze.default: view,
    aten.squeeze.dim: view,
    aten.squeeze.dims: view,
    aten.slice.Tensor: view,
    aten.select.int: view,
    aten.cat.default: Rule(parts, fits_cat, emit_cat, True),
    aten.convolution.default: Rule(first, fits_convolution, emit_convolution),
    aten.convolution_backward.default: Rule(
        lambda node: list(node.args[:2]),  # type: ignore[arg-type]
        fits_convolution,
        emit_convolution_backward,
    ),
    aten.avg_pool2d.default: Rule(first, fits_pool, emit_average_pool, True),
    aten.avg_pool2d_backward.default: Rule(first, fits_pool, emit_average_pool_backward, True),
    MAX_POOL: Rule(first, fits_pool, emit_max_pool, True),
    **dict.fromkeys(PRODUCTS, Rule(batched_factors, fits_product, emit_product)),
    **dict.fromkeys((*SUMS, aten.amax.default), reduction),
    MOMENTS: Rule(first, fits_moments, emit_moments),
    getitem: Rule(first, lambda _: True, emit_nothing, True),
}
MAX_POOL_BACKWARD = Rule(
    lambda node: list(max_pool_backward(node)[:2]),  # type: ignore[index]
    fits_pool,
    emit_max_pool_backward,
    True,
)


def rule_of(node: Node) -> Rule | None:
    """Return the rule for a node, if one can write it."""
    if max_pool_backward(node) is not None:
        return MAX_POOL_BACKWARD
    rule = RULES.get(node.target) or RULES.get(str(node.target))
    return rule if rule is not None and rule.fits(node) else None
