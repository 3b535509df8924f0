"""Move matrix products out of loops: one product for all steps instead of one in each.

In a recurrent net, the product of a step's input with a weight does not wait for the step before,
and nothing in the loop waits for the gradient of a weight, which is a sum over the steps:

    x₁ W, x₂ W, …  =  [x₁; x₂; …] W        x₁ᵀ y₁ + x₂ᵀ y₂ + …  =  [x₁; x₂; …]ᵀ [y₁; y₂; …]
"""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem
from typing import Any, NamedTuple, cast

import torch
from torch.fx import GraphModule, Node

from fdl._compiler._graph import LOOP, NEEDS_Y, VIEWS, caller, nodes_of, results_of, value_of

aten = torch.ops.aten
MOST = 1 << 24  # numbers of all steps that are kept for a product, or as many as the loop reads
RESHAPING = (*VIEWS, aten.permute.default)

Call = Callable[..., Node]
Result = tuple[Node, list[Node]]  # of the body, and what reads that of the loop


def move_products_out(module: GraphModule) -> None:
    """Rewrite the loops of a graph; those in their bodies have been rewritten before."""
    for node in module.graph.find_nodes(op="call_function", target=LOOP):
        body = cast(Node, node.args[0]).target
        calls = [z for z in module.graph.find_nodes(op="get_attr", target=body) if z.users]
        if len(calls) == 1 and node.users:
            loop = _Loop(module, node)
            loop.hoist()
            loop.sink_sums()
            loop.sink_results()
            loop.finish()


class _Factor(NamedTuple):
    """A factor of a product: a node, or its transpose."""

    base: Node
    transposed: bool


def _factor(node: Any) -> _Factor:
    transposed = False
    while node.target is aten.permute.default and list(node.args[1]) == [1, 0]:
        node, transposed = node.args[0], not transposed
    return _Factor(node, transposed)


def _source(result: Node) -> Node:
    """Return what a result is a copy of."""
    while result.target is aten.clone.default:
        result = cast(Node, result.args[0])
    return result


