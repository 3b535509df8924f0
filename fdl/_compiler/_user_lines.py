"""Find the line of the user's program that an error is about."""

from __future__ import annotations

import contextlib
import functools
import linecache
import os
import sys
import traceback
from collections.abc import Iterable
from types import CodeType, FrameType

import torch

Line = tuple[str, int]  # file, number

_LIBRARIES = tuple(
    os.path.dirname(os.path.abspath(file)) + os.sep
    for file in (torch.__file__, os.path.dirname(__file__), contextlib.__file__)
)
_PACKAGES = os.sep + "site-packages" + os.sep


@functools.cache
def _is_user_file(file: str) -> bool:
    torch_files, fdl_files, standard = _LIBRARIES
    if file.startswith(("<eval_with_key>", "<frozen", torch_files, fdl_files)):
        return False
    return not file.startswith(standard) or _PACKAGES in file


def is_user_code(code: CodeType) -> bool:
    """Check that code belongs neither to torch, nor to fdl, nor to Python's standard library.

    >>> is_user_code((lambda: 0).__code__), is_user_code(is_user_code.__code__)
    (True, False)
    """
    return _is_user_file(code.co_filename)


def current_user_line() -> Line | None:
    """Return the innermost line of user code that is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_user_code(frame.f_code):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None


def user_line_of(error: BaseException) -> Line | None:
    """Return the innermost line of user code in the traceback of an error."""
    return _innermost(traceback.walk_tb(error.__traceback__)) or current_user_line()


def _innermost(frames: Iterable[tuple[FrameType, int]]) -> Line | None:
    lines = [(f.f_code.co_filename, number) for f, number in frames if is_user_code(f.f_code)]
    return lines[-1] if lines else None


def format_line(line: Line | None) -> str:
    """Format a line for an error message: `train.py:12: loss = f(x)`."""
    if line is None:
        return "an unknown line"
    file, number = line
    text = linecache.getline(file, number).strip()
    return f"{os.path.basename(file)}:{number}" + (f": {text}" if text else "")
