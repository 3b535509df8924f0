"""Where in the user's program something happened, for errors that name a line of theirs."""

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
    for file in (torch.__file__, __file__, contextlib.__file__)
)
_PACKAGES = os.sep + "site-packages" + os.sep


@functools.cache
def _is_users_file(file: str) -> bool:
    torch_files, fdl_files, standard = _LIBRARIES
    if file.startswith(("<eval_with_key>", "<frozen", torch_files, fdl_files)):
        return False
    return not file.startswith(standard) or _PACKAGES in file


def is_users(code: CodeType) -> bool:
    """Say whether code was written by those who use fdl: neither torch's, fdl's nor Python's own.

    >>> is_users((lambda: 0).__code__), is_users(is_users.__code__)
    (True, False)
    """
    return _is_users_file(code.co_filename)


def line_here() -> Line | None:
    """Return the innermost line of the user's that is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_users(frame.f_code):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None


def line_of(error: BaseException) -> Line | None:
    """Return the innermost line of the user's in the traceback of an error."""
    return _innermost(traceback.walk_tb(error.__traceback__)) or line_here()


def _innermost(frames: Iterable[tuple[FrameType, int]]) -> Line | None:
    lines = [(f.f_code.co_filename, number) for f, number in frames if is_users(f.f_code)]
    return lines[-1] if lines else None


def line_text(line: Line | None) -> str:
    """Write a line as it is shown in errors: `train.py:12: loss = f(x)`."""
    if line is None:
        return "a line that is not known"
    file, number = line
    text = linecache.getline(file, number).strip()
    return f"{os.path.basename(file)}:{number}" + (f": {text}" if text else "")
