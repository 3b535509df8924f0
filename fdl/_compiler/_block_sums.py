"""Sums and other reductions of one block of images, over the images or the numbers of each."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from operator import getitem
from typing import cast

import torch
from torch.fx import Node

from fdl._compiler._block_axes import (
    CONVOLUTIONS,
    MOMENTS,
    PRODUCTS,
    SUMS,
    Shape,
    reduced,
    result,
    summed,
)
from fdl._compiler._block_code import (
    Block,
    Expressions,
    axis_of,
    element,
    indices,
    keeps_axis,
    offset,
    rest,
    whole,
)
from fdl._compiler._block_layers import end
from fdl._compiler._block_products import sums_images
from fdl._compiler._graph import value_of

aten = torch.ops.aten


def first(node: Node) -> list[Node]:
    return [cast(Node, node.args[0])]


def fits_reduction(node: Node) -> bool:
    x = cast(Node, node.args[0])
    axis = axis_of(x)
    if axis is None or node.kwargs or value_of(x).dtype != value_of(node).dtype:
        return False
    if axis.axis in summed(node):
        return node.target is aten.sum.dim_IntList
    return keeps_axis(node) and value_of(x).is_floating_point()


def ends_batch(node: Node) -> bool:
    """Check for a sum over images, which is known only after all blocks."""
    if node.target is getitem:
        parent = cast(Node, node.args[0])
        if parent.target is CONVOLUTIONS[1]:
            return bool(node.args[1] != 0)
        return parent.target is MOMENTS and _is_of_images(parent)
    if node.target in PRODUCTS:
        return sums_images(node)
    return node.target in SUMS and _is_of_images(node)


def _is_of_images(node: Node) -> bool:
    axis = axis_of(node.args[0])
    return axis is not None and axis.axis in summed(node)


def heads(shape: Shape, dims: Sequence[int]) -> list[str]:
    """Write the heads of loops over some axes."""
    return [f"for (int64_t i{k} = 0; i{k} < {shape[k]}; ++i{k}) {{" for k in dims]


def emit_reduction(block: Block, node: Node) -> None:
    (x,) = first(node)
    shape, dims, ends = rest(x), summed(node), ends_batch(node)
    kept = [k for k in range(len(shape)) if k not in dims]
    code = Expressions(block)
    value = code.value(x, indices(shape))
    kept_shape = tuple(shape[k] for k in kept)
    at = offset(whole("", kept_shape), [f"i{k}" for k in kept])
    start, more, reduced = "V{}", f"reduced += {value};", "reduced"
    if node.target is aten.amax.default:
        start, more = "splat(T(-INFINITY))", f"reduced = maximum<T>({value}, reduced);"
    elif node.target is aten.mean.dim:
        reduced = f"reduced / T({prod(shape[k] for k in dims)})"
    if ends:
        total = block.total(prod(kept_shape))
        finish = f"({total})[{at}] += sum<T>(reduced, images);"
    else:
        finish = f"store({block.new(node).pointer} + {at} * L, {reduced});"
    block.step(
        *heads(shape, kept),
        f"V reduced = {start};",
        *heads(shape, dims),
        *code.lines,
        more,
        "}" * len(dims),
        finish,
        "}" * len(kept),
    )
    if ends:
        end(block, node, total)


def fits_moments(node: Node) -> bool:
    (x,) = first(node)
    axis, dims, n = axis_of(x), summed(node), value_of(x).ndim
    if axis is None:
        return False
    if axis.axis not in dims:
        return all(axis_of(z) == reduced(dims, z, x)[0](axis) for z in node.users)
    if axis.others() > 1:
        return False
    pixels = [k for k in dims if k != axis.axis]
    return pixels == list(range(n - len(pixels), n))  # channels lie before them in memory


def emit_moments(block: Block, node: Node) -> None:
    correction = node.kwargs.get("correction", 1)
    emit = _emit_moments_of_images if _is_of_images(node) else _emit_moments
    emit(block, node, 1 if correction is None else cast(float, correction))


def _emit_moments_of_images(block: Block, node: Node, correction: float) -> None:
    (x,) = first(node)
    shape, dims = rest(x), summed(node)
    channels = prod(n for k, n in enumerate(shape) if k not in dims)
    size = [shape[k] for k in dims]
    total = block.total(channels * 2 * block.width)
    pointer = block.pointer(x)
    count = prod(size)
    block.step(f"add_moments<T>({pointer}, {channels}, {count}, number - from, {total}, images);")
    results = [result(node, i) for i in range(2)]
    names = [block.given.get(r, "unused.get()") if r else "unused.get()" for r in results]
    block.ends.append(
        f"{{ std::unique_ptr<T[]> unused(new T[{channels}]); finish_moments<T>({total}, stride, "
        f"threads, {channels}, [&](int t, int n) {{ return T({count}) * images_at(t, n); }}, "
        f"T({correction}), {names[0]}, {names[1]}); }}"
    )


def _emit_moments(block: Block, node: Node, correction: float) -> None:
    """Write the variance and the mean over numbers of each image."""
    (x,) = first(node)
    shape, dims, place = rest(x), summed(node), block.place(x)
    kept = [k for k in range(len(shape)) if k not in dims]
    at = offset(whole("", tuple(shape[k] for k in kept)), [f"i{k}" for k in kept])
    count = prod(shape[k] for k in dims)
    here = f"load({element(place, indices(shape))})"
    values = f"squares / T({float(max(count - correction, 0))})", "mean"
    block.step(
        *heads(shape, kept),
        "V mean{}, squares{};",
        *heads(shape, dims),
        f"mean += {here};",
        "}" * len(dims),
        f"mean /= T({count});",
        *heads(shape, dims),
        f"const V off = {here} - mean;",
        "squares = fma(off, off, squares);",
        "}" * len(dims),
        *[
            f"store({block.new(user).pointer} + {at} * L, {values[cast(int, user.args[1])]});"
            for user in node.users
        ],
        "}" * len(kept),
    )
