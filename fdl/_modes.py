"""The mode in which Python code runs: eagerly, traced by `jit` or Dynamo, or transformed."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch._guards import TracingContext
from torch.autograd import forward_ad

from fdl._torch_compat import assume_constant_result

tracing: ContextVar[Any] = ContextVar("fdl_tracing", default=None)  # what `jit` traces with


def is_tracing() -> bool:
    """Say whether `jit` is tracing."""
    return tracing.get() is not None


def is_eager() -> bool:
    """Say whether Python sees values: nothing is being traced, transformed or jitted."""
    return not (torch.compiler.is_compiling() or in_transform() or is_tracing())


@assume_constant_result  # Dynamo has the same transformations active while it traces
def in_transform() -> bool:
    """Say whether a transformation of torch.func is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@assume_constant_result
def under_vmap() -> bool:
    """Say whether a `vmap` is active."""
    return "Vmap" in _active()


@assume_constant_result
def beyond_first() -> bool:
    """Say whether derivatives beyond the first in reverse mode may be asked for."""
    if forward_ad._current_level >= 0:  # type: ignore[attr-defined]
        return True
    return _active().count("Grad") > 1


def lacks_kernels() -> bool:
    """Say whether a fused kernel that has no rule for `vmap` must not be used."""
    return beyond_first() or under_vmap()


def _active() -> list[str]:
    stack = torch._C._functorch.get_interpreter_stack() or []
    return [str(level.key()).rpartition(".")[2] for level in stack]


@assume_constant_result
def inductor_takes_loops() -> bool:
    """Say whether the compiler behind Dynamo may count steps: not in a plain `torch.compile`."""
    mode: Any = TracingContext.get().fake_mode
    return torch.compiler.is_exporting() or mode.shape_env.allow_scalar_outputs
