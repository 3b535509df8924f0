"""Estimate which regions save time."""

from __future__ import annotations

from torch.fx import Node

from fdl._compiler._block_axes import CONVOLUTIONS, shape_of
from fdl._compiler._block_ops import rule_of


def pays(group: list[Node]) -> bool:
    """Tell whether to compute connected nodes block by block."""
    return any(node.target in CONVOLUTIONS for node in group)


def why_not(node: Node) -> str:
    """Return why a convolution is in no region."""
    return f"{node.target} {rule_of(node)} {shape_of(node)}"
