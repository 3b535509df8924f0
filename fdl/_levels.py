"""Which transformations of torch.func are active: whether a fused kernel of torch may serve."""

import torch
from torch.autograd import forward_ad

from fdl._dynamo import assume_constant_result

__all__ = ["beyond_first", "lacks_kernels", "under_vmap"]


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
