"""JAX's float64, for a block: the one place where tests turn it on."""

from contextlib import AbstractContextManager
from typing import Any


def x64(on: bool = True) -> AbstractContextManager[Any]:
    """Let JAX compute in float64 within a block, or not; `jax.experimental` had it before."""
    import jax

    enable = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    return enable(on)
