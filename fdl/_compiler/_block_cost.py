"""Estimate which regions save time."""

from __future__ import annotations

from typing import cast

from torch.fx import Node

from fdl._compiler._block_axes import CONVOLUTIONS, shape_of
from fdl._compiler._block_ops import rule_of
from fdl._compiler._graph import value_of
from fdl._compiler._regions import DTYPES


def pays(group: list[Node]) -> bool:
    """Tell whether to compute connected nodes block by block."""
    return any(node.target in CONVOLUTIONS for node in group)


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
