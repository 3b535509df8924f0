"""Compute small nets of convolutions and products for one block of images after the other.

Layer by layer, a net walks through memory: each layer reads and writes the activations of all
images. The regions that `_regions.py` finds become kernels that take a few images through all of
their layers, and through the derivatives, while these are in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from operator import getitem
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fdl._compiler._block_axes import CONVOLUTIONS, sequences_of
from fdl._compiler._block_code import rest
from fdl._compiler._block_cost import pays, why_not
from fdl._compiler._blocks import BLOCKS, BlockSource
from fdl._compiler._graph import caller, empty, value_of
from fdl._compiler._order import move_into_order, predecessors
from fdl._compiler._regions import DTYPES, Region, find_regions

aten = torch.ops.aten
PARTS = (aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default)


class Regions(NamedTuple):
    """How many regions a program has, and which convolutions are in none."""

    regions: int = 0
    left_out: tuple[str, ...] = ()


_counting: ContextVar[Any] = ContextVar("fdl_regions", default=None)


@contextmanager
def count_regions(route: Any) -> Iterator[None]:
    """Note in `route.regions` what `compute_in_blocks` does inside of the `with` block."""
    token = _counting.set(route)
    try:
        yield
    finally:
        _counting.reset(token)


def compute_in_blocks(module: GraphModule) -> None:
    """Replace the regions of a graph in which this saves time."""
    graph = module.graph
    convolutions = [node for node in graph.nodes if node.target in CONVOLUTIONS]
    read = [cast(Node, node.args[0]) for node in convolutions]
    read += [x for x in map(sequences_of, graph.nodes) if x is not None]
    if not read:
        return
    _write_parts_as_views(graph)
    regions: list[Region] = []
    dtypes = {value_of(x).dtype for x in read}
    for dtype in [dtype for dtype in DTYPES if dtype in dtypes]:
        more = find_regions(graph, dtype, pays)
        if more:
            _replace(graph, more)
        regions += more
    inside = {node for region in regions for node in region.nodes}
    route = _counting.get()
    if route is not None:
        reasons = [why_not(node) for node in convolutions if node not in inside]
        known = route.regions
        left_out = tuple(dict.fromkeys([*known.left_out, *reasons]))
        route.regions = Regions(known.regions + len(regions), left_out)


def _write_parts_as_views(graph: Graph) -> None:
    """Replace the parts of `unbind` and `split` by views, as Inductor does."""
    for node in graph.find_nodes(op="call_function", target=getitem):
        whole, i = cast(tuple[Node, int], node.args)
        if whole.target not in PARTS:
            continue
        x, *options = cast(Any, whole.args)
        if whole.target is aten.unbind.int:
            view, where = aten.select.int, [*(options or [0]), i]
        else:
            size, dim = options if len(options) > 1 else (*options, 0)
            start = sum(size[:i]) if isinstance(size, list) else size * i
            length = size[i] if isinstance(size, list) else size
            view, where = aten.slice.Tensor, [dim, start, start + length]
        node.replace_all_uses_with(caller(graph, node)(view, x, *where))
    graph.eliminate_dead_code()


def _replace(graph: Graph, regions: list[Region]) -> None:
    before = predecessors(graph)
    calls: dict[Node, Node] = {}  # of the nodes of regions
    kept: dict[Node, Node] = {}
    values: dict[Node, Node] = {}
    (output,) = graph.find_nodes(op="output")
    for region in regions:
        with graph.inserting_before(output):
            call = _call(graph, region, kept, values, before)
        before[call] += [calls[node] for node in region.reads]
        # What writes memory before a node of the region reads it does so before the call.
        before[call] += [
            z for node in region.nodes for z in before[node] if z not in node.all_input_nodes
        ]
        calls |= {node: call for node in region.nodes if node not in calls}
    for old, new in values.items():
        for user in list(old.users):
            user.replace_input_with(old, new)
            before[user] += [calls[old], new]
    for node in reversed(graph.nodes):  # `eliminate_dead_code` expects them in order
        if not node.users and not node.is_impure():
            graph.erase_node(node)
    alive = set(graph.nodes)
    for node in alive:
        # A value that a region computes may be computed outside as well.
        inputs = alive.intersection(node.all_input_nodes)
        order = [x for z in before[node] for x in ([z] if z in inputs else [z, calls.get(z, z)])]
        before[node] = [x for x in order if x in alive]
    move_into_order(graph, {node: before[node] for node in alive})


def _call(
    graph: Graph,
    region: Region,
    kept: dict[Node, Node],
    values: dict[Node, Node],
    before: dict[Node, list[Node]],
) -> Node:
    """Add the call of a region's kernel; note where its values are."""
    source = BlockSource(region)
    writes = []
    for node in region.keeps:
        blocks = -(-region.images // source.block.width)
        numbers = prod(rest(node)) * source.block.width
        with cast(Any, value_of(node)).fake_mode:
            kept[node] = empty(graph, torch.empty(blocks, numbers, dtype=region.dtype))
        writes.append(kept[node])
    for node in region.results:
        writes.append(empty(graph, value_of(node)))
    reads = [*region.loads, *region.shared, *(kept[node] for node in region.reads)]
    call = graph.call_function(BLOCKS, (source.text(), reads), {"writes": writes})
    call.meta["val"] = None
    for node in writes:
        before[node] = []
    before[call] = [*reads, *writes]
    for node, memory in zip(region.results, writes[len(region.keeps) :], strict=True):
        values[node] = memory
        for target, args, kwargs in _reshaping(value_of(memory), value_of(node)):
            last, values[node] = (
                values[node],
                graph.call_function(target, (values[node], *args), kwargs),
            )
            with cast(Any, value_of(node)).fake_mode:
                values[node].meta["val"] = target(value_of(last), *args, **kwargs)
            before[values[node]] = [call, last]
    return call


def _reshaping(memory: Tensor, value: Tensor) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Return the operations that give contiguous memory the shape and the strides of a value."""
    if memory.shape != value.shape:
        return [(aten.view.default, (list(value.shape),), {})]
    if value.is_contiguous():
        return []
    strides = value.stride()
    order = sorted(range(value.ndim), key=lambda k: -strides[k])
    back = [order.index(k) for k in range(value.ndim)]
    return [
        (aten.permute.default, (order,), {}),
        (aten.clone.default, (), {"memory_format": torch.contiguous_format}),
        (aten.permute.default, (back,), {}),
    ]
