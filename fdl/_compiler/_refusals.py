"""What an error of torch's compiler says, in one line and in full."""

from __future__ import annotations

import hashlib
import inspect
import platform
import re
import subprocess
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fdl._compiler._trace import Traced
from fdl._version import __version__

CPP_ERROR = re.compile(r"\b(?:fatal )?error: .*")
TARGET = re.compile(r"^\s*target: (\S+)", re.MULTILINE)


def first_line(error: BaseException) -> str:
    r"""Return the first line of an error that says what went wrong.

    Of a failed C++ compilation it is the compiler's first error, and of a failed lowering the cause
    and the operation.

    >>> first_line(ValueError("no loops\nand a second line"))
    'ValueError: no loops'
    """
    cpp_error = CPP_ERROR.search(str(error))
    if cpp_error:
        return cpp_error[0].strip()
    while (inner := getattr(error, "inner_exception", None)) is not None:
        error = inner
    line = (str(error).strip().splitlines() or [""])[0]
    operations = refused_operations(error)
    if not operations:
        return f"{type(error).__name__}: {line}"
    # The text of a LoweringException starts with the type of its cause, which may be another one.
    return f"{re.sub(r'^(LoweringException: )+', '', line)}, in {operations[0]}"


def describe(fn: Callable[..., Any]) -> str:
    """Return the name of a function and where it is defined.

    >>> describe(len)
    'len'
    """
    name = getattr(fn, "__qualname__", None) or repr(fn)
    code = getattr(inspect.unwrap(fn), "__code__", None)
    return f"{name} ({Path(code.co_filename).name}:{code.co_firstlineno})" if code else name


class Refusal(RuntimeError):
    """Names operations that must not be compiled."""

    def __init__(self, operations: Sequence[str]) -> None:
        super().__init__(f"refused: {', '.join(operations)}")
        self.operations = tuple(operations)


def refused_operations(error: BaseException) -> tuple[str, ...]:
    """Return the names of the operations that could not be lowered, as far as they are known."""
    if isinstance(error, Refusal):
        return error.operations
    target = TARGET.search(str(error))
    return (target[1],) if target else ()


def write_log(
    fn: Callable[..., Any], traced: Traced, attempts: Sequence[tuple[str, BaseException]]
) -> Path | None:
    """Write what a report about a failure needs to a file in Inductor's cache folder.

    Args:
        fn: the function.
        traced: its graph.
        attempts: what was tried, and the error.

    Returns:
        The path of the file, or None if it cannot be written.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    parts = [
        "torch's compiler refused a function of fdl.jit. To report it, send this file; it contains "
        "the operations, shapes and dtypes of the function, and no values of its arguments.",
        f"fdl {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.platform()}\n{_cpp_compiler()}",
        f"function: {describe(fn)}",
        *(
            f"---- {attempt} ----\n{''.join(traceback.format_exception(error))}"
            for attempt, error in attempts
        ),
        f"---- traced graph ----\n{traced.graph.print_readable(print_output=False)}",
    ]
    text = "\n\n".join(parts)
    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    try:
        path = Path(cache_dir()) / "fdl" / f"refused-{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError:
        return None
    return path


def _cpp_compiler() -> str:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        command = [get_cpp_compiler(), "--version"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except Exception as error:  # there may be none
        return f"C++ compiler: {error}"
