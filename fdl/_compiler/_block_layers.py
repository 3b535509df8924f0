"""Convolutions and pools of one block of images, by the templates of `blocks/layers.h`."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch.fx import Node

from fdl._compiler._block_axes import Axis, Shape, max_pool_backward, result, shape_of
from fdl._compiler._block_code import Block, Place, axis_of, rest, strides_of
from fdl._compiler._graph import value_of

aten = torch.ops.aten


class Convolution(NamedTuple):
    """A convolution of images; of sequences, as images of one row."""

    groups: int
    size: Shape  # of the image
    channels: int  # of all groups
    outputs: int
    kernel: Shape
    stride: Shape
    padding: Shape
    dilation: Shape

    def framed(self) -> Shape:
        return tuple(n + 2 * p for n, p in zip(self.size, self.padding, strict=True))

    def result(self) -> Shape:
        return tuple(
            (n - d * (k - 1) - 1) // s + 1
            for n, d, k, s in zip(
                self.framed(), self.dilation, self.kernel, self.stride, strict=True
            )
        )

    def backward(self) -> Convolution:
        """Return the convolution of gradients, in a frame, that gives those of the input."""
        reach = tuple(d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))
        size = tuple(n + r for n, r in zip(self.size, reach, strict=True))
        return Convolution(
            self.groups, size, self.outputs, self.channels, self.kernel, (1, 1), (0, 0),
            self.dilation,
        )  # fmt: skip

    def type(self) -> str:
        numbers = (
            self.groups, self.channels // self.groups, *self.framed(),
            self.outputs // self.groups, *self.kernel, *self.stride, *self.dilation,
        )  # fmt: skip
        return f"Shape<{', '.join(map(str, numbers))}>"


def as_pair(numbers: Any, fill: int) -> Shape:
    return (fill, *numbers) if len(numbers) == 1 else tuple(numbers)


def convolution(x: Node, weight: Node, options: Any, groups: int) -> Convolution:
    stride, padding, dilation = options
    outputs, _, *kernel = shape_of(weight)
    _, channels, *size = shape_of(x)
    return Convolution(
        groups, as_pair(size, 1), channels, outputs, as_pair(kernel, 1), as_pair(stride, 1),
        as_pair(padding, 0), as_pair(dilation, 1),
    )  # fmt: skip


def read_forward(node: Node) -> tuple[Node, Node, Node | None, Convolution]:
    x, weight, bias, stride, padding, dilation, _, _, groups = cast(Any, node.args)
    return x, weight, bias, convolution(x, weight, (stride, padding, dilation), groups)


def read_backward(node: Node) -> tuple[Node, Node, Node, Convolution, list[bool]]:
    grad, x, weight, _, stride, padding, dilation, _, _, groups, mask = cast(Any, node.args)
    return grad, x, weight, convolution(x, weight, (stride, padding, dilation), groups), mask


def fits_convolution(node: Node) -> bool:
    backward = node.target is aten.convolution_backward.default
    transposed = node.args[7 if backward else 6]
    x = cast(Node, node.args[1 if backward else 0])
    values = [x, node.args[0] if backward else node]
    return (
        not transposed
        and value_of(x).ndim in (3, 4)
        and all(axis_of(z) == Axis(shape_of(x)[0]) for z in values)
    )


def tiles(outputs: int, columns: int, registers: int, most: int = 8) -> tuple[int, int]:
    """Choose how many outputs and columns are computed in registers at a time.

    A step of the loop loads `columns` vectors and `outputs` weights for their product of sums.
    """
    best, choice = 0.0, (1, 1)
    for o in range(1, min(outputs, most) + 1):
        for j in range(1, min(columns, most) + 1):
            if o * j + j + 1 > registers:
                continue
            work = outputs * columns / (-(-outputs // o) * -(-columns // j))
            score = min(work, o * j) / (o + j)
            if score > best:
                best, choice = score, (o, j)
    return choice


def convolve(
    block: Block, node: Node, conv: Convolution, source: str, weight: str, bias: str
) -> None:
    height, width = conv.result()
    o, j = tiles(conv.outputs // conv.groups, width, block.registers)
    place = Place(block.buffer(conv.outputs * height * width, node), rest(node), ())
    block.places[node] = place._replace(strides=strides_of(place.shape))
    block.step(
        f"convolve<T, {conv.type()}, {o}, {j}>({source}, {weight}, {bias}, {place.pointer});"
    )


def emit_convolution(block: Block, node: Node) -> None:
    x, weight, bias, conv = read_forward(node)
    source = framed(block, x, conv)
    tile, _ = tiles(conv.outputs // conv.groups, conv.result()[1], block.registers)
    packed = block.pack("pack", conv.type(), tile, weight)
    convolve(block, node, conv, source, packed, block.shared[bias] if bias else "nullptr")


def framed(block: Block, x: Node, conv: Convolution) -> str:
    shape = (conv.channels, *conv.size)
    return block.frame(x, shape, conv.padding, conv.framed(), (1, 1))


def emit_convolution_backward(block: Block, node: Node) -> None:
    grad, x, weight, conv, mask = read_backward(node)
    height, width = conv.result()
    block.place(grad)
    for_weight, for_input, for_bias = result(node, 1), result(node, 0), result(node, 2)
    if mask[1] and for_weight is not None:
        source = framed(block, x, conv)
        group, kw = conv.channels // conv.groups, conv.kernel[1]
        o, c = tiles(conv.outputs // conv.groups, group * kw, block.registers)
        c = max(1, c // kw)
        o = max(1, min(o, (block.registers - 1 - c * kw) // (c * kw)))
        o = min(max(o, (block.registers - 1 - c * kw) // (c * kw)), conv.outputs // conv.groups)
        total = block.total(value_of(weight).numel())
        block.step(
            f"convolve_weights<T, {conv.type()}, {o}, {c}>"
            f"({source}, {block.pointer(grad)}, {total}, images);"
        )
        end(block, for_weight, total)
    if mask[2] and for_bias is not None:
        total = block.total(conv.outputs)
        pixels = height * width
        block.step(
            f"sum_rows<T>({block.pointer(grad)}, {conv.outputs}, {pixels}, {total}, images);"
        )
        end(block, for_bias, total)
    if mask[0] and for_input is not None:
        back = conv.backward()
        top = tuple(
            d * (k - 1) - p
            for d, k, p in zip(conv.dilation, conv.kernel, conv.padding, strict=True)
        )
        source = block.frame(grad, (conv.outputs, height, width), top, back.size, conv.stride)
        tile, _ = tiles(back.outputs // back.groups, back.result()[1], block.registers)
        packed = block.pack("pack_turned", back.type(), tile, weight)
        convolve(block, for_input, back, source, packed, "nullptr")


def end(block: Block, node: Node, total: str) -> None:
    """Add up the sums of all threads, in their order, into a result."""
    if node in block.given:
        start = total.removeprefix("totals + ")
        numbers = value_of(node).numel()
        block.ends.append(f"add_up<T>(totals + {start}, stride, threads, {numbers}, "
                          f"{block.given[node]});")  # fmt: skip


# Pooling


def pool(x: Node, out: Shape, kernel: Any, stride: Any, padding: Any, dilation: Any) -> str:
    members, channels, *size = rest(x)
    channels *= members
    pairs = [as_pair(size, 1), as_pair(out[2:], 1), as_pair(kernel, 1)]
    pairs += [as_pair(stride or kernel, 1), as_pair(padding, 0), as_pair(dilation, 1)]
    return f"Pool<{', '.join(str(n) for n in (channels, *[n for pair in pairs for n in pair]))}>"


def read_pool(node: Node) -> list[Any]:
    """Return kernel, stride, padding, ceil_mode, count_include_pad and divisor."""
    given = list(node.args[2 if "backward" in str(node.target) else 1 :])
    return [*given, *[None, [], [0, 0], False, True, None][len(given) :]]


def fits_pool(node: Node) -> bool:
    x = cast(Node, node.args[0])
    axis = axis_of(x)
    return axis is not None and axis.axis == 0 and value_of(x).ndim == 4


def average(block: Block, node: Node, x: Node, out: Shape, name: str, source: Node) -> None:
    kernel, stride, padding, _, count, divisor = read_pool(node)
    kind = pool(x, out, as_two(kernel), as_two(stride), as_two(padding), [1, 1])
    fixed = divisor
    if not divisor and (not any(as_two(padding)) and not node_overhangs(x, out, kernel, stride)):
        fixed = prod(as_two(kernel))
    pointer = block.pointer(source)
    place = block.new(node)
    flag = "true" if count else "false"
    block.step(f"{name}<T, {kind}, {fixed or 0}, {flag}>({pointer}, {place.pointer});")


def as_two(numbers: Any) -> list[int]:
    return list(numbers) * 2 if len(numbers) == 1 else list(numbers)


def node_overhangs(x: Node, out: Shape, kernel: Any, stride: Any) -> bool:
    """Check whether a window without padding reaches beyond the image."""
    sizes = zip(out[2:], as_two(kernel), as_two(stride or kernel), shape_of(x)[2:], strict=True)
    return any((n - 1) * s + k > size for n, k, s, size in sizes)


def emit_average_pool(block: Block, node: Node) -> None:
    x = cast(Node, node.args[0])
    average(block, node, x, shape_of(node), "average_pool", x)


def emit_average_pool_backward(block: Block, node: Node) -> None:
    grad, x = cast(Any, node.args[:2])
    average(block, node, x, shape_of(grad), "average_pool_backward", grad)


def emit_max_pool(block: Block, node: Node) -> None:
    x, kernel, stride, padding, dilation, _ = cast(Any, node.args)
    out = result(node, 0)
    assert out is not None
    kind = pool(x, shape_of(out), kernel, stride, padding, dilation)
    pointer = block.pointer(x)
    place = block.new(out)
    block.step(f"max_pool<T, {kind}>({pointer}, {place.pointer});")


def emit_max_pool_backward(block: Block, node: Node) -> None:
    found = max_pool_backward(node)
    assert found is not None
    _, kernel, stride, padding, dilation, _ = cast(Any, found.pool.args)
    kind = pool(found.x, shape_of(found.grad), kernel, stride, padding, dilation)
    x, grad = block.pointer(found.x), block.pointer(found.grad)
    place = block.new(node)
    block.step(f"max_pool_backward<T, {kind}>({x}, {grad}, {place.pointer});")
