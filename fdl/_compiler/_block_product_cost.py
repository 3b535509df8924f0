"""Estimate which regions of matrix products save time, as `_block_cost.py` for convolutions."""

from __future__ import annotations

from math import prod
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.fx import Node

from fdl._compiler._block_axes import PRODUCTS, Axis
from fdl._compiler._block_code import axis_of, expression_of, rest
from fdl._compiler._block_products import axis_of_images, batched_factors, sizes
from fdl._compiler._graph import VIEWS, value_of

# Of one core, in ns for a multiplication or a number, measured on an AMD EPYC with AVX-512; only
# their proportions matter.
OWN = 0.0105  # multiplication by the templates of `blocks/products.h`
LIBRARY = 0.0072  # by oneDNN, of rows and a weight
LIBRARY_OF_BATCHES = 0.0135  # of two matrices of each image
MATRIX = 80.0  # besides, for each of these pairs of matrices
MEMORY, NEAR_MEMORY = 0.15, 0.06  # to read or write a number of an activation of all images
NEAR_BYTES = 1 << 18  # of the largest activation: so much stays in a cache
NEAR, FAR, FARTHEST = 0.04, 0.12, 0.4  # of one block, by the cache that it fits into
NEAR_BLOCK, FAR_BLOCK = 1 << 20, 1 << 23  # bytes
AT_BORDER = 0.6  # to read or write one outside of the region, in another order
FUSED = 0.25  # of the time for a number, in an elementwise operation
START = 4000.0  # of the threads for one product
LANES = 16  # images of a block
GAIN = 0.85  # estimates are rough


def images_of_a_thread(images: int) -> int:
    """Return the images of the blocks of the busiest thread, of which each takes whole blocks."""
    return -(-images // (LANES * torch.get_num_threads())) * LANES


class Cost(NamedTuple):
    """What is done for each image."""

    products: int  # multiplications by a weight
    products_of_images: int
    matrices: int  # pairs of them that are multiplied
    numbers: float  # read or written

    def by_layers(self, memory: float) -> float:
        """Return the time in ns of one operation after the other, each for all images."""
        products = LIBRARY * self.products + LIBRARY_OF_BATCHES * self.products_of_images
        return products + MATRIX * self.matrices + memory * self.numbers

    def in_blocks(self, memory: float = NEAR) -> float:
        return OWN * (self.products + self.products_of_images) + memory * self.numbers


def cost_of_product(node: Node) -> Cost:
    images, work = axis_of_images(node), prod(sizes(node))
    numbers = sum(_numbers(x) for x in [*batched_factors(node), node])
    if images == "groups":
        return Cost(0, work, sizes(node)[0], numbers)
    return Cost(work, 0, 0, numbers)


def memory_of_block(size: int) -> float:
    """Return the time in ns to read or write a number of a block of so many bytes."""
    return NEAR if size <= NEAR_BLOCK else FAR if size <= FAR_BLOCK else FARTHEST


def _numbers(node: Node) -> int:
    """Return the size of a value in a block; 0 if it has no images."""
    has_images = axis_of(node) is not None and isinstance(node.meta.get("val"), Tensor)
    return prod(rest(node)) if has_images else 0


def products_pay(group: list[Node]) -> bool:
    """Tell whether to compute connected nodes with products, but no convolution, in blocks."""
    products = [node for node in group if node.target in PRODUCTS]
    if not any(has_matrices(node) for node in products):
        return False
    parts = [cost_of_product(node) for node in products]
    for node in group:
        if node.target not in PRODUCTS:
            fused = expression_of(node) is not None or node.target in VIEWS
            parts.append(Cost(0, 0, 0, _numbers(node) * (FUSED if fused else 1)))
    cost = Cost(*map(sum, zip(*parts, strict=True)))
    inside = set(group)
    border = {x for node in group for x in node.all_input_nodes if x not in inside}
    border |= {node for node in group if not inside.issuperset(node.users)}
    largest = max(products, key=lambda node: _numbers(batched_factors(node)[0]))
    (x, *_) = batched_factors(largest)
    images, itemsize = cast(Axis, axis_of(x)).images, value_of(x).itemsize
    near = images * _numbers(x) * itemsize <= NEAR_BYTES
    threads = torch.get_num_threads()
    memory = memory_of_block(max(map(_numbers, group)) * LANES * itemsize)
    in_blocks = cost.in_blocks(memory) + AT_BORDER * sum(map(_numbers, border))
    by_layers = images / threads * cost.by_layers(NEAR_MEMORY if near else MEMORY)
    by_layers += len(products) * START * (threads > 1)
    return images_of_a_thread(images) * in_blocks <= GAIN * by_layers


def has_matrices(node: Node) -> bool:
    """Check for a product of an image's matrix, not of a vector, as those of sequences are."""
    if node.target not in PRODUCTS:
        return False
    groups, rows, columns, terms = sizes(node)
    lengths = {"rows": rows, "columns": columns, "terms": terms, "groups": groups * rows}
    return lengths[str(axis_of_images(node))] > 1
