"""The mode in which Python code runs: eager, traced by `jit` or Dynamo, or transformed."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch._guards import TracingContext
from torch.autograd import forward_ad

from fdl._torch_compat import assume_constant_result

tracing: ContextVar[Any] = ContextVar("fdl_tracing", default=None)  # the tracer of `jit`
disabled: ContextVar[bool] = ContextVar("fdl_disabled", default=False)  # by `disable_jit`

# Transformations around a loop body that `jit` traces by itself, outermost first.
around: ContextVar[tuple[str, ...]] = ContextVar("fdl_around", default=())


@assume_constant_result  # Dynamo of torch 2.11 cannot read a ContextVar
def is_tracing() -> bool:
    """Check whether `jit` is tracing."""
    return tracing.get() is not None


def is_eager() -> bool:
    """Check whether Python sees values: nothing is traced or transformed."""
    return not (torch.compiler.is_compiling() or in_transform() or is_tracing())


@assume_constant_result  # Dynamo has the same transformations active while it traces
def in_transform() -> bool:
    """Check whether a transformation of torch.func is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@assume_constant_result
def under_vmap() -> bool:
    """Check whether a `vmap` is active."""
    return "Vmap" in active()


@assume_constant_result
def in_forward_mode() -> bool:
    """Check whether forward-mode derivatives may be taken here."""
    level: int = forward_ad._current_level  # type: ignore[attr-defined]
    return level >= 0 or "Jvp" in active()


@assume_constant_result
def beyond_first() -> bool:
    """Check whether higher or forward-mode derivatives may be taken here."""
    if forward_ad._current_level >= 0:  # type: ignore[attr-defined]
        return True
    return active().count("Grad") > 1


def avoid_fused_kernels() -> bool:
    """Check whether kernels without higher derivatives or a rule for `vmap` must not be used."""
    return beyond_first() or under_vmap()


def active() -> tuple[str, ...]:
    """Return the names of the active transformations, outermost first, such as Vmap and Grad."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return (*around.get(), *(str(level.key()).rpartition(".")[2] for level in stack))


@assume_constant_result
def inductor_takes_loops() -> bool:
    """Check whether the compiler behind Dynamo supports loops: plain `torch.compile` does not."""
    mode: Any = TracingContext.get().fake_mode
    return torch.compiler.is_exporting() or mode.shape_env.allow_scalar_outputs
