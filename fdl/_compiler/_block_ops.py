"""The operations that keep the images of a batch apart, and how a block of them is computed.

A rule says which inputs of a node have the axis of images, and whether the node is one that it can
write; `emit` adds the steps to a block.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from operator import getitem
from typing import Any, NamedTuple, cast

import torch
from torch.fx import Node

from fdl._compiler._block_code import (
    ELEMENTWISE,
    Block,
    Expressions,
    Place,
    element,
    indices,
    literal,
    operands,
    rest,
    shape_of,
    strides_of,
)
from fdl._compiler._block_layers import (
    MAX_POOL,
    VIEWS,
    emit_average_pool,
    emit_average_pool_backward,
    emit_convolution,
    emit_convolution_backward,
    emit_max_pool,
    emit_max_pool_backward,
    end,
    fits_convolution,
    fits_pool,
    max_pool_backward,
    result,
)
from fdl._compiler._graph import value_of

aten, prims = torch.ops.aten, torch.ops.prims


class Rule(NamedTuple):
    """How an operation is written."""

    inputs: Callable[[Node], list[Node]]  # those with the axis of images
    fits: Callable[[Node], bool]
    emit: Callable[[Block, Node], None]
    is_cheap: bool = False  # rather computed again than kept
    is_written: bool = True  # by a step of its own, not as part of an expression


def first(node: Node) -> list[Node]:
    return [cast(Node, node.args[0])]


# Elementwise functions


def batch_operands(node: Node) -> list[Node]:
    """List the operands that have the axis of images."""
    shape = shape_of(node)
    values = [x for x in operands(node) if isinstance(x, Node) and literal(x) is None]
    return [x for x in values if shape_of(x)[:1] == shape[:1] and value_of(x).ndim == len(shape)]


def fits_elementwise(node: Node) -> bool:
    shape, value = shape_of(node), value_of(node)
    alike = batch_operands(node)
    if len(shape) < 2 or not alike or node.kwargs.get("alpha", 1) != 1:
        return False
    if node.kwargs.get("rounding_mode") or node.kwargs.get("memory_format") not in (
        None,
        torch.contiguous_format,
        torch.preserve_format,
    ):
        return False
    numbers = {value_of(x).dtype for x in alike} | {value.dtype}
    compares = "{0} <" in (text := ELEMENTWISE[node.target]) or "=" in text or "{0} >" in text
    if compares and any(value_of(x).dtype is torch.bool for x in alike):
        return False
    if node.target is prims.convert_element_type.default and (
        value_of(alike[0]).dtype is not torch.bool or value.dtype is torch.bool
    ):
        return False
    for x in operands(node):
        if isinstance(x, Node) and literal(x) is None and x not in alike:
            if shape_of(x)[: max(0, len(shape_of(x)) - len(shape) + 1)] not in ((), (1,)):
                return False
            numbers.add(value_of(x).dtype)
            if value_of(x).dtype is torch.bool:
                return False
    return len(numbers - {torch.bool}) <= 1


def emit_elementwise(block: Block, node: Node) -> None:
    block.place(node)


# Views


def same_rows(node: Node) -> bool:
    """Check for a reshape of each image by itself."""
    x = cast(Node, node.args[0])
    return shape_of(x)[:1] == shape_of(node)[:1] and value_of(x).ndim > 1 < value_of(node).ndim


def emit_reshape(block: Block, node: Node) -> None:
    (x,) = first(node)
    place = block.place(x)
    if not place.is_contiguous():
        place = block.copy(place)
    shape = rest(node)
    block.places[node] = Place(place.pointer, shape, strides_of(shape), place.start)


def keeps_first(node: Node) -> bool:
    """Check for a view by axes that does not touch the axis of images."""
    x = cast(Node, node.args[0])
    before, after = shape_of(x), shape_of(node)
    n = len(before)
    if n < 2 or len(after) < 2 or before[0] != after[0]:
        return False
    if node.target is aten.expand.default:
        return n == len(after)
    axes: Any = node.args[1] if len(node.args) > 1 else 0
    listed = axes if isinstance(axes, list | tuple) else [axes]
    if node.target is aten.permute.default:
        return bool(listed[0] % n == 0)
    size = n + 1 if node.target is aten.unsqueeze.default else n
    return all(axis % size for axis in listed)


def emit_view(block: Block, node: Node) -> None:
    (x,) = first(node)
    place, shape = block.place(x), rest(node)
    strides = list(place.strides)
    start, n = place.start, len(place.shape) + 1
    more = list(node.args[1:])
    if node.target is aten.expand.default:
        strides = [
            0 if old == 1 else stride for old, stride in zip(place.shape, strides, strict=True)
        ]
    elif node.target is aten.permute.default:
        strides = [strides[axis % n - 1] for axis in cast(Any, more[0])[1:]]
    elif node.target is aten.unsqueeze.default:
        strides.insert(cast(int, more[0]) % (n + 1) - 1, 0)
    elif node.target is aten.slice.Tensor:
        axis, begin, _, step = cast(Any, (more + [0, None, None, 1][len(more) :]))
        size = place.shape[axis % n - 1]
        begin = 0 if begin is None else max(begin + size, 0) if begin < 0 else min(begin, size)
        start += begin * strides[axis % n - 1]
        strides[axis % n - 1] *= step
    elif node.target in (aten.squeeze.dim, aten.squeeze.dims):
        axes = more[0] if isinstance(more[0], list | tuple) else [more[0]]
        gone = {axis % n - 1 for axis in cast(Any, axes) if place.shape[axis % n - 1] == 1}
        strides = [s for axis, s in enumerate(strides) if axis not in gone]
    block.places[node] = Place(place.pointer, shape, tuple(strides), start)


# Concatenation and padding


def parts(node: Node) -> list[Node]:
    return list(cast(Any, node.args[0]))


def fits_cat(node: Node) -> bool:
    n, axis = value_of(node).ndim, node.args[1] if len(node.args) > 1 else 0
    alike = all(value_of(x).ndim == n for x in parts(node))
    return n > 1 and alike and cast(int, axis) % n != 0


def emit_cat(block: Block, node: Node) -> None:
    axis = cast(int, node.args[1]) % value_of(node).ndim - 1
    sources = [block.place(x) for x in parts(node)]
    to, start = block.new(node), 0
    for source in sources:
        block.copy(source, to._replace(shape=source.shape, start=start))
        start += source.shape[axis] * to.strides[axis]


# Sums


SUMS = (aten.sum.dim_IntList, aten.mean.dim)


def read_sum(node: Node) -> list[int]:
    x = cast(Node, node.args[0])
    n = value_of(x).ndim
    axes = cast(Any, node.args[1]) if len(node.args) > 1 else None
    return sorted(axis % n for axis in axes) if axes else list(range(n))


def fits_sum(node: Node) -> bool:
    x = cast(Node, node.args[0])
    if node.kwargs or value_of(x).ndim < 2 or value_of(x).dtype != value_of(node).dtype:
        return False
    if 0 in read_sum(node):
        return node.target is aten.sum.dim_IntList
    return value_of(node).ndim > 1


def ends_batch(node: Node) -> bool:
    """Check for a sum over images, which is known only after all blocks."""
    if node.target is getitem:
        parent = cast(Node, node.args[0])
        if parent.target is aten.convolution_backward.default:
            return bool(node.args[1] != 0)
        return parent.target is aten.var_mean.correction
    return node.target in SUMS and 0 in read_sum(node)


def emit_sum(block: Block, node: Node) -> None:
    (x,) = first(node)
    axes, shape = read_sum(node), rest(x)
    kept = [axis for axis in range(len(shape)) if axis + 1 not in axes]
    summed = [axis for axis in range(len(shape)) if axis + 1 in axes]
    code = Expressions(block)
    value = code.value(x, indices(shape))
    heads = {k: f"for (int64_t i{k} = 0; i{k} < {shape[k]}; ++i{k}) {{" for k in range(len(shape))}
    kept_shape = tuple(shape[k] for k in kept)
    at = element(
        Place("", kept_shape, strides_of(kept_shape)), [f"i{k}" for k in kept]
    ).removeprefix(" + ").removesuffix(" * L")  # fmt: skip
    if 0 in axes:
        total = block.total(prod(kept_shape))
        finish = f"({total})[{at}] += sum<T>(sum_of_block, images);"
    else:
        place = Place(block.buffer(prod(kept_shape), node), rest(node), strides_of(rest(node)))
        block.places[node] = place
        count = prod(shape[k] for k in summed)
        divided = f"sum_of_block / T({count})" if node.target is aten.mean.dim else "sum_of_block"
        finish = f"store({place.pointer} + {at} * L, {divided});"
    block.step(
        *[heads[k] for k in kept],
        "V sum_of_block{};",
        *[heads[k] for k in summed],
        *code.lines,
        f"sum_of_block += {value};",
        "}" * len(summed),
        finish,
        "}" * len(kept),
    )
    if 0 in axes:
        end(block, node, total)


def fits_moments(node: Node) -> bool:
    x = cast(Node, node.args[0])
    n = value_of(x).ndim
    return n >= 2 and read_sum(node) == [0, *range(2, n)]


def emit_moments(block: Block, node: Node) -> None:
    (x,) = first(node)
    channels, *size = rest(x)
    total = block.total(channels * 2 * block.width)
    pointer = block.pointer(x)
    count = prod(size)
    block.step(f"add_moments<T>({pointer}, {channels}, {count}, number - from, {total}, images);")
    results = [result(node, i) for i in range(2)]
    names = [block.given.get(r, "unused.get()") if r else "unused.get()" for r in results]
    correction = node.kwargs.get("correction", 1)
    block.ends.append(
        f"{{ std::unique_ptr<T[]> unused(new T[{channels}]); finish_moments<T>({total}, stride, "
        f"threads, {channels}, [&](int t, int n) {{ return T({count}) * images_at(t, n); }}, "
        f"T({correction}), {names[0]}, {names[1]}); }}"
    )


def emit_nothing(block: Block, node: Node) -> None:
    """Leave it to the operation of which this is a result."""


elementwise = Rule(batch_operands, fits_elementwise, emit_elementwise, True, False)
reshape = Rule(first, same_rows, emit_reshape, True)
view = Rule(first, keeps_first, emit_view, True)
RULES: dict[Any, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(VIEWS, reshape),
    aten.expand.default: view,
    aten.permute.default: view,
    aten.unsqueeze.default: view,
    aten.squeeze.dim: view,
    aten.squeeze.dims: view,
    aten.slice.Tensor: view,
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
    aten.sum.dim_IntList: Rule(first, fits_sum, emit_sum),
    aten.mean.dim: Rule(first, fits_sum, emit_sum),
    aten.var_mean.correction: Rule(first, fits_moments, emit_moments),
    getitem: Rule(first, lambda _: True, emit_nothing, True),
}
MAX_POOL_BACKWARD = Rule(
    lambda node: list(max_pool_backward(node)[:2]),  # type: ignore[index]
    lambda _: True,
    emit_max_pool_backward,
    True,
)


def rule_of(node: Node) -> Rule | None:
    """Return the rule for a node, if one can write it."""
    if max_pool_backward(node) is not None:
        return MAX_POOL_BACKWARD
    rule = RULES.get(node.target) or RULES.get(str(node.target))
    return rule if rule is not None and rule.fits(node) else None
