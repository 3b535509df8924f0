"""Programs as shared libraries: what Inductor's C++ wrapper compiles to."""

from __future__ import annotations

import ctypes
import inspect
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import Tensor

from fdl._compiler._inductor import Compiled, raise_python_error

ENTRY = "_Z19inductor_entry_implPP16AtenTensorOpaqueS1_"  # the function of such a library


class Library(NamedTuple):
    """A program that needs nothing but its library."""

    path: Path
    entry: int  # address of the function


def load(path: Path) -> Library | None:
    """Load a library, or return None if it has no such function.

    Raises:
        OSError: it cannot be loaded.
    """
    entry = getattr(ctypes.CDLL(str(path)), ENTRY, None)
    address = ctypes.cast(entry, ctypes.c_void_p).value if entry else None
    return Library(path, address) if address else None


def library_of(run: Compiled) -> Library | None:
    """Return the library that a program consists of, or None if it needs Python too."""
    known = getattr(run, "library", None)
    if known is not None:
        return cast(Library, known)
    compiled = getattr(run, "compiled", None)
    code = getattr(compiled, "current_callable", None)
    cells = inspect.getclosurevars(code).nonlocals if inspect.isfunction(code) else {}
    module = getattr(cells.get("f"), "__self__", None)
    if not inspect.ismodule(module) or set(cells) != {"f"} or cast(Any, compiled).constants:
        return None
    return load(Path(cast(str, module.__file__)))


def program(library: Library, outputs: int, execute: Any) -> Compiled:
    """Make a program of a library.

    Args:
        library: the library.
        outputs: how many tensors it returns.
        execute: calls it, given its address, inputs and the number of outputs.
    """

    def run(inputs: list[Tensor]) -> list[Tensor]:
        try:
            return cast(list[Tensor], execute(library.entry, inputs, outputs))
        except BaseException as error:
            raise_python_error(error)

    cast(Any, run).library = library
    return run
