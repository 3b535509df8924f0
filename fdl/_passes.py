"""Rewritings of a graph that make its program faster, equal to rounding."""

from torch.fx import GraphModule

__all__ = ["rewrite_for_cpu"]


def rewrite_for_cpu(graph: GraphModule) -> None:
    """Do nothing yet."""
