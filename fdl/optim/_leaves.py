"""Operands of elementwise maths that stand for the tensors of many leaves.

A function of one leaf that is called with `Leaves` records what it computes. `compute` then runs
each operation once for all leaves, with torch's foreach functions, and writes into memory that no
later operation reads. Each operation is the one that a single leaf would undergo, so the results
have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fdl._numerics import root

PLAIN = frozenset((Tensor, Parameter))
_NO_MEMORY = torch.empty(0, device="meta")


class NotElementwise(Exception):
    """Raised for everything that `Leaves` do not support."""


class Leaves(Tensor):
    """The tensors of many leaves at one place of a function: an argument, or a result to compute.

    It has no memory of its own, so code that bypasses `__torch_function__` cannot read values.
    """

    node: Node

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in RECORDERS:
            raise NotElementwise(func)
        nodes = [x.node if type(x) is Leaves else x for x in args]
        result = RECORDERS[func](*nodes, **(kwargs or {}))
        return _wrap(result) if type(result) is Node else result


class Node:
    """What `Leaves` stand for."""

    __slots__ = (
        *("kind", "operands", "operation", "place", "readers", "run", "tape", "tensors", "whole"),
    )

    tape: list[Node]  # the results of this batch of leaves, in the order of their computation
    tensors: list[Tensor]  # of an argument, or once computed
    run: Callable[[Node], list[Tensor]] | None  # None for an argument
    operands: tuple[Any, ...]  # nodes and scalars
    operation: Any  # the function of torch, if scalars are rounded to the dtype of the result
    readers: int  # results, not computed yet, that read the tensors
    kind: torch.dtype
    place: torch.device
    whole: bool  # of the shapes of the leaves; otherwise the tensors are 0-d

    def __init__(self, *fields: Any) -> None:
        self.tape, self.tensors, self.run, self.operands, self.kind, self.place, self.whole = fields
        self.readers = 0
        self.operation = None


def _wrap(node: Node) -> Leaves:
    leaves = Tensor._make_subclass(Leaves, _NO_MEMORY)
    leaves.node = node
    return leaves


def argument(tape: list[Node], tensors: list[Tensor], whole: bool) -> Leaves:
    """Make an argument from the tensors of a batch of leaves."""
    return _wrap(Node(tape, tensors, None, (), tensors[0].dtype, tensors[0].device, whole))


def _record(run: Callable[[Node], list[Tensor]], kind: torch.dtype, *operands: Any) -> Node:
    whole = False
    for x in operands:
        if type(x) is Node:
            x.readers += 1
            tape, place, whole = x.tape, x.place, whole or x.whole
    node = Node(tape, [], run, operands, kind, place, whole)
    tape.append(node)
    return node


def compute(results: Sequence[Leaves]) -> list[list[Tensor]]:
    """Compute the results of a function, and list the tensors of each."""
    nodes = [result.node for result in results]
    for node in nodes:
        node.readers += 1
    for node in nodes[0].tape:
        inputs = [x for x in node.operands if type(x) is Node]
        for x in inputs:
            x.readers -= 1
        if node.readers:
            node.tensors = node.run(node)  # type: ignore[misc]
        for x in inputs:
            if not x.readers:
                x.tensors = []  # frees memory early
    columns = [node.tensors for node in nodes]
    for i, node in enumerate(nodes):
        if node.run is None or node in nodes[:i]:
            columns[i] = [x.view_as(x) for x in columns[i]]  # one tensor has one place
    return columns


class Operation(NamedTuple):
    """An elementwise function of torch with foreach functions for floating tensors."""

    each: Callable[..., Tensor]  # of one leaf
    many: Callable[..., Any]  # of many
    into: Callable[..., Any]  # of many, into the memory of the first operand
    commutes: bool = False
    scales: bool = False  # `many` takes a 0-d tensor as the second operand
    only_cpu: bool = False  # elsewhere a foreach function may choose −0.0 for 0.0


def _by_foreach(operation: Operation, *operands: Any) -> Node:
    kind = _dtype(*operands)
    if not kind.is_floating_point:
        raise NotElementwise(operation)
    place = (operands[0] if type(operands[0]) is Node else operands[-1]).place
    rounded = [x if type(x) is Node else _rounded(x, kind, place) for x in operands]
    if any(x is None for x in rounded) or (operation.only_cpu and place.type != "cpu"):
        return _record(partial(_run_each, operation.each), kind, *operands)
    if operation.commutes and type(operands[0]) is not Node:
        rounded.reverse()
    node = _record(partial(_run_many, operation), kind, *rounded)
    node.operation = operation.each
    return node


def _rounded(operand: Any, kind: torch.dtype, place: torch.device) -> Any:
    """Round a scalar once for all leaves; None if torch does not round it before it computes."""
    if kind.itemsize < 4 or isinstance(operand, bool):
        return None  # it computes with float32; it does not subtract bools
    if isinstance(operand, Tensor):
        same = operand.device == place and operand.dtype is not torch.bool
        return operand.to(kind) if same else None
    # On a GPU, to divide by a number is to multiply by its reciprocal.
    exact = place.type == "cpu" and float(operand) == operand
    return torch.tensor(operand, dtype=kind, device=place) if exact else None


def _run_many(operation: Operation, result: Node) -> list[Tensor]:
    count = next(len(x.tensors) for x in result.operands if type(x) is Node)
    values = [x.tensors if type(x) is Node else [x] * count for x in result.operands]
    first, second = result.operands[0], result.operands[-1]
    slow = operation.each is torch.add and result.place.type == "cpu"
    if type(second) is not Node and operation.scales and not slow:
        values[-1] = second
    if _may_hold(first, result):
        operation.into(*values)
        return values[0]
    if operation.commutes and _may_hold(second, result):
        operation.into(*values[::-1])
        return values[-1]
    return list(operation.many(*values))


def _may_hold(operand: Any, result: Node) -> bool:
    """Return True if the memory of an operand may be overwritten with the result."""
    if type(operand) is not Node or operand.run is None or operand.readers:
        return False
    return operand.kind is result.kind and operand.whole == result.whole


def _by_leaf(function: Callable[..., Tensor], *operands: Any) -> Node:
    kind = _dtype(*operands)
    if not kind.is_floating_point:
        raise NotElementwise(function)
    return _record(partial(_run_each, function), kind, *operands)


def _compare(function: Callable[..., Tensor], *operands: Any) -> Node:
    _dtype(*operands)
    return _record(partial(_run_each, function), torch.bool, *operands)


def _where(condition: Any, new: Any, old: Any) -> Node:
    _like(condition)
    return _record(partial(_run_each, torch.where), _dtype(new, old), condition, new, old)


def _to(x: Any, dtype: Any) -> Node:
    if dtype is x.kind:
        return x
    if not isinstance(dtype, torch.dtype):  # to a device it may return the leaf itself
        raise NotElementwise(x)
    return _record(partial(_run_each, lambda leaf: leaf.to(dtype)), dtype, x)


def _reshape_as(x: Any, other: Any) -> Node:
    """Give each leaf a result of its shape, and a copy of its own of what is the same for all."""
    if type(x) is Node and type(other) is Node and x.whole == other.whole:
        return x
    if type(x) is Node or type(other) is not Node or other.whole:
        raise NotElementwise(x)
    kind = _like(x).dtype
    return _record(partial(_run_each, lambda leaf, shared: shared.clone()), kind, other, x)


def _run_each(function: Callable[..., Tensor], result: Node) -> list[Tensor]:
    count = next(len(x.tensors) for x in result.operands if type(x) is Node)
    columns = [x.tensors if type(x) is Node else repeat(x, count) for x in result.operands]
    return [function(*row) for row in zip(*columns, strict=True)]


def _dtype(*operands: Any) -> torch.dtype:
    """Return the dtype of a result, or raise if an operand is not supported."""
    first, *others = map(_like, operands)
    kind = torch.result_type(first, others[0]) if others else first.dtype
    for other in others[1:]:
        kind = torch.promote_types(kind, torch.result_type(first, other))
    return kind


def _like(operand: Any) -> Any:
    """Return something that promotes dtypes as the operand does."""
    if type(operand) is Node:
        return _example(operand.kind, operand.whole)
    if isinstance(operand, (bool, int, float)):
        return operand
    if type(operand) not in PLAIN or operand.ndim or operand.is_complex():
        raise NotElementwise(operand)
    if operand.requires_grad and torch.is_grad_enabled():
        raise NotElementwise(operand)
    return operand


@lru_cache
def _example(kind: torch.dtype, whole: bool) -> Tensor:
    return torch.empty((1,) if whole else (), dtype=kind, device="cpu")


def _roots(tensors: list[Tensor]) -> list[Tensor]:
    """Return the `root` of each, which is 0.0 for negative numbers and −0.0."""
    roots = torch._foreach_clamp_min(tensors, 0.0)
    torch._foreach_sqrt_(roots)
    torch._foreach_abs_(roots)
    return list(roots)


def _roots_into(tensors: list[Tensor]) -> None:
    torch._foreach_clamp_min_(tensors, 0.0)
    torch._foreach_sqrt_(tensors)
    torch._foreach_abs_(tensors)


def _operation(name: str, **properties: bool) -> Operation:
    many, into = getattr(torch, f"_foreach_{name}"), getattr(torch, f"_foreach_{name}_")
    return Operation(getattr(torch, name), many, into, **properties)


def _recorders() -> dict[Any, Callable[..., Any]]:
    """List the functions of torch, and the getters of a tensor, that accept `Leaves`."""
    foreach = [_operation(name, commutes=True, scales=True) for name in ("add", "mul")]
    foreach += [_operation("div", scales=True)]
    foreach += [_operation(name, only_cpu=True) for name in ("maximum", "minimum")]
    foreach += [_operation(name) for name in ("abs", "neg", "sign", "sqrt", "sub")]
    recorders: dict[Any, Callable[..., Any]] = {
        root: partial(_by_foreach, Operation(root, _roots, _roots_into)),
        torch.where: _where,
        Tensor.to: _to,
        Tensor.reshape_as: _reshape_as,
        Tensor.dtype.__get__: lambda x: x.kind,  # type: ignore[attr-defined]
        Tensor.device.__get__: lambda x: x.place,  # type: ignore[attr-defined]
    }
    for operation in foreach:
        for home in (torch, Tensor):
            recorders[getattr(home, operation.each.__name__)] = partial(_by_foreach, operation)
    for home in (torch, Tensor):
        for name in ("clamp", "lerp", "pow", "rsqrt"):
            recorders[getattr(home, name)] = partial(_by_leaf, getattr(torch, name))
        for name in ("eq", "ge", "gt", "le", "lt", "ne"):
            recorders[getattr(home, name)] = partial(_compare, getattr(torch, name))
    for name in ("__pow__", "__rdiv__", "__rpow__", "__rsub__"):
        recorders[getattr(Tensor, name)] = partial(_by_leaf, getattr(Tensor, name))
    return recorders


RECORDERS = _recorders()
