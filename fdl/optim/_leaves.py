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

    tape: list[Leaves]  # the results of this batch of leaves, in the order of their computation
    tensors: list[Tensor]  # of an argument, or once computed
    run: Callable[[Leaves], list[Tensor]] | None  # None for an argument
    operands: tuple[Any, ...]
    readers: int  # results, not computed yet, that read the tensors
    kind: torch.dtype
    place: torch.device
    whole: bool  # of the shapes of the leaves; otherwise the tensors are 0-d

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in RECORDERS:
            raise NotElementwise(func)
        return RECORDERS[func](*args, **(kwargs or {}))


def argument(tape: list[Leaves], tensors: list[Tensor], whole: bool) -> Leaves:
    """Make an argument from the tensors of a batch of leaves."""
    return _make(tape, tensors, None, (), tensors[0].dtype, tensors[0].device, whole)


def _make(*fields: Any) -> Leaves:
    new = Tensor._make_subclass(Leaves, _NO_MEMORY)
    new.tape, new.tensors, new.run, new.operands, new.kind, new.place, new.whole = fields
    new.readers = 0
    return new


def _record(run: Callable[[Leaves], list[Tensor]], kind: torch.dtype, *operands: Any) -> Leaves:
    inputs = [x for x in operands if type(x) is Leaves]
    for x in inputs:
        x.readers += 1
    tape, place, whole = inputs[0].tape, inputs[0].place, any(x.whole for x in inputs)
    tape.append(_make(tape, [], run, operands, kind, place, whole))
    return tape[-1]


def compute(results: Sequence[Leaves]) -> list[list[Tensor]]:
    """Compute the results of a function, and list the tensors of each."""
    for result in results:
        result.readers += 1
    for step in results[0].tape:
        inputs = [x for x in step.operands if type(x) is Leaves]
        for x in inputs:
            x.readers -= 1
        step.tensors = step.run(step)  # type: ignore[misc]
        for x in inputs:
            if not x.readers:
                x.tensors = []  # frees memory early
    columns = [result.tensors for result in results]
    for i, result in enumerate(results):
        if result.run is None or any(result is other for other in results[:i]):
            columns[i] = [x.view_as(x) for x in columns[i]]  # one tensor has one place
    return columns


class Operation(NamedTuple):
    """An elementwise function of torch with foreach functions for floating tensors."""

    each: Callable[..., Tensor]  # of one leaf
    many: Callable[..., Any]  # of many
    into: Callable[..., Any]  # of many, into the memory of the first operand
    commutes: bool = False
    scales: bool = False  # `many` takes a 0-d tensor as the second operand


def _by_foreach(operation: Operation, *operands: Any) -> Leaves:
    kind = _dtype(*operands)
    if not kind.is_floating_point:
        raise NotElementwise(operation)
    if operation.commutes and type(operands[0]) is not Leaves:
        operands = operands[::-1]
    first, second = operands[0], operands[-1]
    if type(first) is Leaves and operation.scales and isinstance(second, Tensor):
        if type(second) is not Leaves and second.device == first.place and kind is first.kind:
            # Rounded once for all leaves. Torch itself rounds for 16 bits to float32 instead.
            second = second.to(kind) if kind.itemsize >= 4 else second
            return _record(partial(_run_many, operation), kind, first, second)
    if type(first) is Leaves and type(second) is Leaves:
        return _record(partial(_run_many, operation), kind, *operands)
    return _by_leaf(operation.each, *operands)


def _by_leaf(function: Callable[..., Tensor], *operands: Any) -> Leaves:
    kind = _dtype(*operands)
    if not kind.is_floating_point:
        raise NotElementwise(function)
    return _record(partial(_run_each, function), kind, *operands)


def _run_many(operation: Operation, result: Leaves) -> list[Tensor]:
    first, *others = result.operands
    rest = [x.tensors if type(x) is Leaves else x for x in others]
    if _may_hold(first, result):
        operation.into(first.tensors, *rest)
        return first.tensors
    if operation.commutes and _may_hold(others[0], result):
        operation.into(rest[0], first.tensors)
        return rest[0]
    return list(operation.many(first.tensors, *rest))


def _may_hold(operand: Any, result: Leaves) -> bool:
    """Return True if the memory of an operand may be overwritten with the result."""
    if type(operand) is not Leaves or operand.run is None or operand.readers:
        return False
    return operand.kind is result.kind and operand.whole == result.whole


def _run_each(function: Callable[..., Tensor], result: Leaves) -> list[Tensor]:
    count = next(len(x.tensors) for x in result.operands if type(x) is Leaves)
    columns = [x.tensors if type(x) is Leaves else repeat(x, count) for x in result.operands]
    return [function(*row) for row in zip(*columns, strict=True)]


