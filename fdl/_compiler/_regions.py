"""Find the parts of a graph that are computed for one block of images after the other.

Such a region has only operations that keep images apart, and sums over them, with which it ends:
what needs a sum belongs to a later region. Activations that a later region reads are kept in the
order of blocks, unless they are cheap to compute again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import getitem
from typing import cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fdl._compiler._block_axes import Axis, find_axes, literal, max_pool_backward
from fdl._compiler._block_code import ELEMENTWISE, SLOW, axis_of
from fdl._compiler._block_ops import Rule, emit_sum, ends_batch, rule_of

aten = torch.ops.aten
DTYPES = (torch.float32, torch.float64, torch.bool)


@dataclass
class Region:
    """Nodes that are computed block by block."""

    nodes: list[Node]  # in order
    images: int
    dtype: torch.dtype
    loads: list[Node] = field(default_factory=list)  # read from outside, with an axis of images
    shared: list[Node] = field(default_factory=list)  # read from outside, without
    reads: list[Node] = field(default_factory=list)  # kept by an earlier region
    keeps: list[Node] = field(default_factory=list)  # for later regions
    results: list[Node] = field(default_factory=list)  # read outside
    written: set[Node] = field(default_factory=set)  # by a step of their own


class Candidates:
    """The nodes of a graph that a region could have."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.rules: dict[Node, Rule] = {}
        self.batched: dict[Node, list[Node]] = {}  # inputs with an axis of images
        axes = find_axes(graph, lambda node: node.target in ELEMENTWISE)
        for node in graph.nodes:
            node.meta["images"] = axes.get(node)
        for node in graph.nodes:
            rule = rule_of(node)
            if rule is None or (node.target is getitem and node.args[0] not in self.rules):
                continue
            inputs = [x for x in rule.inputs(node) if literal(x) is None]
            values = [x.meta.get("val") for x in [node, *inputs]]
            if all(z.dtype in DTYPES for z in values if isinstance(z, Tensor)):
                self.rules[node], self.batched[node] = rule, inputs

    def needs(self, node: Node) -> list[Node]:
        """List what a node reads; of some, only the shape matters."""
        found = max_pool_backward(node)
        if found is not None:
            return [found.grad, found.x]
        if node.target is aten.avg_pool2d_backward.default:
            return [cast(Node, node.args[0])]
        return node.all_input_nodes

    def levels(self) -> dict[Node, int]:
        """Number the nodes: what leaves a region, and what a sum over images gives, comes later."""
        levels: dict[Node, int] = {}
        for node in self.graph.nodes:
            level = 0
            inside = node in self.rules
            for x in self.needs(node) if inside else node.all_input_nodes:
                ends = x in self.rules and (not inside or ends_batch(x))
                level = max(level, levels[x] + ends)
            levels[node] = level
        return levels

    def groups(self) -> list[list[Node]]:
        """Divide the nodes into those that are connected, without a sum between them."""
        levels, parent = self.levels(), {node: node for node in self.rules}

        def find(node: Node) -> Node:
            while parent[node] is not node:
                parent[node] = parent[parent[node]]
                node = parent[node]
            return node

        for node in self.rules:
            for x in self.batched[node]:
                if x in self.rules and not ends_batch(x) and levels[x] == levels[node]:
                    parent[find(node)] = find(x)
        groups: dict[Node, list[Node]] = defaultdict(list)
        for node in self.graph.nodes:
            if node in self.rules:
                groups[find(node)].append(node)
        return sorted(groups.values(), key=lambda group: levels[group[0]])

    def drop(self, nodes: list[Node]) -> None:
        for node in nodes:
            del self.rules[node]


def find_regions(graph: Graph, pays: Callable[[list[Node]], bool]) -> list[Region]:
    """Return the regions of a graph, each after those that it needs.

    Args:
        graph: of primitives.
        pays: tells whether to compute connected nodes in blocks.
    """
    candidates = Candidates(graph)
    while True:
        groups = candidates.groups()
        chosen = _chosen(candidates, groups, pays)
        if len(chosen) == len(groups):
            break
        for group in groups:
            if group not in chosen:
                candidates.drop(group)
    regions = [_region(group) for group in groups]
    home = {node: region for region in regions for node in region.nodes}
    outside = _outside(graph, home)
    for region in regions:
        region.results = [
            node
            for node in region.nodes
            if is_provided(node) and any(user in outside for user in node.users)
        ]
    _connect(candidates, regions, home)
    return [region for region in regions if region.keeps or region.results]


def _chosen(
    candidates: Candidates, groups: list[list[Node]], pays: Callable[[list[Node]], bool]
) -> list[list[Node]]:
    """Return the groups with convolutions, and those between them."""
    home = {node: i for i, group in enumerate(groups) for node in group}
    chosen = {i for i, group in enumerate(groups) if pays(group)}
    edges = {
        (home[x], i)
        for i, group in enumerate(groups)
        for node in group
        for x in candidates.batched[node]
        if x in home and home[x] != i and not ends_batch(x)
    }
    while True:
        readers = {j for i, j in edges if i in chosen}
        writers = {i for i, j in edges if j in chosen}
        if readers & writers <= chosen:
            return [groups[i] for i in sorted(chosen)]
        chosen |= readers & writers


def _region(group: list[Node]) -> Region:
    values = [z for z in (node.meta["val"] for node in group) if isinstance(z, Tensor)]
    dtype = next((z.dtype for z in values if z.is_floating_point()), torch.bool)
    axis = next(axis_of(node) for node in group if axis_of(node) is not None)
    return Region(group, cast(Axis, axis).images, dtype)


def is_provided(node: Node) -> bool:
    """Check for a value that a region can give to others."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in DTYPES[:2]


def _outside(graph: Graph, home: dict[Node, Region]) -> set[Node]:
    """List the nodes that are still computed outside of regions."""
    outside: set[Node] = set()
    for node in reversed(graph.nodes):
        if node in home and is_provided(node):
            continue
        used = any(user in outside for user in node.users)
        if used or node.op in ("output", "placeholder") or node.is_impure():
            outside.add(node)
    return outside


def _connect(candidates: Candidates, regions: list[Region], home: dict[Node, Region]) -> None:
    """Find what each region reads, and what it keeps for others or computes again."""
    position = {node: i for i, node in enumerate(candidates.graph.nodes)}
    kept: set[Node] = set()

    def is_at_hand(node: Node) -> bool:
        if node not in home or node in kept:
            return True
        return is_cheap(node) and all(map(is_at_hand, candidates.batched[node]))

    def is_cheap(node: Node) -> bool:
        name = getattr(node.target, "__name__", "").split(".")[0]
        return candidates.rules[node].is_cheap and name not in SLOW

    def sources(node: Node, region: Region) -> Iterator[Node]:
        """Yield what a region has to compute or read for a node of it."""
        for x in candidates.batched[node]:
            if x in home and home[x] is not region:
                if not is_at_hand(x) and is_provided(x):
                    kept.add(x)
                    home[x].keeps.append(x)
                if x not in kept:
                    yield from sources(x, region)
            yield x

    for region in regions:
        own = set(region.nodes)
        wanted = [x for node in region.nodes for x in sources(node, region)]
        for x in sorted(set(wanted) - own, key=lambda z: position[z]):
            if x not in home:
                region.loads.append(x)
            elif x in kept:
                region.reads.append(x)
            else:
                region.nodes.append(x)
        region.nodes.sort(key=lambda z: position[z])
        inside = {*region.nodes, *region.loads, *region.reads}
        region.shared = list(
            dict.fromkeys(
                x
                for node in region.nodes
                for x in candidates.needs(node)
                if x not in inside and literal(x) is None
            )
        )
        for x in region.shared:
            if x in home and x not in home[x].results:
                home[x].results.append(x)
    for region in regions:
        region.written = _written(candidates, region)


def _written(candidates: Candidates, region: Region) -> set[Node]:
    """List the nodes whose values are in memory; others are parts of expressions."""
    written = set(region.loads) | set(region.reads) | set(region.keeps) | set(region.results)
    for node in region.nodes:
        if candidates.rules[node].is_written:
            written.add(node)
            if candidates.rules[node].emit is not emit_sum:
                written.update(candidates.batched[node])
        name = getattr(node.target, "__name__", "").split(".")[0]
        users = [user for user in node.users if user in region.nodes]
        if node.target in ELEMENTWISE and name in SLOW and len(users) > 1:
            written.add(node)
    return written
