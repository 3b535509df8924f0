"""Find computations that are alike for many leaves, and write each family of them as one node.

The update of an optimizer is the same few dozen operations for each leaf. Inductor lowers,
schedules and writes them anew for every leaf, in time that grows with the square of their number.
Here each family becomes one node, `fdl::leafwise_`, whose kernel is generated once and walks over a
table of the leaves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fdl._compiler._graph import LOOP, value_of
from fdl._compiler._leafwise import (
    LEAFWISE,
    Body,
    Call,
    Filled,
    Number,
    Operand,
    can_lower,
    leaf_source,
)
from fdl._compiler._order import memory, move_into_order, predecessors, written
from fdl._compiler._products import PRODUCT

aten, prims = torch.ops.aten, torch.ops.prims

FEWEST = 4  # leaves of a family
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
CALLED = (  # by libraries, which read memory
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.convolution.default,
    torch.ops.fdl.linear.default,
    PRODUCT,
    LOOP,
)


CHEAP = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.neg.default,
    prims.convert_element_type.default,
)
FUSED = (
    aten.expand.default,
    aten.cat.default,
    aten.constant_pad_nd.default,
    aten.embedding.default,
    aten.gather.default,
    aten.index.Tensor,
    prims.iota.default,
)


class _Member(NamedTuple):
    """The computation for one leaf."""

    nodes: list[Node]
    body: Body
    size: int
    inputs: list[Node]  # contiguous, with as many numbers as the leaf
    scalars: list[Node]
    outputs: list[Node]


def merge_families(module: GraphModule) -> None:
    """Write each family of at least `FEWEST` leaves as one node."""
    graph, seen = module.graph, set[Body]()
    _drop_copies_to_themselves(graph)
    _share_scalars(graph)
    while True:
        families = {body: members for body, members in _families(graph).items() if body not in seen}
        if not families:
            return
        # Copies first: a tensor that is copied later cannot be written to.
        body, members = min(families.items(), key=lambda item: len(item[0].calls))
        seen.add(body)
        source = leaf_source(body)
        if source is not None:
            for group in _independent(graph, members):
                _merge(graph, group, source)


def _drop_copies_to_themselves(graph: Graph) -> None:
    """Remove what writes an unchanged argument into its own memory."""
    for copy in graph.find_nodes(op="call_function", target=aten.copy_.default):
        argument, value = cast(list[Node], copy.args[:2])
        while value.target is aten.clone.default:
            value = cast(Node, value.args[0])
        if value is argument and not copy.users:
            graph.erase_node(copy)
    graph.eliminate_dead_code()


def _share_scalars(graph: Graph) -> None:
    """Compute numbers once, such as a rate, that are computed in the same way for each leaf."""
    known: dict[Any, Node] = {}
    for node in graph.nodes:
        # A result has memory of its own, so it is not shared.
        once = can_lower(node.target) or _is_full_sum(node)
        if not (once and _is_number(node) and _is_only_computed_with(node)):
            continue
        key = (node.target, *map(_literal, (*node.args, *sorted(node.kwargs.items()))))
        first = known.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
    graph.eliminate_dead_code()


def _is_number(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim == 0


def _is_kept_number(node: Node) -> bool:
    """Check for a number that no family has overwritten."""
    writers = [user for user in memory(node).users if user.target is LEAFWISE]
    return _is_number(node) and not any(memory(node) in written(user) for user in writers)


def _is_only_computed_with(node: Node) -> bool:
    return all(can_lower(user.target) or user.target is aten.copy_.default for user in node.users)


def _literal(z: Any) -> Any:
    """Tell apart numbers that are equal: 0.0 and -0.0, 1 and 1.0."""
    return Number(type(z), repr(z)) if isinstance(z, bool | int | float) else z


# -------------------------------------------------------------------------------------- members


def _families(graph: Graph) -> dict[Body, list[_Member]]:
    """Find the computations that are the same for at least `FEWEST` leaves."""
    families: dict[Body, list[_Member]] = defaultdict(list)
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
        if _is_leafwise(node) or _is_full_sum(node):
            parent[node] = node
            for base in map(_base, node.all_input_nodes):
                if base in parent and value_of(base).ndim:
                    parent[root(base)] = root(node)
    components: dict[Node, list[Node]] = defaultdict(list)
    for node in parent:
        components[root(node)].append(node)
    return list(components.values())


def _is_leafwise(node: Node) -> bool:
    """Check for an operation that computes each number from one number of each input."""
    if not can_lower(node.target) or not _is_plain(node) or not value_of(node).ndim:
        return False
    shape = value_of(node).shape
    return all(
        isinstance(z.meta.get("val"), Tensor)
        and (value_of(z).ndim == 0 or (_is_plain(z) and value_of(z).shape == shape))
        for z in node.all_input_nodes
    )


def _is_full_sum(node: Node) -> bool:
    """Check for a sum over all axes of a leaf, to one number."""
    if node.target not in SUMS or not _is_plain(node) or value_of(node).ndim:
        return False
    return _is_plain(node.all_input_nodes[0]) and value_of(node.all_input_nodes[0]).ndim > 0


def _is_plain(node: Node) -> bool:
    value = node.meta.get("val")
    return (
        isinstance(value, Tensor)
        and value.dtype in NUMBERS
        and value.layout is torch.strided
        and value.is_contiguous()
    )


def _base(node: Node) -> Node:
    """Follow reshapes back to the tensor that has the same numbers in the same order."""
    while node.target in RESHAPES:
        source = cast(Node, node.args[0])
        if not (_is_plain(node) and _is_plain(source)):
            break
        node = source
    return node


def _readers(node: Node) -> Iterator[Node]:
    """List what reads a tensor, or a reshape of it."""
    for user in node.users:
        if user.target in RESHAPES and _base(user) is _base(node):
            yield from _readers(user)
        else:
            yield user


def _is_kept(nodes: list[Node]) -> bool:
    """Check that inputs and results have to be in memory anyway.

    Otherwise Inductor would rather fuse the operations with those that compute or read them.
    """
    inside = set(nodes)
    inputs = {memory(z) for node in nodes for z in node.all_input_nodes if value_of(z).ndim}
    outputs = [set(_readers(node)) - inside for node in nodes if value_of(node).ndim]
    return all(z in inside or not _is_fused(z) for z in inputs) and all(
        not readers or any(map(_reads_memory, readers)) for readers in outputs
    )


def _is_fused(node: Node) -> bool:
    """Check for an operation that Inductor computes where its result is read."""
    return can_lower(node.target) or node.target in FUSED


def _reads_memory(node: Node) -> bool:
    if node.op == "output" or node.target is aten.copy_.default or node.target in CALLED:
        return True
    return getattr(node.target, "is_view", False) and any(map(_reads_memory, node.users))


def _member(nodes: list[Node]) -> _Member | None:
    """Describe the computation for one leaf; the body says nothing of names and shapes."""
    inside = set(nodes)
    inputs: dict[Node, int] = {}
    scalars: dict[Node, int] = {}
    calls: list[Call] = []
    position: dict[Node, int] = {}  # of the call of a node

    def operand(z: Any) -> Any:
        if not isinstance(z, Node):
            return _literal(z)
        base = _base(z)
        if base in inside:
            return Operand("call", position[base])
        if z.target in (aten.full.default, aten.scalar_tensor.default):
            number = cast(Any, z.args[0] if z.target is aten.scalar_tensor.default else z.args[1])
            if isinstance(number, bool | int | float):
                return Filled(_literal(number), value_of(z).dtype, value_of(z).ndim > 0)
        if value_of(z).ndim:
            return Operand("input", inputs.setdefault(base, len(inputs)))
        if z.target in CHEAP and z not in position and all(map(_is_kept_number, z.all_input_nodes)):
            add_call(z, scalar)  # it takes no time to compute it anew, and a kernel to keep it
        return Operand("call", position[z]) if z in position else scalar(z)

    def scalar(z: Any) -> Any:
        if not isinstance(z, Node):
            return _literal(z)
        return Operand("scalar", scalars.setdefault(z, len(scalars)))

    def add_call(node: Node, operand: Callable[[Any], Any]) -> None:
        target, args = node.target, node.args
        if target in SUMS:
            target, args = aten.sum.default, args[:1]  # over all axes, whatever their number
        options = tuple((name, operand(z)) for name, z in sorted(node.kwargs.items()))
        call = Call(target, tuple(map(operand, args)), options)
        position[node] = len(calls)
        calls.append(call)

    for node in nodes:
        if not all(
            map(
                _is_simple,
                (*node.args[: 1 if node.target in SUMS else None], *node.kwargs.values()),
            )
        ):
            return None
        add_call(node, operand)
    outputs = [node for node in nodes if set(_readers(node)) - set(nodes)]
    if not (inputs and outputs):
        return None
    body = Body(
        tuple(value_of(z).dtype for z in inputs),
        tuple(value_of(z).dtype for z in scalars),
        tuple(calls),
        tuple(position[node] for node in outputs),
    )
    size = value_of(next(iter(inputs))).numel()
    return _Member(nodes, body, size, list(inputs), list(scalars), outputs)


def _is_simple(z: Any) -> bool:
    return isinstance(z, Node | bool | int | float | str | torch.dtype | torch.memory_format | None)


# -------------------------------------------------------------------------------------- merging


def _independent(graph: Graph, members: list[_Member]) -> list[list[_Member]]:
    """Group members of which none needs the results of another, or of itself."""
    owner = {node: 1 << i for i, member in enumerate(members) for node in member.nodes}
    needs: dict[Node, int] = {}  # bits: the members that a node needs
    for node, before in predecessors(graph).items():
        needs[node] = owner.get(node, 0)
        for z in before:
            needs[node] |= needs[z]
    levels: dict[int, list[_Member]] = defaultdict(list)
    for i, member in enumerate(members):
        needed = 0
        for z in {z for node in member.nodes for z in node.all_input_nodes} - set(member.nodes):
            # A reshape of a result of its own is not outside.
            needed |= needs[z] if _base(z) not in member.nodes else 0
        if not needed >> i & 1:
            levels[needed.bit_count()].append(member)  # what needs another needs more than it
    return [group for group in levels.values() if len(group) >= FEWEST]


def _merge(graph: Graph, group: list[_Member], source: str) -> None:
    """Replace a group by one node, which writes into donated memory or into new tensors."""
    inside = {node for member in group for node in member.nodes}
    before = predecessors(graph)
    after = set[Node]()
    for node, needed in before.items():
        if node not in inside and any(z in inside or z in after for z in needed):
            after.add(node)
    last = [node for node in graph.nodes if node in inside][-1]
    with graph.inserting_after(last):
        call = graph.call_function(LEAFWISE, ())
    call.meta["val"] = None
    reads: list[Node] = []
    targets: dict[Node, Node] = {}  # of each output
    copies: set[Node] = set()  # that the call makes unnecessary
    needed_by_call: list[Node] = []
    for member in group:
        reads += [*member.inputs, *member.scalars]
        for column, out in enumerate(member.outputs):
            copy = _copy_of(out)
            readers = _free_to_write(copy, member, column, inside, after) if copy else None
            if copy is None or readers is None or copy.args[0] in targets.values():
                with graph.inserting_before(call):
                    targets[out] = _empty(graph, value_of(out))
            else:
                targets[out] = cast(Node, copy.args[0])
                copies.add(copy)
                needed_by_call += readers
    sizes = [member.size for member in group]
    in_parts = all(value_of(out).ndim for out in group[0].outputs)
    call.args = (source, in_parts, sizes, reads)
    call.kwargs = {"writes": list(targets.values())}
    for node in inside:
        needed_by_call += before[node]
    for out, target in targets.items():
        shaped = target
        if value_of(target).shape != value_of(out).shape:
            with graph.inserting_after(call):
                shaped = graph.call_function(aten.view.default, (target, list(value_of(out).shape)))
            shaped.meta["val"] = value_of(out)
            before[shaped] = [call]
        before.setdefault(target, [])
        for user in [user for user in out.users if user not in inside]:
            user.replace_input_with(out, shaped)
            before[user].append(shaped)
    for copy in copies:
        graph.erase_node(copy)
    before[call] = [z for z in needed_by_call if z not in inside | after] + list(targets.values())
    for node in graph.nodes:
        replaced = copies if node in inside else inside | copies
        before[node] = [call if z in replaced else z for z in before[node]]
    move_into_order(graph, before)
    graph.eliminate_dead_code()


def _empty(graph: Graph, value: Tensor) -> Node:
    options: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
    size = value.shape or (1,)  # Inductor fills an empty tensor without axes
    node = graph.call_function(aten.empty.memory_format, (list(size),), options)
    with cast(Any, value).fake_mode:
        node.meta["val"] = torch.empty(size, **options)
    return node


def _copy_of(out: Node) -> Node | None:
    """Return the node that copies a result into donated memory."""
    copies = (user for user in _readers(out) if user.target is aten.copy_.default)
    return next((copy for copy in copies if _base(cast(Node, copy.args[1])) is out), None)


def _free_to_write(
    copy: Node, member: _Member, column: int, inside: set[Node], after: set[Node]
) -> list[Node] | None:
    """Check that a call may write to the memory that a result is copied into.

    Returns:
        The nodes that read what is there before, which have to run before the call; None if not all
        of them can.
    """
    argument = cast(Node, copy.args[0])
    out = member.outputs[column]
    old, new = value_of(argument), value_of(out)
    if not _is_plain(argument) or (old.dtype, old.numel()) != (new.dtype, new.numel()):
        return None
    needed = {member.inputs[i] for i in member.body.needs(member.body.outputs[column])}
    readers = []
    for reader in _readers_of_memory(argument):
        if reader is copy:
            continue
        if reader in member.nodes:
            # Each number is read before it is written only if the result depends on it.
            sources = {z for z in reader.all_input_nodes if memory(z) is argument}
            if any(_base(z) is not argument or argument in member.scalars for z in sources):
                return None
            if argument not in needed:
                return None
        elif reader in inside or reader in after or reader.target is aten.clone.default:
            return None  # Inductor may replace a copy by what it copies
        else:
            readers.append(reader)
    return readers


def _readers_of_memory(node: Node) -> Iterator[Node]:
    for user in node.users:
        yield user
        if memory(user) is not user:
            yield from _readers_of_memory(user)
