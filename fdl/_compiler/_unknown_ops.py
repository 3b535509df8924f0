"""Trace operations that have no fake implementation, by running them on zeros.

A fake implementation tells the shapes, strides and dtypes of an operation's results. Without one,
the operation runs on zeros, which tells the same if they do not depend on the values of arguments;
it runs on ones as well, to notice if they do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._library.simple_registry import singleton
from torch._library.utils import Kernel
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import UnsupportedOperatorException
from torch.utils._python_dispatch import _disable_current_modes

from fdl._compiler._trace import Traced, trace

NO_FAKE = re.compile(r"no fake impl registered for <CustomOpDef\((.+)\)>")  # a custom_op's error


class CannotTrace(RuntimeError):
    """An operation without a fake implementation cannot run on zeros."""


def trace_unknown(
    fn: Callable[..., Any], leaves: Sequence[Tensor], spec: Hashable, stack: ExitStack
) -> tuple[Traced, list[OpOverload]]:
    """Trace `fn`; in `stack`, operations get the fake implementations that they lack.

    Returns:
        The trace, and these operations.

    Raises:
        CannotTrace: an operation without a fake implementation cannot run on zeros, or its results
            have another shape on ones.
    """
    unknown: list[OpOverload] = []
    while True:
        try:
            return trace(fn, leaves, spec), unknown
        except Exception as error:
            op = _without_fake(error)
            if op is None or op in unknown:
                raise
            unknown.append(op)
            stack.enter_context(_learned_from_zeros(op))


def _without_fake(error: BaseException) -> OpOverload | None:
    """Return the operation that lacks a fake implementation, if that is what an error is about."""
    if isinstance(error, UnsupportedOperatorException):
        return error.func
    match = NO_FAKE.search(str(error))
    if match is None:
        return None
    namespace, _, name = match[1].partition("::")
    op: OpOverload = getattr(getattr(torch.ops, namespace), name).default
    return op


@contextmanager
def _learned_from_zeros(op: OpOverload) -> Iterator[None]:
    kernels = singleton.find(op.name()).fake_impl.kernels
    kernel = Kernel(lambda *args, **kwargs: _fake_results(op, args, kwargs), "fdl")
    kernels.append(kernel)
    try:
        yield
    finally:
        kernels.remove(kernel)


def _fake_results(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    like = next((x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)), None)
    if like is None or op._schema.is_mutable:
        raise CannotTrace(f"{op} has no fake implementation")
    try:
        with _disable_current_modes():
            results = [_run_on(fill, op, args, kwargs) for fill in (0, 1)]
    except Exception as error:
        raise CannotTrace(
            f"{op} has no fake implementation, and fails on zeros: {error}"
        ) from error
    on_zeros, on_ones = ([_metadata(x) for x in pytree.tree_leaves(result)] for result in results)
    if on_zeros != on_ones:
        raise CannotTrace(f"the shape or strides of a result of {op} depend on values")

    def fake(x: Tensor) -> Tensor:
        return like.new_empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)

    return pytree.tree_map_only(Tensor, fake, results[0])


def _run_on(value: int, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def filled(x: Tensor) -> Tensor:
        real = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        return real.fill_(value)

    args, kwargs = pytree.tree_map_only(Tensor, filled, (args, kwargs))
    return op(*args, **kwargs)


def _metadata(x: Any) -> Any:
    return (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x
