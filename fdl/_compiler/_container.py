"""Run the library of a program from a file, through the C interface that torch gives it.

torch's own loader keeps Python's lock while a program runs, so that no other thread would run
during an epoch; calls by `ctypes` release it.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Run = Callable[[list[Tensor]], list[Tensor]]

_aoti: Any = torch._C._aoti
_address = ctypes.pythonapi.PyCapsule_GetPointer  # torch passes addresses in capsules
_address.restype, _address.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype = ctypes.py_object
_capsule.argtypes = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p


def load(library: Path, outputs: int) -> Run:
    """Load a library; its file is not needed afterwards.

    Args:
        library: a library that `_package.py` wrote.
        outputs: how many tensors it returns.

    Raises:
        OSError: it cannot be loaded.
        RuntimeError: torch refuses it.
    """
    if library.with_suffix(".json").exists():  # a list of operations that torch calls by name
        runner = _aoti.AOTIModelContainerRunnerCpu(str(library), 1)
        return lambda leaves: runner.run(leaves)  # type: ignore[no-any-return]
    code: Any = ctypes.CDLL(str(library))
    container, one = ctypes.c_void_p(), ctypes.c_size_t(1)
    if code.AOTInductorModelContainerCreateWithDevice(ctypes.byref(container), one, b"cpu", None):
        raise RuntimeError(_last_error(code))
    count = ctypes.c_size_t(outputs)
    results_type = ctypes.c_void_p * outputs

    def run(leaves: list[Tensor]) -> list[Tensor]:
        handles = _aoti.unsafe_alloc_void_ptrs_from_tensors(leaves)
        inputs = (ctypes.c_void_p * len(leaves))(*[_address(handle, None) for handle in handles])
        results = results_type()
        if code.AOTInductorModelContainerRun(
            container, inputs, ctypes.c_size_t(len(leaves)), results, count, None, None
        ):
            raise RuntimeError(_last_error(code))
        return _aoti.alloc_tensors_by_stealing_from_void_ptrs(  # type: ignore[no-any-return]
            [_capsule(result, None, None) for result in results]
        )

    weakref.finalize(run, code.AOTInductorModelContainerDelete, container)
    return run


def _last_error(code: Any) -> str:
    """Return the message of the last error; torch 2.11 only prints it to stderr."""
    text = ctypes.c_char_p()
    if not hasattr(code, "AOTInductorGetLastError"):
        return "the program stopped with the error that is printed above"
    code.AOTInductorGetLastError(ctypes.byref(text))
    return (text.value or b"").decode(errors="replace")
