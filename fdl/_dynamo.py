"""What Dynamo, torch's tracer of Python code, has to know when users compile with it."""

from collections.abc import Callable
from typing import Any, TypeVar

Fn = TypeVar("Fn", bound=Callable[..., Any])


def assume_constant_result(fn: Fn) -> Fn:
    """Have Dynamo call `fn` while it traces, and not trace into it.

    Equals `torch.compiler.assume_constant_result`, which imports Dynamo: a second that nobody who
    does not compile should wait for.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn
