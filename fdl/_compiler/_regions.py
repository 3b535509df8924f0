"""Find the parts of a graph that are computed for one block of images after the other.

Such a region has only operations that keep images apart, and sums over them, with which it ends:
what needs a sum belongs to a later region. Activations that a later region reads are kept in the
order of blocks, unless they are cheap to compute again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import getitem
from typing import cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fdl._compiler._block_axes import PRODUCTS, find_axes, max_pool_backward
from fdl._compiler._block_code import FUNCTIONS, SLOW, axis_of, expression_of, name_of
from fdl._compiler._block_ops import Rule, rule_of
from fdl._compiler._block_products import read_by_product
from fdl._compiler._block_sums import ends_batch
from fdl._compiler._graph import literal
from fdl._compiler._order import predecessors

aten = torch.ops.aten
DTYPES = (torch.float32, torch.float64)  # of the numbers of a region
DEEPEST = 40  # operations of an expression


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

    def __init__(self, graph: Graph, dtype: torch.dtype) -> None:
        self.graph = graph
        self.before = predecessors(graph)
        self.rules: dict[Node, Rule] = {}
        self.batched: dict[Node, list[Node]] = {}  # inputs with an axis of images
        axes = find_axes(graph, lambda node: expression_of(node) is not None)
        for node in graph.nodes:
            node.meta["images"] = axes.get(node)
        for node in graph.nodes:
            rule = rule_of(node)
            if rule is None or (node.target is getitem and node.args[0] not in self.rules):
                continue
            inputs = [x for x in rule.inputs(node) if literal(x) is None]
            values = [x.meta.get("val") for x in [node, *inputs]]
            tensors = [z for z in values if isinstance(z, Tensor)]
            fits = all(z.dtype in (dtype, torch.bool) and z.numel() for z in tensors)
            if fits and inputs and not any(x in self.rules and ends_batch(x) for x in inputs):
                self.rules[node], self.batched[node] = rule, inputs

    def needs(self, node: Node) -> list[Node]:
        """List what a node reads; of some, only the shape matters."""
        found = max_pool_backward(node)
        if found is not None:
            return [found.grad, found.x]
        if node.target is aten.avg_pool2d_backward.default:
            return [cast(Node, node.args[0])]
        return read_by_product(node) if node.target in PRODUCTS else node.all_input_nodes

    def levels(self) -> dict[Node, int]:
        """Number the nodes: what leaves a region, and what a sum over images gives, comes later."""
        levels: dict[Node, int] = {}
        for node in self.graph.nodes:
            level = 0
            inside = node in self.rules
            writers = [x for x in self.before[node] if x not in node.all_input_nodes]
            for x in [*(self.needs(node) if inside else node.all_input_nodes), *writers]:
                # A region does not compute what it reads for all images.
                joins = inside and x in self.batched[node] and not ends_batch(x)
                ends = x in self.rules and not joins
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


def find_regions(
    graph: Graph, dtype: torch.dtype, pays: Callable[[list[Node]], bool]
) -> list[Region]:
    """Return the regions of a graph, each after those that it needs.

    Args:
        graph: of primitives.
        dtype: of the numbers in the regions.
        pays: tells whether to compute connected nodes in blocks.
    """
    candidates = Candidates(graph, dtype)
    while True:
        groups = candidates.groups()
        chosen = _chosen(candidates, groups, pays)
        if len(chosen) == len(groups):
            break
        for group in groups:
            if group not in chosen:
                candidates.drop(group)
    regions = [_region(candidates, group, dtype) for group in groups]
    home = {node: region for region in regions for node in region.nodes}
    outside = _outside(candidates, home)
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
    """Return the groups that save time, and those between them."""
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


def _region(candidates: Candidates, group: list[Node], dtype: torch.dtype) -> Region:
    axes = [axis_of(x) for node in group for x in candidates.batched[node]]
    return Region(group, next(axis.images for axis in axes if axis is not None), dtype)


def is_provided(node: Node) -> bool:
    """Check for a value that a region can give to others."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _outside(candidates: Candidates, home: dict[Node, Region]) -> set[Node]:
    """List the nodes that are still computed outside of regions."""
    outside: set[Node] = set()
    read = {x for node in home for x in candidates.needs(node)} - set(home)
    for node in reversed(candidates.graph.nodes):
        if node in home and is_provided(node):
            continue
        used = node in read or any(user in outside for user in node.users)
        if used or node.op in ("output", "placeholder") or node.is_impure():
            outside.add(node)
    return outside


def _connect(candidates: Candidates, regions: list[Region], home: dict[Node, Region]) -> None:
    """Find what each region reads, and what it keeps for others or computes again."""
    position = {node: i for i, node in enumerate(candidates.graph.nodes)}
    kept: set[Node] = set()

    def is_at_hand(node: Node) -> bool:
        """Check that a node can be computed from what is in memory, by cheap operations."""
        todo, seen = [node], {node}
        while todo:
            x = todo.pop()
            if x in home and x not in kept:
                if not is_cheap(x):
                    return False
                todo += [z for z in candidates.batched[x] if z not in seen]
                seen.update(todo)
        return True

    def is_cheap(node: Node) -> bool:
        return candidates.rules[node].is_cheap and name_of(node) not in SLOW

    def sources(region: Region) -> set[Node]:
        """Return what a region has to compute or read besides its nodes."""
        todo, seen = list(region.nodes), set(region.nodes)
        while todo:
            for x in candidates.batched[todo.pop()]:
                if x in seen:
                    continue
                seen.add(x)
                if x in home:
                    if not is_at_hand(x) and is_provided(x):
                        kept.add(x)
                        home[x].keeps.append(x)
                    if x not in kept:
                        todo.append(x)
        return seen - set(region.nodes)

    for region in regions:
        for x in sorted(sources(region), key=lambda z: position[z]):
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
            if not candidates.rules[node].reads_expressions:
                written.update(candidates.batched[node])
    inside = set(region.nodes)
    depth: dict[Node, int] = {}  # of the expressions
    slow: set[Node] = set()  # expressions with a function that takes long
    for node in region.nodes:
        inputs = candidates.batched[node]
        depth[node] = 1 + max((depth.get(x, 0) for x in inputs), default=0)
        takes_long = name_of(node) in FUNCTIONS or not slow.isdisjoint(inputs)
        is_slow = expression_of(node) is not None and (takes_long or name_of(node) in SLOW)
        if is_slow and len(inside.intersection(node.users)) > 1:
            written.add(node)
        if node in written or depth[node] > DEEPEST:
            written.add(node)
            depth[node] = 0
        elif takes_long:
            slow.add(node)
    return written
