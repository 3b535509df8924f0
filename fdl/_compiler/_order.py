"""The order of a graph's nodes, where some of them write to memory."""

from __future__ import annotations

import heapq
from collections import defaultdict
from typing import cast

from torch._ops import OpOverload
from torch.fx import Graph, Node

from fdl._compiler._graph import is_mutable, memory


def written(node: Node) -> list[Node]:
    """List the tensors that a node writes to."""
    if node.op != "call_function" or not is_mutable(node):
        return []
    schema = cast(OpOverload, node.target)._schema
    values = [
        node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        for i, argument in enumerate(schema.arguments)
        if argument.is_write
    ]
    return [z for value in values for z in (value if isinstance(value, list) else [value])]  # type: ignore[misc]


def predecessors(graph: Graph) -> dict[Node, list[Node]]:
    """List what has to run before each node: its inputs, and what reads or writes memory before."""
    before: dict[Node, list[Node]] = {}
    writer: dict[Node, Node] = {}
    readers: dict[Node, list[Node]] = defaultdict(list)
    effect: Node | None = None
    for node in graph.nodes:
        needed = before[node] = list(node.all_input_nodes)
        writes = {memory(z) for z in written(node)}
        for source in {memory(z) for z in node.all_input_nodes}:
            if source in writer:
                needed.append(writer[source])
            if source in writes:
                needed += readers.pop(source, ())
                writer[source] = node
            else:
                readers[source].append(node)
        if node.op == "call_function" and not writes and node.is_impure():
            needed += [effect] if effect else []
            effect = node
    return before


def move_into_order(graph: Graph, before: dict[Node, list[Node]]) -> None:
    """Move each node behind what it needs; otherwise the order stays."""
    nodes = list(graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    users: dict[Node, list[int]] = defaultdict(list)
    missing = [0] * len(nodes)
    for node in nodes:
        for needed in set(before[node]):
            users[needed].append(position[node])
            missing[position[node]] += 1
    ready = [i for i, count in enumerate(missing) if not count]
    last: Node | None = None
    while ready:
        i = heapq.heappop(ready)
        if last is not None:
            last.append(nodes[i])
        last = nodes[i]
        for user in users[last]:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, user)
