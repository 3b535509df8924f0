"""Digests of traced functions: the same for the same function, whatever the order of its dicts.

The order of keys in a dict is not structure: parameters that were merged or loaded have another.
The function is traced again for it, since its results have that order too; if it computes the same,
no second program is compiled.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from hashlib import blake2b
from operator import attrgetter
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fdl._compiler._graph import nodes_of, operations
from fdl._compiler._signature import paths, signature

Digest = dict[str, str]  # of each result, by its path
LARGEST = 64  # elements of a tensor of numbers that is part of a description


def digest(
    module: GraphModule, arguments: Hashable, results: Hashable, constants: Sequence[Tensor]
) -> Digest | None:
    """Describe how each result is computed, or return None if a function does more than that.

    Args:
        module: the graph of the function.
        arguments: structure of its arguments.
        results: structure of its results.
        constants: the closed-over tensors, which are arguments of the graph too.
    """
    if any(node.is_impure() for node in operations(module)):
        return None
    values = _values(module, [*paths(arguments), *(f"closed over: {id(x)}" for x in constants)])
    return dict(zip(paths(results), values, strict=True))


def _values(module: GraphModule, names: Sequence[str]) -> Any:
    """Return a digest of each result of a graph, whose arguments have these names."""
    known: dict[Node, str] = {}
    name = iter(names)
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            parts: Any = next(name), signature([value])
        elif node.op == "get_attr":
            parts = _attribute(module, node.target)
        else:
            parts = str(node.target), map_arg((node.args, node.kwargs), lambda n: f"%{known[n]}")
        known[node] = blake2b(repr(parts).encode(), digest_size=16).hexdigest()
    (output,) = nodes_of(module.graph, "output")
    return map_arg(output.args[0], lambda node: known[node])


def _attribute(module: GraphModule, target: str) -> Any:
    """Describe the body of a loop, or a tensor that the function has made of numbers."""
    attribute = attrgetter(target)(module)
    if isinstance(attribute, GraphModule):
        count = len(nodes_of(attribute.graph, "placeholder"))
        return _values(attribute, [str(i) for i in range(count)])
    return numbers(attribute) or id(attribute)


def numbers(value: Any) -> tuple[Any, ...] | None:
    """Describe a tensor that a function has made of numbers, or return None for what is larger."""
    if not isinstance(value, Tensor) or value.numel() > LARGEST or is_fake(value):
        return None
    return signature([value]), value.tolist()
