"""Find the operation that makes the first NaN or inf of a jitted call."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fdl import tree
from fdl._compiler._graph import is_smooth
from fdl._compiler._scan_eager import scan_as_loop
from fdl._compiler._user_lines import current_user_line, format_line
from fdl.tree import Tree

watching: ContextVar[bool] = ContextVar("fdl_nans", default=False)  # set by `fdl.debug.nans`
TESTS = {"NaN": torch.isnan, "inf": torch.isinf}
MOVES = ("where", "masked_fill", "clone", "copy", "_to_copy", "cat", "stack", "index", "select")


def check_result(result: Tree, leaves: Sequence[Tensor], rerun: Callable[[], Any]) -> None:
    """Raise a FloatingPointError if a result has a NaN or inf and no argument has.

    Args:
        result: of the program.
        leaves: of its arguments.
        rerun: runs the same function eagerly.
    """
    for kind in TESTS:
        paths = [path for path, x in tree.flatten_dict(result).items() if _has(kind, x)]
        if not paths or any(_has(kind, x) for x in leaves):
            continue
        finder = _Finder(kind)
        with finder:
            rerun()
        where = finder.first or "eagerly no operation makes one, so it comes from rounding"
        name = f"the result {paths[0]}" if paths[0] else "the result"
        raise FloatingPointError(f"jit: {name} has {kind}; {where}")


class _Finder(TorchDispatchMode):
    """Notes the first operation that makes a NaN, or an inf, of arguments without one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = self.first or any(_has(self.kind, x) for x in inputs)
        result = func(*args, **(kwargs or {}))
        if known or not inputs or func._opname.strip("_") in MOVES:
            return result
        if any(_has(self.kind, x) for x in pytree.tree_leaves(result)):
            self.first = (
                f"the first {self.kind} is made by {func._opname} at "
                f"{format_line(current_user_line())}{_steps()}"
            )
        return result


def _steps() -> str:
    """Name the step of each scan that is running, outermost first."""
    frames = [frame for frame, _ in traceback.walk_stack(None)][::-1]
    steps = [f.f_locals["i"] for f in frames if f.f_code is scan_as_loop.__code__]
    return f", in step {', '.join(map(str, steps))} of the scan" if steps else ""


def _has(kind: str, x: Any) -> bool:
    return isinstance(x, Tensor) and is_smooth(x) and bool(TESTS[kind](x).any())