class _Loop:
    """A loop, with the operands and the results that it is to have."""

    def __init__(self, module: GraphModule, node: Node) -> None:
        reference, init, xs, constants = cast(Any, node.args)
        self.node = node
        self.body = cast(GraphModule, module.get_submodule(reference.target))
        inputs, results = nodes_of(self.body.graph, "placeholder"), results_of(self.body.graph)
        (self.output,) = nodes_of(self.body.graph, "output")
        n, m = len(init), len(init) + len(xs)
        self.length = value_of(xs[0]).shape[0]
        # The arguments of the body, and what the loop passes for them.
        self.init = dict(zip(inputs[:n], init, strict=True))
        self.rows = dict(zip(inputs[n:m], xs, strict=True))
        self.constants = dict(zip(inputs[m:], constants, strict=True))
        pairs: list[Result] = [(z, []) for z in results]
        for user in node.users:
            pairs[cast(int, user.args[1])][1].append(user)
        self.carry = dict(zip(inputs[:n], pairs[:n], strict=True))
        self.ys = pairs[n:]
        self.returned: dict[Node, Node] = {}  # values of all steps that it returns in addition
        # How many numbers they may be.
        self.room = max(MOST, sum(value_of(x).numel() for x in xs))
        first = node.next
        while first not in node.users:
            first = first.next
        self.before, self.after = caller(module.graph, node), caller(module.graph, first)

    def hoist(self) -> None:
        """Compute products of rows and constants before the loop."""
        for product in nodes_of(self.body.graph, "call_function"):
            if product.target not in (aten.mm.default, aten.addmm.default) or product.kwargs:
                continue
            *bias, a, b = map(_factor, product.args)
            known = all(z.base in self.constants for z in (*bias, b))
            if a.base not in self.rows or not known or any(z.transposed for z in bias):
                continue
            if any(value_of(z.base).ndim > 1 for z in bias) or not self._fits(product):
                continue
            values = self._product_of_all(self.before, product, self.rows[a.base])
            with self.body.graph.inserting_after(list(self.rows)[-1]):
                row = self.body.graph.placeholder("product")
            row.target, row.meta["val"] = row.name, value_of(product)
            self.rows[row] = values
            self._drop(product, row, values)
            product.replace_all_uses_with(row)

    def _fits(self, *values: Node) -> bool:
        """Check for room for values of all steps that the loop does not return anyway."""
        known = {_source(y) for y, _ in self.ys}
        left = self.room - self.length * sum(value_of(z).numel() for z in {*values} - known)
        self.room = left if left >= 0 else self.room
        return left >= 0

    def _product_of_all(self, call: Call, product: Node, left: Node) -> Node:
        """Multiply a factor of all steps by a constant."""
        *bias, a, b = map(_factor, product.args)
        right = self.constants[b.base]
        if b.transposed:
            right = _transpose(call, right)
        added = [self.constants[z.base] for z in bias]
        values = call(product.target, *added, _in_one(call, left, a.transposed), right)
        return call(aten.reshape.default, values, [self.length, *value_of(product).shape])

    def _drop(self, product: Node, row: Node, values: Node) -> None:
        """Return no product that is known before the loop."""
        _replace([z for y, readers in self.ys if _source(y) is product for z in readers], values)
        self.ys = [pair for pair in self.ys if _source(pair[0]) is not product]
        if NEEDS_Y and not self.ys:
            self.ys = [(self._copy(row), [])]

    def sink_sums(self) -> None:
        """Add up products, and what they are computed from, after the loop."""
        for argument in list(self.carry):
            product, reshaping = self._term(argument)
            if product.target is aten.mm.default:
                a, b = map(_factor, product.args)
                if self._return(a.base, b.base):
                    left = _in_one(self.after, self._all(a.base), not a.transposed)
                    right = _in_one(self.after, self._all(b.base), b.transposed)
                    self._add_after(argument, self._sum_of_products(left, right), reshaping)
        for argument in list(self.carry):
            total, reshaping = self._term(argument)
            if total.target is aten.sum.dim_IntList and not total.kwargs:
                x, axes = cast(Any, total.args[:2])
                if self._is_known(x) and axes:
                    n = value_of(x).ndim  # torch takes axis 0 of a number, too
                    axes = [0, *(axis % n + 1 for axis in axes if n)]
                    shape = list(value_of(total).shape)
                    total = self.after(aten.sum.dim_IntList, self._all(x), axes)
                    total = self.after(aten.reshape.default, total, shape)
                    self._add_after(argument, total, reshaping)

    def _sum_of_products(self, left: Node, right: Node) -> Node:
        """Compute leftᵀ right, so that oneDNN transposes the smaller of them in memory."""
        swapped = value_of(left).shape[1] > value_of(right).shape[1]
        first, second = (right, left) if swapped else (left, right)
        product = self.after(aten.mm.default, _transpose(self.after, first), second)
        return _transpose(self.after, product) if swapped else product

    def _term(self, argument: Node) -> tuple[Node, list[Node]]:
        """Return what each step adds to a leaf of the carry, and how it is reshaped before.

        Of a leaf with another use, or if it is the last one, return the leaf.
        """
        result = _source(self.carry[argument][0])
        terms = [z for z in result.args if z is not argument]
        adds = result.target is aten.add.Tensor and not result.kwargs and len(terms) == 1
        used = set(argument.users) != {result} or not self._is_only_returned(result)
        if not adds or used or len(self.carry) == 1 or not isinstance(terms[0], Node):
            return argument, []
        node = terms[0]
        if value_of(node).dtype != value_of(argument).dtype:
            return argument, []  # in the dtype of the terms, the total may overflow
        reshaping: list[Node] = []
        while node.target in RESHAPING and len(node.users) == 1:
            reshaping.insert(0, node)
            node = cast(Node, node.args[0])
        return node, reshaping

    def _is_only_returned(self, node: Node) -> bool:
        results = [z for z, _ in [*self.carry.values(), *self.ys] if _source(z) is node]
        return len(results) == 1 and {*results[0].users, *node.users} <= {*results, self.output}

    def _add_after(self, argument: Node, total: Node, reshaping: list[Node]) -> None:
        for node in reshaping:
            total = self.after(node.target, total, *node.args[1:])
        total = self.after(aten.add.Tensor, self.init[argument], total)
        _replace(self.carry.pop(argument)[1], total)

    def sink_results(self) -> None:
        """Compute the products that are ys after the loop."""
        for y, readers in list(self.ys):
            product = _source(y)
            if product.target is not aten.mm.default or not self._is_only_returned(product):
                continue
            a, b = map(_factor, product.args)
            smaller = value_of(a.base).numel() <= value_of(y).numel()
            if b.base not in self.constants or not (smaller or self._is_known(a.base)):
                continue
            if self._return(a.base) and not (NEEDS_Y and len(self.ys) == 1):
                values = self._product_of_all(self.after, product, self._all(a.base))
                _replace(readers, values)
                self.ys = [pair for pair in self.ys if pair[0] is not y]

    def _is_known(self, node: Node) -> bool:
        return node in self.rows or node in self.returned

    def _all(self, node: Node) -> Node:
        """Return the values of all steps, outside of the loop."""
        return self.rows[node] if node in self.rows else self.returned[node]

    def _return(self, *values: Node) -> bool:
        """Let the loop return values of the body; False if they are constant or too large."""
        new = [z for z in dict.fromkeys(values) if not self._is_known(z)]
        if any(z in self.constants for z in new) or not self._fits(*new):
            return False
        for value in new:
            all_values = self.after(getitem, self.node, 0)  # `finish` counts the results
            all_values.meta["val"] = self._stacked(value)
            self.returned[value] = all_values
            self.ys.append((self._copy(value), [all_values]))
        return True

    def _stacked(self, value: Node) -> Any:
        example = value_of(value)
        with cast(Any, example).fake_mode:
            return example.new_empty(self.length, *example.shape)

    def _copy(self, value: Node) -> Node:
        """Copy a result, which must not share memory with another one or an argument."""
        with self.body.graph.inserting_before(self.output), cast(Any, value_of(value)).fake_mode:
            options: dict[str, Any] = {"memory_format": torch.contiguous_format}
            copy = self.body.graph.call_function(aten.clone.default, (value,), options)
            copy.meta["val"] = torch.clone(value_of(value), **options)
        return copy

    def finish(self) -> None:
        """Write the new operands and results into the graphs."""
        results = [*self.carry.values(), *self.ys]
        self.output.args = ([z for z, _ in results],)
        self.body.graph.eliminate_dead_code()
        for argument in self.init.keys() - self.carry.keys():
            self.body.graph.erase_node(argument)
        unused = [row for row in self.rows if not row.users]
        for row in unused[len(unused) == len(self.rows) :]:
            self.body.graph.erase_node(row)
            del self.rows[row]
        self.body.recompile()
        reference, _, _, constants = cast(Any, self.node.args)
        init = [self.init[argument] for argument in self.carry]
        self.node.args = (reference, init, list(self.rows.values()), constants)
        self.node.meta["val"] = (
            *(value_of(z) for z in init),
            *(self._stacked(z) for z, _ in self.ys),
        )
        live = {reader for _, readers in results for reader in readers}
        for i, (_, readers) in enumerate(results):
            for reader in readers:
                reader.args = (self.node, i)
        for user in list(self.node.users):
            if user not in live:
                self.node.graph.erase_node(user)


def _replace(readers: list[Node], value: Node) -> None:
    for reader in readers:
        reader.replace_all_uses_with(value)


def _transpose(call: Call, matrix: Node) -> Node:
    return call(aten.permute.default, matrix, [1, 0])


def _in_one(call: Call, matrices: Node, transposed: bool) -> Node:
    """Put matrices `[steps, rows, columns]`, or their transposes, below one another."""
    if transposed:
        matrices = call(aten.permute.default, matrices, [0, 2, 1])
    steps, rows, columns = value_of(matrices).shape
    return call(aten.reshape.default, matrices, [steps * rows, columns])
