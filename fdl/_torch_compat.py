"""Facts about torch: its release, its active transformations, what its tracer must not enter."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._guards import TracingContext
from torch.autograd import forward_ad

Fn = TypeVar("Fn", bound=Callable[..., Any])


def assume_constant_result(fn: Fn) -> Fn:
    """Have Dynamo call `fn` while it traces, and not trace into it.

    Equals `torch.compiler.assume_constant_result`, which imports Dynamo: a second that nobody who
    does not compile should wait for.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


@assume_constant_result  # Dynamo has the same transformations active while it traces
def beyond_first() -> bool:
    """Say whether derivatives beyond the first in reverse mode may be asked for."""
    if forward_ad._current_level >= 0:  # type: ignore[attr-defined]
        return True
    return _active().count("Grad") > 1


@assume_constant_result
def under_vmap() -> bool:
    """Say whether a `vmap` is active."""
    return "Vmap" in _active()


def lacks_kernels() -> bool:
    """Say whether a fused kernel without a rule for `vmap` must not be used."""
    return beyond_first() or under_vmap()


def _active() -> list[str]:
    stack = torch._C._functorch.get_interpreter_stack() or []
    return [str(level.key()).rpartition(".")[2] for level in stack]


RELEASE = tuple(int(part) for part in torch.__version__.split(".")[:2])


@assume_constant_result
def in_transform() -> bool:
    """Say whether a torch.func transformation is active, also while Dynamo traces one."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@assume_constant_result
def _inductor_takes_loops() -> bool:
    """Say whether the compiler behind Dynamo may count steps: not in a plain `torch.compile`."""
    mode: Any = TracingContext.get().fake_mode
    return torch.compiler.is_exporting() or mode.shape_env.allow_scalar_outputs
