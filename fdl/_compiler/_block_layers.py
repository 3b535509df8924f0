"""Convolutions and pools of one block of images: `blocks/convolutions.h`, `blocks/pools.h`."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch.fx import Node

from fdl._compiler._block_axes import Axis, Shape, max_pool_backward, result, shape_of
from fdl._compiler._block_code import Block, axis_of
from fdl._compiler._graph import literal, value_of

aten = torch.ops.aten


class Convolution(NamedTuple):
    """A convolution of images; of sequences, as images of one row."""

    groups: int
    channels: int  # of all groups
    outputs: int
    size: Shape  # of the image
    result: Shape
    kernel: Shape
    stride: Shape
    padding: Shape  # at the top and left; a negative one leaves rows and columns out
    dilation: Shape
    gap: Shape = (1, 1)  # of rows and columns of the image

    def backward(self) -> Convolution:
        """Return the convolution of gradients that gives those of the input."""
        padding = tuple(
            d * (k - 1) - p
            for d, k, p in zip(self.dilation, self.kernel, self.padding, strict=True)
        )
        return Convolution(
            self.groups, self.outputs, self.channels, self.result, self.size, self.kernel, (1, 1),
            padding, self.dilation, self.stride,
        )  # fmt: skip

    def frame(self) -> tuple[int, int]:
        """Return the columns of zeros before a row of the image, and of the row with all zeros."""
        (_, gap), (_, padding) = self.gap, self.padding
        before = -(-padding // gap)
        last = (self.result[1] - 1) * self.stride[1] + (self.kernel[1] - 1) * self.dilation[1]
        width = (last - padding) // gap + before + 1
        return before, max(width, self.size[1]) if before == 0 else width

    def type(self) -> str:
        numbers = (
            self.groups, self.channels // self.groups, self.size[0], self.frame()[1],
            self.outputs // self.groups, *self.result, *self.kernel, *self.stride, *self.dilation,
            *self.padding, *self.gap,
        )  # fmt: skip
        return f"Shape<{', '.join(map(str, numbers))}>"


def as_pair(numbers: Any, fill: int) -> Shape:
    return (fill, *numbers) if len(numbers) == 1 else tuple(numbers)


def convolution(x: Node, weight: Node, out: Node, options: Any, groups: int) -> Convolution:
    stride, padding, dilation = options
    outputs, _, *kernel = shape_of(weight)
    _, channels, *size = shape_of(x)
    return Convolution(
        groups, channels, outputs, as_pair(size, 1), as_pair(shape_of(out)[2:], 1),
        as_pair(kernel, 1), as_pair(stride, 1), as_pair(padding, 0), as_pair(dilation, 1),
    )  # fmt: skip


def read_forward(node: Node) -> tuple[Node, Node, Node | None, Convolution]:
    x, weight, bias, stride, padding, dilation, _, _, groups = cast(Any, node.args)
    conv = convolution(x, weight, node, (stride, padding, dilation), groups)
    return x, weight, bias, conv


def read_backward(node: Node) -> tuple[Node, Node, Node, Convolution, list[bool]]:
    grad, x, weight, _, stride, padding, dilation, _, _, groups, mask = cast(Any, node.args)
    conv = convolution(x, weight, grad, (stride, padding, dilation), groups)
    return grad, x, weight, conv, mask


def fits_convolution(node: Node) -> bool:
    backward = node.target is aten.convolution_backward.default
    transposed = node.args[7 if backward else 6]
    x, weight, bias = cast(Any, node.args[1:4] if backward else node.args[:3])
    values = [x, node.args[0] if backward else node]
    return (
        not transposed
        and literal(weight) is None
        and (backward or literal(bias) is None)
        and value_of(x).ndim in (3, 4)
        and all(axis_of(z) == Axis(shape_of(x)[0]) for z in values)
    )


def tiles(
    outputs: int, columns: int, registers: int, width: int = 1, most: int = 64
) -> tuple[int, int]:
    """Choose how many outputs and columns, of these `most`, are computed in registers at a time.

    A column has `width` vectors. A step of the loop loads one vector for each output and for those
    of each column, and adds the product of each two to a sum.

    >>> tiles(32, 28, 32), tiles(32, 28, 16), tiles(32, 16, 32, width=3)
    ((4, 6), (6, 2), (4, 2))
    """

    def cost(o: int, j: int) -> float:
        # A sum is ready after four cycles of two products: fewer than eight sums wait for it.
        loads = o + j * width
        return max(o * j * width, 1.5 * loads, 8) + loads / 16 if o * j else 0

    def total(tile: tuple[int, int]) -> float:
        (rows, left), (times, last) = divmod(outputs, tile[0]), divmod(columns, tile[1])
        o, j = tile
        return times * (rows * cost(o, j) + cost(left, j)) + rows * cost(o, last) + cost(left, last)

    spare = 2 if width == 1 else 1  # for what the loop needs besides; with less, GCC spills sums
    choices = [
        (o, j)
        for o in range(1, min(outputs, registers) + 1)
        for j in range(1, min(columns, registers, most) + 1)
        if (o * j + j) * width + spare <= registers
    ]
    return min(choices, key=total, default=(1, 1))


def part(size: int, most: int) -> int:
    """Divide so many columns of a kernel into as few equal parts as there can be.

    >>> part(5, 5), part(7, 5), part(11, 5)
    (5, 4, 4)
    """
    return -(-size // -(-size // most))


def convolve(
    block: Block, node: Node, conv: Convolution, x: Node, pack: str, weight: Node, bias: str
) -> None:
    columns = -(-conv.result[1] // conv.gap[1])
    o, j = tiles(conv.outputs // conv.groups, columns, block.registers)
    source, weights = framed(block, x, conv), block.pack(pack, conv.type(), o, weight)
    relu = relu_after(block, node)
    place = block.new(relu or node)
    end = ", true" if relu else ""
    block.step(
        f"convolve<T, {conv.type()}, {o}, {j}{end}>({source}, {weights}, {bias}, {place.pointer});"
    )


def relu_after(block: Block, node: Node) -> Node | None:
    """Return the `relu` that alone reads a value, if its result is in memory."""
    user = next(iter(node.users))
    alone = len(node.users) == 1 and node not in block.given
    return user if alone and user.target is aten.relu.default and user in block.written else None


def framed(block: Block, x: Node, conv: Convolution) -> str:
    return block.frame(x, conv.channels * conv.size[0], conv.size[1], *conv.frame())


def emit_convolution(block: Block, node: Node) -> None:
    x, weight, bias, conv = read_forward(node)
    convolve(block, node, conv, x, "pack", weight, block.shared[bias] if bias else "nullptr")


def emit_convolution_backward(block: Block, node: Node) -> None:
    grad, x, weight, conv, mask = read_backward(node)
    block.place(grad)
    for_weight, for_input, for_bias = result(node, 1), result(node, 0), result(node, 2)
    if mask[1] and for_weight is not None:
        source = framed(block, x, conv)
        outputs, channels = conv.outputs // conv.groups, conv.channels // conv.groups
        columns = part(conv.kernel[1], (block.registers - 1) // 3)
        wide = columns < conv.kernel[1]
        o, c = tiles(outputs, 1 if wide else channels, block.registers, width=columns)
        total = block.total(value_of(weight).numel())
        block.step(
            f"convolve_weights<T, {conv.type()}, {o}, {c}, {columns}>"
            f"({source}, {block.pointer(grad)}, {total}, images);"
        )
        end(block, for_weight, total)
    if mask[2] and for_bias is not None:
        total = block.total(conv.outputs)
        pixels = prod(conv.result)
        block.step(
            f"sum_rows<T>({block.pointer(grad)}, {conv.outputs}, {pixels}, {total}, images);"
        )
        end(block, for_bias, total)
    if mask[0] and for_input is not None:
        convolve(block, for_input, conv.backward(), grad, "pack_turned", weight, "nullptr")


def end(block: Block, node: Node, total: str) -> None:
    """Add up the sums of all threads, in their order, into a result."""
    if node in block.given:
        numbers, to = value_of(node).numel(), block.given[node]
        block.ends.append(f"add_up<T>({total}, stride, threads, {numbers}, {to});")


# Pooling


def pool(
    batch: Node, image: Shape, out: Shape, kernel: Any, stride: Any, padding: Any, dilation: Any
) -> str:
    """Return the type of a pool of `image`, of which `batch` is an input or the gradient."""
    channels, *size = image[1:]
    channels *= cast(Axis, axis_of(batch)).members
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
    kind = pool(source, shape_of(x), out, as_two(kernel), as_two(stride), as_two(padding), [1, 1])
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
    kind = pool(x, shape_of(x), shape_of(out), kernel, stride, padding, dilation)
    pointer = block.pointer(x)
    place = block.new(out)
    block.step(f"max_pool<T, {kind}>({pointer}, {place.pointer});")


def emit_max_pool_backward(block: Block, node: Node) -> None:
    found = max_pool_backward(node)
    assert found is not None
    _, kernel, stride, padding, dilation, _ = cast(Any, found.pool.args)
    kind = pool(found.x, shape_of(found.x), shape_of(found.grad), kernel, stride, padding, dilation)
    x, grad = block.pointer(found.x), block.pointer(found.grad)
    place = block.new(node)
    block.step(f"max_pool_backward<T, {kind}>({x}, {grad}, {place.pointer});")