def _dtype(*operands: Any) -> torch.dtype:
    """Return the dtype of the result of an operation; raise for operands that are not supported."""
    like = [_like(x) for x in operands]
    kind = torch.result_type(like[0], like[-1])
    for x in like[1:-1]:
        kind = torch.promote_types(kind, torch.result_type(like[0], x))
    return kind


def _like(operand: Any) -> Any:
    """Return something that promotes dtypes as the operand does."""
    if type(operand) is Leaves:
        return _example(operand.kind, operand.whole)
    if isinstance(operand, (bool, int, float)):
        return operand
    differentiated = operand.requires_grad and torch.is_grad_enabled()
    if type(operand) not in PLAIN or operand.ndim or differentiated or operand.is_complex():
        raise NotElementwise(operand)
    return operand


@lru_cache
def _example(kind: torch.dtype, whole: bool) -> Tensor:
    return torch.empty((1,) if whole else (), dtype=kind)


def _compare(function: Callable[..., Tensor], *operands: Any) -> Leaves:
    _dtype(*operands)
    return _record(partial(_run_each, function), torch.bool, *operands)


def _where(condition: Any, new: Any, old: Any) -> Leaves:
    _like(condition)
    return _record(partial(_run_each, torch.where), _dtype(new, old), condition, new, old)


def _to(x: Leaves, dtype: torch.dtype) -> Leaves:
    if dtype is x.kind:
        return x
    return _record(partial(_run_each, lambda leaf: leaf.to(dtype)), dtype, x)


def _reshape_as(x: Any, other: Any) -> Leaves:
    """Give every leaf a result of its shape, and of its own if they share one."""
    if type(other) is not Leaves:
        raise NotElementwise(other)
    if type(x) is Leaves and x.whole == other.whole:
        return x
    kind = _like(x).dtype
    if type(x) is Leaves or other.whole:
        raise NotElementwise(x)
    return _record(partial(_run_each, lambda leaf, shared: shared.clone()), kind, other, x)


def _roots(tensors: list[Tensor]) -> list[Tensor]:
    """Return the `root` of each, which is 0.0 for negative numbers and −0.0."""
    clamped = torch._foreach_clamp_min(tensors, 0.0)
    torch._foreach_sqrt_(clamped)
    torch._foreach_abs_(clamped)
    return list(clamped)


def _roots_into(tensors: list[Tensor]) -> None:
    torch._foreach_clamp_min_(tensors, 0.0)
    torch._foreach_sqrt_(tensors)
    torch._foreach_abs_(tensors)


def _operation(name: str, commutes: bool = False, scales: bool = False) -> Operation:
    many, into = getattr(torch, f"_foreach_{name}"), getattr(torch, f"_foreach_{name}_")
    return Operation(getattr(torch, name), many, into, commutes, scales)


def _recorders() -> dict[Any, Callable[..., Any]]:
    """List the functions of torch, and the getters, that accept `Leaves`."""
    foreach = [_operation(name, commutes=True, scales=True) for name in ("add", "mul")]
    foreach += [_operation("div", scales=True), _operation("sub")]
    foreach += [_operation(name) for name in ("abs", "maximum", "minimum", "neg", "sign", "sqrt")]
    recorders: dict[Any, Callable[..., Any]] = {
        root: partial(_by_foreach, Operation(root, _roots, _roots_into)),
        torch.where: _where,
        Tensor.to: _to,
        Tensor.reshape_as: _reshape_as,
        Tensor.dtype.__get__: lambda x: x.kind,  # type: ignore[attr-defined]
        Tensor.device.__get__: lambda x: x.place,  # type: ignore[attr-defined]
        Tensor.is_floating_point: lambda x: x.kind.is_floating_point,
        torch.is_floating_point: lambda x: x.kind.is_floating_point,
    }
    for operation in foreach:
        name = operation.each.__name__
        for function in (getattr(torch, name), getattr(Tensor, name)):
            recorders[function] = partial(_by_foreach, operation)
    for name in ("clamp", "lerp", "pow", "rsqrt", "__rdiv__", "__rpow__", "__rsub__"):
        for home in (torch, Tensor):
            if hasattr(home, name):
                recorders[getattr(home, name)] = partial(_by_leaf, getattr(Tensor, name))
    for name in ("eq", "ge", "gt", "le", "lt", "ne"):
        for home in (torch, Tensor):
            recorders[getattr(home, name)] = partial(_compare, getattr(Tensor, name))
    return recorders


RECORDERS = _recorders()
