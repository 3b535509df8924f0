"""Write each family of leaves as one node; `_families.py` finds them."""

from __future__ import annotations

from collections.abc import Iterator
from operator import getitem
from typing import cast

import torch
from torch.fx import Graph, GraphModule, Node

from fdl._compiler._families import (
    CALLED,
    FEWEST,
    Member,
    base_of,
    find_families,
    independent,
    is_plain,
    readers_of,
)
from fdl._compiler._graph import caller, empty, memory, value_of
from fdl._compiler._leafwise import LEAFWISE, Body, leaf_source
from fdl._compiler._order import move_into_order, predecessors

aten = torch.ops.aten


def merge_families(module: GraphModule) -> None:
    """Write each family of at least `FEWEST` leaves as one node."""
    graph, seen = module.graph, set[Body]()
    _drop_copies_to_themselves(graph)
    _clone_results_of_calls(graph)
    while True:
        families = {
            body: members for body, members in find_families(graph).items() if body not in seen
        }
        if not families:
            return
        # Copies first: a tensor that is copied later cannot be written to.
        body, members = min(families.items(), key=lambda item: len(item[0].calls))
        seen.add(body)
        source = leaf_source(body)
        if source is not None:
            for group in independent(graph, members):
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


def _clone_results_of_calls(graph: Graph) -> None:
    """Let a computation, a copy, stand before what writes the results of loops to given memory.

    Inductor would write a kernel for each; copies for many leaves are a family.
    """
    copies = [
        copy
        for copy in graph.find_nodes(op="call_function", target=aten.copy_.default)
        if all(is_plain(cast(Node, z)) for z in copy.args[:2])
        and base_of(cast(Node, copy.args[1])).target in (getitem, *CALLED)
    ]
    for copy in copies if len(copies) >= FEWEST else ():
        value = cast(Node, copy.args[1])
        copy.replace_input_with(value, caller(graph, copy)(aten.clone.default, value))


def _merge(graph: Graph, group: list[Member], source: str) -> None:
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
                    targets[out] = empty(graph, value_of(out))
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


def _copy_of(out: Node) -> Node | None:
    """Return the node that copies a result into donated memory."""
    copies = (user for user in readers_of(out) if user.target is aten.copy_.default)
    return next((copy for copy in copies if base_of(cast(Node, copy.args[1])) is out), None)


def _free_to_write(
    copy: Node, member: Member, column: int, inside: set[Node], after: set[Node]
) -> list[Node] | None:
    """Check that a call may write to the memory that a result is copied into.

    Returns:
        The nodes that read what is there before, which have to run before the call; None if not all
        of them can.
    """
    argument = cast(Node, copy.args[0])
    out = member.outputs[column]
    old, new = value_of(argument), value_of(out)
    if not is_plain(argument) or (old.dtype, old.numel()) != (new.dtype, new.numel()):
        return None
    needed = {member.inputs[i] for i in member.body.needs(member.body.outputs[column])}
    readers = []
    for reader in _readers_of_memory(argument):
        if reader is copy:
            continue
        if reader in member.nodes:
            # Each number is read before it is written only if the result depends on it.
            sources = {z for z in reader.all_input_nodes if memory(z) is argument}
            if any(base_of(z) is not argument or argument in member.scalars for z in sources):
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
