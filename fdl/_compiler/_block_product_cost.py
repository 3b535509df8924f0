"""Estimate which regions of matrix products save time, as `_block_cost.py` for convolutions."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from torch import Tensor
from torch.fx import Node

from fdl._compiler._block_axes import PRODUCTS
from fdl._compiler._block_code import axis_of, expression_of, rest
from fdl._compiler._block_products import axis_of_images, batched_factors, sizes
from fdl._compiler._graph import VIEWS

# Of one core, in ns for a multiplication or a number; only their proportions matter.
OWN = 0.0118  # multiplication by the templates of `blocks/products.h`
LIBRARY = 0.0125  # by oneDNN, of rows and a weight
LIBRARY_OF_BATCHES = 0.04  # of two small matrices of each image
MEMORY = 0.33  # to read or write a number of an activation of all images
NEAR = 0.06  # of one block
AT_BORDER = 0.5  # to read or write a number outside of the region, in another order
GAIN = 0.85  # estimates are rough


class Cost(NamedTuple):
    """Nanoseconds for each image."""

    by_layers: float
    in_blocks: float


def cost_of_product(node: Node) -> Cost:
    images = axis_of_images(node)
    work = prod(sizes(node))
    batched = batched_factors(node) + ([node] if images != "terms" else [])
    moved = sum(prod(rest(x)) for x in batched)
    rate = LIBRARY_OF_BATCHES if images == "groups" else LIBRARY
    return Cost(rate * work + MEMORY * moved, OWN * work + NEAR * moved)


def products_pay(group: list[Node]) -> bool:
    """Tell whether to compute connected nodes with products, but no convolution, in blocks."""
    if not any(has_matrices(node) for node in group):
        return False
    by_layers = in_blocks = 0.0
    inside = set(group)
    border: set[Node] = set()
    for node in group:
        border.update(x for x in node.all_input_nodes if x not in inside and axis_of(x) is not None)
        if axis_of(node) is not None and any(user not in inside for user in node.users):
            border.add(node)
        if node.target in PRODUCTS:
            cost = cost_of_product(node)
            by_layers += cost.by_layers
            in_blocks += cost.in_blocks
        elif axis_of(node) is not None and isinstance(node.meta.get("val"), Tensor):
            numbers = prod(rest(node))
            fused = expression_of(node) is not None or node.target in VIEWS
            by_layers += MEMORY * numbers * (0.25 if fused else 1)
            in_blocks += NEAR * numbers
    moved = sum(prod(rest(x)) for x in border if isinstance(x.meta.get("val"), Tensor))
    return in_blocks + AT_BORDER * moved <= GAIN * by_layers


def has_matrices(node: Node) -> bool:
    """Check for a product of an image's matrix, not of a vector, as those of sequences are."""
    if node.target not in PRODUCTS:
        return False
    groups, rows, columns, terms = sizes(node)
    lengths = {"rows": rows, "columns": columns, "terms": terms, "groups": groups * rows}
    return lengths[str(axis_of_images(node))] > 1
