"""Errors of a compiled program: those of eager torch, of its type and wording.

An error loses its type on the way through C++, and torch adds where in C++ it was raised.

A factorization says by an integer for each matrix, which is 0 if it succeeded, whether it failed.
Inductor would have that checked by torch's dispatcher, whose headers take longer to compile than
the rest of a small program.
"""

from __future__ import annotations

import ctypes
import re
from functools import cache
from typing import Any

import torch
from torch.fx.node import has_side_effect

from fdl._compiler._indices import OUT_OF_RANGE

# It has no result; torch 2.11 would drop it, and the error with it.
CHECK = has_side_effect(torch.ops.aten._linalg_check_errors.default)
RAISED = "\nException raised from "  # what follows is of no use to a reader
WITHIN = f"{RAISED}_linalg_check_errors"  # in another operation, such as svd
OF_KERNEL = "API call failed at "  # raised instead of the error of one of torch's own kernels
FAILED = re.compile(r"a factorization failed: matrix (\d+), info (-?\d+), one (\d), in (\S+)")


def check_code(info: str, count: int, function: str, one: bool) -> str:
    """Return C++ that raises if one of the integers is not 0.

    Args:
        info: the name of the tensor of the integers, int32 and contiguous.
        count: how many.
        function: the name of the function that the user has called.
        one: it factorizes a single matrix.
    """
    return (
        f"for (int64_t i = 0; i < {count}; i++) {{ "
        f"const int32_t failed = static_cast<const int32_t*>({info}.data_ptr())[i]; "
        "if (failed) throw std::runtime_error("
        '"a factorization failed: matrix " + std::to_string(i) + ", info " + '
        f'std::to_string(failed) + ", one {one:d}, in {function}"); }}'
    )


def linalg_error(message: str) -> RuntimeError | None:
    """Return the error of eager torch if a message is one of `check_code`, or of torch's check."""
    text, within, _ = message.partition(WITHIN)
    if within:
        return torch.linalg.LinAlgError(text)  # type: ignore[attr-defined]
    found = FAILED.search(message)
    if found is None:
        return None
    matrix, info, one = map(int, found.groups()[:3])
    infos = torch.zeros(matrix + 1, dtype=torch.int32, device="cpu")
    infos[matrix] = info
    try:
        CHECK(infos[0] if one else infos, found[4], is_matrix=bool(one))
    except RuntimeError as error:
        return error
    return None


def python_error(error: RuntimeError) -> Exception:
    """Return what eager torch would raise: an IndexError, a LinAlgError or a RuntimeError."""
    message = str(error)
    if OF_KERNEL in message and (what := _last_error()):
        message = what().decode(errors="replace")
    text = message.partition(RAISED)[0]
    if OUT_OF_RANGE in text:
        return IndexError(text)
    return linalg_error(message) or (error if text == str(error) else RuntimeError(text))


@cache
def _last_error() -> Any:
    """Return the function of torch ≥ 2.13 for the last error of a kernel in this thread."""
    library = ctypes.CDLL(torch._C.__file__)
    what = getattr(library, "torch_exception_get_what", None)
    if what is not None:
        what.restype = ctypes.c_char_p
    return what
