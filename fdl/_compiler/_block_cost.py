"""Estimate which regions save time."""

from __future__ import annotations

from math import prod
from typing import cast

import torch
from torch import Tensor
from torch.fx import Node

from fdl._compiler._block_axes import CONVOLUTIONS, PRODUCTS, shape_of
from fdl._compiler._block_code import ELEMENTWISE, axis_of, rest
from fdl._compiler._block_layers import Convolution, read_backward, read_forward
from fdl._compiler._block_ops import rule_of
from fdl._compiler._block_product_cost import (
    GAIN,
    LANES,
    cost_of_product,
    images_of_a_thread,
    memory_of_block,
    products_pay,
)
from fdl._compiler._graph import VIEWS, value_of
from fdl._compiler._regions import DTYPES

# Of one core, measured on an AMD EPYC with AVX-512; only their proportions matter.
LIBRARY = 0.0087  # ns for a multiplication by oneDNN, whose vectors are of 16 channels
OWN = 0.0070  # by the templates of `blocks/convolutions.h`
MEMORY = 0.33  # ns to read or write a number of an activation of all images
START = 5000  # ns until the threads of a kernel have started and ended


def pays(group: list[Node]) -> bool:
    """Tell whether to compute connected nodes block by block."""
    if not any(node.target in CONVOLUTIONS for node in group):
        return products_pay(group)
    by_layers = in_blocks = moved = 0.0  # of one image
    largest = kernels = 0
    for node in group:
        if node.target in CONVOLUTIONS:
            kernels += 1
            for conv in _convolutions(node):
                size = conv.channels * prod(conv.size) + conv.outputs * prod(conv.result)
                work = prod(conv.kernel) * prod(conv.result) / conv.groups
                padded = _up(conv.channels, conv.groups) * _up(conv.outputs, conv.groups)
                by_layers += LIBRARY * work * padded + 2 * MEMORY * size
                in_blocks += OWN * work * conv.channels * conv.outputs
                moved += 2 * size
                largest = max(largest, size * LANES * value_of(node.args[0]).itemsize)  # type: ignore[arg-type]
        elif node.target in PRODUCTS:
            kernels += 1
            cost = cost_of_product(node)
            by_layers += cost.by_layers(MEMORY)
            in_blocks += cost.in_blocks()
        elif axis_of(node) is not None and isinstance(node.meta.get("val"), Tensor):
            numbers = prod(rest(node))
            fused = node.target in ELEMENTWISE or node.target in VIEWS
            by_layers += MEMORY * numbers * (0.25 if fused else 1)
            moved += numbers
    images = next(axis.images for axis in map(axis_of, group) if axis is not None)
    # Threads share the images of a layer, and its channels.
    layers = GAIN * by_layers * images / torch.get_num_threads() + START * kernels
    in_blocks += memory_of_block(largest) * moved
    return images_of_a_thread(images) * in_blocks + START <= layers


def _up(channels: int, groups: int) -> int:
    """Round the channels of a group up to whole vectors."""
    return groups * -(-channels // groups // LANES) * LANES


def _convolutions(node: Node) -> list[Convolution]:
    """List the convolutions that a node stands for, one for each derivative."""
    if node.target is CONVOLUTIONS[0]:
        return [read_forward(node)[3]]
    _, _, _, conv, mask = read_backward(node)
    return [conv] * sum(bool(wanted) for wanted in mask[:2])


def why_not(node: Node) -> str:
    """Describe a convolution that is in no region, and why."""
    backward = node.target is not CONVOLUTIONS[0]
    x, weight = cast(list[Node], list(node.args[backward : 2 + backward]))
    what = "the derivatives of a convolution" if backward else "a convolution"
    shapes = " and ".join(str(list(shape_of(z))) for z in (x, weight))
    return f"{what} of {shapes}: {_reason(node, x, bool(node.args[6 + backward]))}"


def _reason(node: Node, x: Node, transposed: bool) -> str:
    value = value_of(x)
    if transposed:
        return "it is transposed"
    if value.ndim > 4:
        return "it is of volumes"
    if value.dtype not in DTYPES:
        return f"it is of {value.dtype}"
    if value.shape[0] == 1:
        return "it is of one image, or each image has weights of its own"
    if rule_of(node) is None:
        return "its weights depend on the images"
    return "as a whole it takes less time"
