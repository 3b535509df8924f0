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
    COMPARISONS,
    COPIES,
    ELEMENTWISE,
    MASKS,
    Block,
    Expressions,
    Place,
    Shape,
    element,
    indices,
    is_mask,
    literal,
    operands,
    rest,
    strides_of,
)
from fdl._compiler._graph import value_of

aten, prims = torch.ops.aten, torch.ops.prims
# Inductor's, which exist only once it is imported.
MAX_POOL = "prims._low_memory_max_pool_with_offsets.default"
TO_INDICES = "prims._low_memory_max_pool_offsets_to_indices.default"
CONVERT = prims.convert_element_type.default
PLAIN_FORMATS = (None, torch.contiguous_format, torch.preserve_format)
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


class Rule(NamedTuple):
    """How an operation is written."""

    inputs: Callable[[Node], list[Node]]  # those with the axis of images
    fits: Callable[[Node], bool]
    emit: Callable[[Block, Node], None]
    is_cheap: bool = False  # rather computed again than kept
    is_written: bool = True  # by a step of its own, not as part of an expression


def shape_of(x: Any) -> Shape:
    return tuple(value_of(x).shape)


def first(node: Node) -> list[Node]:
    return [cast(Node, node.args[0])]


# Elementwise functions


def batch_operands(node: Node) -> list[Node]:
    """List the operands that have the axis of images."""
    shape = shape_of(node)
    values = [x for x in operands(node) if isinstance(x, Node) and literal(x) is None]
    return [x for x in values if shape_of(x)[:1] == shape[:1] and value_of(x).ndim == len(shape)]


def has_plain_options(node: Node) -> bool:
    """Check for no argument but the operands, and options that change nothing."""
    options = {"alpha": (1,), "memory_format": PLAIN_FORMATS}
    arity = sum(f"{{{i}}}" in ELEMENTWISE[node.target] for i in range(3))
    arguments = len(node.args) - (node.target is CONVERT)
    return arguments == arity == len(operands(node)) and all(
        value in options.get(name, ()) for name, value in node.kwargs.items()
    )


def fits_kinds(node: Node) -> bool:
    """Check which operands are masks, and whether the result is one."""
    name = getattr(node.target, "__name__", "").split(".")[0]
    kinds, result = [is_mask(x) for x in operands(node)], is_mask(node)
    if name in MASKS:
        return all(kinds) and result
    if name in COPIES:
        return kinds == [result]
    first_is_mask = name == "where" or node.target is CONVERT
    return kinds[0] == first_is_mask and not any(kinds[1:]) and result == (name in COMPARISONS)


def fits_elementwise(node: Node) -> bool:
    shape, alike = shape_of(node), batch_operands(node)
    if len(shape) < 2 or not alike or not has_plain_options(node) or not fits_kinds(node):
        return False
    values = [x for x in operands(node) if isinstance(x, Node) and literal(x) is None]
    for x in values:
        if x not in alike and (
            shape_of(x)[: max(0, len(shape_of(x)) - len(shape) + 1)] not in ((), (1,)) or is_mask(x)
        ):
            return False
    return len({value_of(x).dtype for x in [node, *values]} - {torch.bool}) <= 1


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


# Convolutions


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
    x, weight, bias = cast(Any, node.args[1:4] if backward else node.args[:3])
    bias = None if backward else bias
    given = literal(weight) is None and literal(bias) is None
    return not transposed and given and value_of(x).ndim in (3, 4)


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


def result(node: Node, i: int) -> Node | None:
    """Return the node of the i-th result of an operation."""
    return next((user for user in node.users if user.args[1] == i), None)


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
    channels, *size = rest(x)
    pairs = [as_pair(size, 1), as_pair(out[2:], 1), as_pair(kernel, 1)]
    pairs += [as_pair(stride or kernel, 1), as_pair(padding, 0), as_pair(dilation, 1)]
    return f"Pool<{', '.join(str(n) for n in (channels, *[n for pair in pairs for n in pair]))}>"


def read_pool(node: Node) -> list[Any]:
    """Return kernel, stride, padding, ceil_mode, count_include_pad and divisor."""
    given = list(node.args[2 if "backward" in str(node.target) else 1 :])
    return [*given, *[None, [], [0, 0], False, True, None][len(given) :]]


def fits_pool(node: Node) -> bool:
    x = cast(Node, node.args[0])
    return value_of(x).ndim in (3, 4) and value_of(x).is_floating_point()


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
    (x,) = first(node)
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


class MaxPoolBackward(NamedTuple):
    """The nodes that give a pixel the gradients of the windows of which it is the maximum."""

    grad: Node
    x: Node
    pool: Node


def max_pool_backward(node: Node) -> MaxPoolBackward | None:
    """Read the pattern `view(scatter(zeros, view(indices), view(grad)))`."""
    scatter = node.args[0] if node.target in VIEWS else None
    if not isinstance(scatter, Node) or len(scatter.users) != 1:
        return None
    if scatter.target not in (aten.scatter_add.default, aten.scatter.src):
        return None
    zeros, _, index, grads = cast(Any, scatter.args)
    while index.target in VIEWS:
        index = index.args[0]
    while isinstance(grads, Node) and grads.target in VIEWS:
        grads = cast(Node, grads.args[0])
    if str(index.target) != TO_INDICES or literal(zeros) != 0:
        return None
    offsets = cast(Node, index.args[0])
    source = cast(Node, offsets.args[0])
    if offsets.target is not getitem or str(source.target) != MAX_POOL:
        return None
    out, x = result(source, 0), cast(Node, source.args[0])
    matches = shape_of(node) == shape_of(x) and out and shape_of(grads) == shape_of(out)
    return MaxPoolBackward(grads, x, source) if matches else None


def emit_max_pool_backward(block: Block, node: Node) -> None:
    found = max_pool_backward(node)
    assert found is not None
    _, kernel, stride, padding, dilation, _ = cast(Any, found.pool.args)
    kind = pool(found.x, shape_of(found.grad), kernel, stride, padding, dilation)
    x, grad = block.pointer(found.x), block.pointer(found.grad)
    place = block.new(node)
    block.step(f"max_pool_backward<T, {kind}>({x}, {grad}, {place.pointer});")


# Sums


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
            return node.args[1] != 0
        return parent.target is aten.var_mean.correction
    return node.target in (aten.sum.dim_IntList, aten.mean.dim) and 0 in read_sum(node)


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
