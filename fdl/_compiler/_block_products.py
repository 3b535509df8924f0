"""Matrix products of one block of images: `blocks/products.h`.

Images are part of one axis of `[groups, rows, terms] · [groups, terms, columns]`. Those of rows and
columns share the other factor, a weight. If images are among the terms, as in the gradient of a
weight, the product is a sum over them, and ends a region.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch.fx import Node

from fdl._compiler._block_axes import Shape, shape_of
from fdl._compiler._block_code import Block, address, axis_of, rest, strides_of
from fdl._compiler._block_layers import tiles
from fdl._compiler._graph import literal, value_of

aten = torch.ops.aten
AxisName = Literal["groups", "rows", "columns", "terms"]
NEAREST = 3 << 13  # bytes
LARGEST = 1 << 16  # numbers of a weight, which are read again for each block
LARGEST_OF_ONE_ROW = 1 << 12  # if a block uses each of them once
LARGEST_OF_ONE_TERM = 1 << 9  # of a gradient: adding up the images takes longer than the products


def factors(node: Node) -> tuple[Node, Node]:
    a, b = node.args[-2:]
    return cast(Node, a), cast(Node, b)


def axis_of_images(node: Node) -> AxisName | None:
    """Return the axis that has the images; None if they are not kept apart."""
    lead = 3 - value_of(node).ndim  # a product without groups has one
    a, b = factors(node)
    of_a, of_b, of_result = axis_of(a), axis_of(b), axis_of(node)
    if of_a is not None and of_b is not None:
        if of_a == of_b == of_result and of_a.axis + lead == 0:
            return "groups"
        alike = of_a._replace(axis=0) == of_b._replace(axis=0)
        return "terms" if alike and (of_a.axis + lead, of_b.axis + lead) == (2, 1) else None
    if of_a is not None and of_a == of_result and of_a.axis + lead == 1:
        return "rows"
    if of_b is not None and of_b == of_result and of_b.axis + lead == 2:
        return "columns"
    return None


def sums_images(node: Node) -> bool:
    return axis_of_images(node) == "terms"


def batched_factors(node: Node) -> list[Node]:
    return [x for x in factors(node) if axis_of(x) is not None]


def weight_of(node: Node) -> tuple[Node, list[int]] | None:
    """Return the factor that all images share, before permutations, and the order of its axes."""
    shared = [x for x in factors(node) if axis_of(x) is None]
    if len(shared) != 1:
        return None
    x = shared[0]
    order = list(range(value_of(x).ndim))
    while x.target is aten.permute.default:
        axes = cast(Any, x.args[1])
        order = [axes[k] % len(axes) for k in order]
        x = cast(Node, x.args[0])
    return x, order


def bias_of(node: Node) -> Node | None:
    return cast(Node, node.args[0]) if node.target is aten.addmm.default else None


def fits_product(node: Node) -> bool:
    images, bias, weight = axis_of_images(node), bias_of(node), weight_of(node)
    if images is None or node.kwargs or any(literal(x) is not None for x in factors(node)):
        return False
    if bias is not None and (
        images != "rows"
        or literal(bias) is not None
        or axis_of(bias) is not None
        or shape_of(bias) != shape_of(node)[-1:]
    ):
        return False
    _, rows, columns, terms = sizes(node)
    if images == "terms":
        return terms > 1 or rows * columns <= LARGEST_OF_ONE_TERM
    if weight is None:
        return True
    length = rows if images == "rows" else columns
    most = LARGEST if length > 1 else LARGEST_OF_ONE_ROW
    return literal(weight[0]) is None and rows * columns * terms // length <= most


def read_by_product(node: Node) -> list[Node]:
    """List what a product reads: a weight before it is permuted."""
    weight, bias = weight_of(node), bias_of(node)
    shared = [x for x in (weight[0] if weight else None, bias) if x is not None]
    return [*batched_factors(node), *shared]


def sizes(node: Node) -> tuple[int, int, int, int]:
    """Return the groups, rows, columns and terms of a product in a block."""
    images = axis_of_images(node)
    a, b = factors(node)
    shape_of_a, shape_of_b = (
        (1,) * (3 - value_of(x).ndim) + (rest(x) if axis_of(x) is not None else shape_of(x))
        for x in (a, b)
    )
    assert images is not None
    groups, rows, terms = shape_of_a
    return groups, rows, shape_of_b[2], terms


def emit_product(block: Block, node: Node) -> None:
    emit = emit_gradient if sums_images(node) else emit_values
    emit(block, node)


def vectors(block: Block, x: Node) -> tuple[str, Shape]:
    """Return the address of a factor, and its three strides."""
    place = block.place(x)
    return address(place), (0,) * (3 - len(place.shape)) + place.strides


def numbers(block: Block, node: Node) -> tuple[str, Shape]:
    """Return the address of a weight, and its three strides."""
    weight = weight_of(node)
    assert weight is not None
    source, order = weight
    strides = strides_of(shape_of(source))
    return block.shared[source], (0,) * (3 - len(order)) + tuple(strides[k] for k in order)


def emit_values(block: Block, node: Node) -> None:
    groups, rows, columns, terms = sizes(node)
    images, bias = axis_of_images(node), bias_of(node)
    a, b = (
        vectors(block, x) if axis_of(x) is not None else numbers(block, node) for x in factors(node)
    )
    place = block.new(node)
    to = (0,) * (3 - len(place.shape)) + place.strides
    if images == "columns":  # the transposed product: that of a weight comes second
        rows, columns = columns, rows
        a, b, to = transposed(b), transposed(a), transposed(("", to))[1]
    # The rows of a tile stay in the nearest cache while they are multiplied by all columns.
    most = max(NEAREST // (terms * block.width * value_of(node).itemsize), 1)
    s, r = tiles(columns, rows, block.registers, most=most)
    shape = (groups, rows, columns, terms, *a[1], *b[1], *to)
    given = block.shared[bias] if bias is not None else "nullptr"
    block.step(
        f"multiply<T, Product<{', '.join(map(str, shape))}>, "
        f"{'false' if images == 'groups' else 'true'}, {r}, {s}>"
        f"({a[0]}, {b[0]}, {given}, {place.pointer});"
    )


def transposed(factor: tuple[str, Shape]) -> tuple[str, Shape]:
    name, (group, row, column) = factor
    return name, (group, column, row)


def emit_gradient(block: Block, node: Node) -> None:
    groups, rows, columns, terms = sizes(node)
    a, b = (vectors(block, x) for x in factors(node))
    r, s = sum_tiles(rows, columns, terms, block.registers, block.width)
    shape = (groups, rows, columns, terms, *a[1], *b[1], 0, 0, 0)
    kind = f"T, Product<{', '.join(map(str, shape))}>, {r}, {s}"
    total = block.total(groups * padded(rows, columns, r, s, block.width))
    packed = block.buffer(terms * s)
    block.step(f"add_products<{kind}>({a[0]}, {b[0]}, {packed}, {total}, images);")
    if node in block.given:
        to = block.given[node]
        block.ends.append(f"add_up_products<{kind}>({total}, stride, threads, {to});")


def parts(size: int, tile: int) -> list[int]:
    """Return the sizes of the tiles of an axis.

    >>> parts(10, 4)
    [4, 4, 2]
    """
    return [tile] * (size // tile) + [size % tile] * (size % tile > 0)


def padded(rows: int, columns: int, r: int, s: int, width: int) -> int:
    """Return how many numbers the sums of all tiles take, each in whole vectors."""
    return sum(-(-m * n // width) * width for m in parts(rows, r) for n in parts(columns, s))


def sum_tiles(rows: int, columns: int, terms: int, registers: int, width: int) -> tuple[int, int]:
    """Choose how many rows and columns of sums over images are in registers at a time.

    >>> sum_tiles(96, 32, 24, 32, 16), sum_tiles(96, 32, 24, 16, 8)
    ((2, 8), (6, 2))
    """

    def cost(m: int, n: int) -> float:
        # Products and loads of a term; then three instructions for each vector that is added up.
        adding = 4 * width * -(-m * n // width)
        return terms * max(m * n, 1.5 * (m + n), 8) + adding

    def total(tile: tuple[int, int]) -> float:
        return sum(cost(m, n) for m in parts(rows, tile[0]) for n in parts(columns, tile[1]))

    choices = [
        (r, s)
        for r in range(1, min(rows, registers) + 1)
        for s in range(1, min(columns, registers) + 1)
        if r * s + s + 2 <= registers
    ]
    return min(choices, key=total, default=(1, 1))
