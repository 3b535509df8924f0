"""What fdl needs of torch beyond its public functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

RELEASE = tuple(int(part) for part in torch.__version__.split(".")[:2])

Fn = TypeVar("Fn", bound=Callable[..., Any])


def assume_constant_result(fn: Fn) -> Fn:
    """Let Dynamo call `fn` while it traces, instead of tracing into it.

    Equals `torch.compiler.assume_constant_result` without its import of Dynamo, which takes a
    second.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn
