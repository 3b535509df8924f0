"""Find computations that are the same for many leaves: families.

The update of an optimizer is the same few dozen operations for each leaf. Inductor lowers,
schedules and writes them anew for every leaf, in time that grows with the square of their number.
`_merging.py` writes each family as one node, `fdl::leafwise_`, whose kernel is generated once and
walks over a table of the leaves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fdl._compiler._graph import LOOP, is_view, memory, value_of
from fdl._compiler._leafwise import (
    LEAFWISE,
    Body,
    Call,
    Filled,
    Number,
    Operand,
    can_lower,
)
from fdl._compiler._order import predecessors, written
from fdl._compiler._products import PRODUCT

aten, prims = torch.ops.aten, torch.ops.prims

FEWEST = 4  # leaves of a family
LONGEST_SUM = 1 << 14  # numbers; several threads share longer ones, which Inductor writes
NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool)
RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
SUMS = (aten.sum.default, aten.sum.dim_IntList)
CALLED = (  # functions of libraries and fdl, and loops, which read memory
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.convolution.default,
    torch.ops.fdl.linear.default,
    PRODUCT,
    LOOP,
)
CHEAP = (  # to compute once more for each leaf
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.neg.default,
    prims.convert_element_type.default,
)
FUSED = (  # not elementwise, but Inductor computes them where their results are read
    aten.expand.default,
    aten.cat.default,
    aten.constant_pad_nd.default,
    aten.embedding.default,
    aten.gather.default,
    aten.index.Tensor,
    prims.iota.default,
)


class Member(NamedTuple):
    """The computation for one leaf."""

    nodes: list[Node]
    body: Body
    size: int
    inputs: list[Node]  # contiguous, with as many numbers as the leaf
    scalars: list[Node]
    outputs: list[Node]


def find_families(graph: Graph) -> dict[Body, list[Member]]:
    """Find the computations that are the same for at least `FEWEST` leaves."""
    families: dict[Body, list[Member]] = defaultdict(list)
    for nodes in _components(graph):
        member = _member(nodes) if _is_kept(nodes) else None
        if member is not None:
            families[member.body].append(member)
    return {body: members for body, members in families.items() if len(members) >= FEWEST}


def _components(graph: Graph) -> list[list[Node]]:
    """Split the operations on leaves into those that are connected, each in order."""
    parent: dict[Node, Node] = {}

    def root(node: Node) -> Node:
        while parent[node] is not node:
            parent[node] = node = parent[parent[node]]
        return node

    for node in graph.nodes:
        if _is_leafwise(node) or is_full_sum(node):
            parent[node] = node
            for base in map(base_of, node.all_input_nodes):
                if base in parent and value_of(base).ndim:
                    parent[root(base)] = root(node)
    components: dict[Node, list[Node]] = defaultdict(list)
    for node in parent:
        components[root(node)].append(node)
    return list(components.values())


def _is_leafwise(node: Node) -> bool:
    """Check for an operation that computes each number from one number of each input."""
    if not can_lower(node.target) or not is_plain(node) or not value_of(node).ndim:
        return False
    shape = value_of(node).shape
    return all(
        isinstance(z.meta.get("val"), Tensor)
        and (value_of(z).ndim == 0 or (is_plain(z) and value_of(z).shape == shape))
        for z in node.all_input_nodes
    )


def is_full_sum(node: Node) -> bool:
    """Check for a sum over all axes of a leaf, to one number."""
    if node.target not in SUMS or not is_plain(node) or value_of(node).ndim:
        return False
    return is_plain(node.all_input_nodes[0]) and value_of(node.all_input_nodes[0]).ndim > 0


def is_plain(node: Node) -> bool:
    """Check for a contiguous tensor of a dtype that families may have."""
    value = node.meta.get("val")
    return (
        isinstance(value, Tensor)
        and value.dtype in NUMBERS
        and value.layout is torch.strided
        and value.is_contiguous()
    )


def base_of(node: Node) -> Node:
    """Follow reshapes back to the tensor that has the same numbers in the same order."""
    while node.target in RESHAPES:
        source = cast(Node, node.args[0])
        if not (is_plain(node) and is_plain(source)):
            break
        node = source
    return node


def readers_of(node: Node) -> Iterator[Node]:
    """List what reads a tensor, or a reshape of it."""
    for user in node.users:
        if user.target in RESHAPES and base_of(user) is base_of(node):
            yield from readers_of(user)
        else:
            yield user


def _is_kept(nodes: list[Node]) -> bool:
    """Check that inputs and results have to be in memory anyway.

    Otherwise Inductor would rather fuse the operations with those that compute or read them.
    """
    inside = set(nodes)
    inputs = {memory(z) for node in nodes for z in node.all_input_nodes if value_of(z).ndim}
    outputs = [set(readers_of(node)) - inside for node in nodes if value_of(node).ndim]
    return all(z in inside or not _is_fused(z) for z in inputs) and all(
        not readers or any(map(_reads_memory, readers)) for readers in outputs
    )


def _is_fused(node: Node) -> bool:
    """Check for an operation that Inductor computes where its result is read."""
    return can_lower(node.target) or node.target in FUSED


def _reads_memory(node: Node) -> bool:
    if node.op == "output" or node.target is aten.copy_.default or node.target in CALLED:
        return True
    return is_view(node) and any(map(_reads_memory, node.users))


def _member(nodes: list[Node]) -> Member | None:
    """Describe the computation for one leaf; the body says nothing of names and shapes."""
    inside = set(nodes)
    inputs: dict[Node, int] = {}
    scalars: dict[Node, int] = {}
    calls: list[Call] = []
    position: dict[Node, int] = {}  # of the call of a node

    def operand(z: Any) -> Any:
        if not isinstance(z, Node):
            return literal(z)
        base = base_of(z)
        if base in inside:
            return Operand("call", position[base])
        if z.target in (aten.full.default, aten.scalar_tensor.default):
            number = cast(Any, z.args[0] if z.target is aten.scalar_tensor.default else z.args[1])
            if isinstance(number, bool | int | float):
                return Filled(literal(number), value_of(z).dtype, value_of(z).ndim > 0)
        if value_of(z).ndim:
            return Operand("input", inputs.setdefault(base, len(inputs)))
        if z.target in CHEAP and z not in position and all(map(_is_kept_number, z.all_input_nodes)):
            add_call(z, scalar)  # it takes no time to compute it anew, and a kernel to keep it
        return Operand("call", position[z]) if z in position else scalar(z)

    def scalar(z: Any) -> Any:
        if not isinstance(z, Node):
            return literal(z)
        return Operand("scalar", scalars.setdefault(z, len(scalars)))

    def add_call(node: Node, operand: Callable[[Any], Any]) -> None:
        target, args = node.target, node.args
        if target in SUMS:
            target, args = aten.sum.default, args[:1]  # over all axes, whatever their number
        options = tuple((name, operand(z)) for name, z in sorted(node.kwargs.items()))
        call = Call(target, tuple(map(operand, args)), options)  # may add others before
        position[node] = len(calls)
        calls.append(call)

    for node in nodes:
        if node.target not in SUMS and not all(map(_is_simple, node.args)):
            return None
        add_call(node, operand)
    outputs = [node for node in nodes if set(readers_of(node)) - set(nodes)]
    if not (inputs and outputs):
        return None
    body = Body(
        tuple(value_of(z).dtype for z in inputs),
        tuple(value_of(z).dtype for z in scalars),
        tuple(calls),
        tuple(position[node] for node in outputs),
    )
    size = value_of(next(iter(inputs))).numel()
    if size > LONGEST_SUM and any(node.target in SUMS for node in nodes):
        return None
    return Member(nodes, body, size, list(inputs), list(scalars), outputs)


def _is_simple(z: Any) -> bool:
    return isinstance(z, Node | bool | int | float | str | torch.dtype | torch.memory_format | None)


def is_number(node: Node) -> bool:
    """Check for a tensor without axes."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim == 0


def _is_kept_number(node: Node) -> bool:
    """Check for a number that no family has overwritten."""
    writers = [user for user in memory(node).users if user.target is LEAFWISE]
    return is_number(node) and not any(memory(node) in written(user) for user in writers)


def literal(z: Any) -> Any:
    """Tell apart numbers that are equal: 0.0 and -0.0, 1 and 1.0."""
    return Number(type(z), repr(z)) if isinstance(z, bool | int | float) else z


def independent(graph: Graph, members: list[Member]) -> list[list[Member]]:
    """Group members of which none needs the results of another, or of itself."""
    owner = {node: 1 << i for i, member in enumerate(members) for node in member.nodes}
    needs: dict[Node, int] = {}  # bits: the members that a node needs
    for node, before in predecessors(graph).items():
        needs[node] = owner.get(node, 0)
        for z in before:
            needs[node] |= needs[z]
    levels: dict[int, list[Member]] = defaultdict(list)
    for i, member in enumerate(members):
        needed = 0
        for z in {z for node in member.nodes for z in node.all_input_nodes} - set(member.nodes):
            # A reshape of a result of its own is not outside.
            needed |= needs[z] if base_of(z) not in member.nodes else 0
        if not needed >> i & 1:
            levels[needed.bit_count()].append(member)  # what needs another needs more than it
    return [group for group in levels.values() if len(group) >= FEWEST]
