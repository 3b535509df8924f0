"""Programs as shared libraries: what Inductor's C++ wrapper compiles to."""

from __future__ import annotations

import ctypes
import inspect
import os
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fdl._compiler._inductor import Compiled, raise_python_error

ENTRY = "_Z19inductor_entry_implPP16AtenTensorOpaqueS1_"  # the function of such a library
MODULE = "inductor_entry_cpp"  # and the module of Python that it also is
POINTER = "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"  # what the module needs of torch
Execute = Callable[[int, list[Tensor], int], list[Tensor]]


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


def extension_module(name: str, path: Path) -> ModuleType:
    """Import a library as a module, which is not listed among the others."""
    loader = ExtensionFileLoader(name, str(path))
    return module_from_spec(ModuleSpec(name, loader, origin=str(path)))


def from_python(library: Library) -> Execute:
    """Return a function that calls a library as Inductor does, for `program`."""
    os.environ[POINTER] = str(torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr)  # type: ignore[attr-defined]
    call = extension_module(MODULE, library.path).inductor_entry_cpp
    handles, tensors = (
        torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors,
        torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs,
    )
    return lambda entry, inputs, outputs: tensors(call(handles(inputs)))


def program(library: Library, outputs: int, execute: Execute) -> Compiled:
    """Make a program of a library.

    Args:
        library: the library.
        outputs: how many tensors it returns.
        execute: calls it, given its address, inputs and the number of outputs.
    """

    def run(inputs: list[Tensor]) -> list[Tensor]:
        try:
            return execute(library.entry, inputs, outputs)
        except BaseException as error:
            raise_python_error(error)

    cast(Any, run).library = library
    return run
