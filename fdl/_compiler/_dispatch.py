"""Dispatch of calls that need nothing new, in C++.

`dispatch/` compares the arguments of a call with those that the known programs were made for, gives
donated memory away, and runs a program: about half a microsecond for each leaf of the state.
Whatever is new about a call, and every error, is left to `_jit.py`. The elementwise maths of eager
optimizers are computed there too. It is compiled once on a machine, while the first function is
compiled, and kept in the cache of programs. Until it is ready, programs are called from Python.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import cache
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from threading import Thread, get_native_id
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.backends.cpu import get_cpu_capability

from fdl._compiler import _cache
from fdl._compiler._donation import Donated
from fdl._compiler._inductor import Compiled, missing_compiler, raise_python_error, silence_log
from fdl._compiler._interrupt import INTACT
from fdl._compiler._library import Library, library_of, program
from fdl._compiler._nans import watching
from fdl._compiler._refusals import first_line
from fdl._compiler._settings import default_device, has_active_mode
from fdl._compiler._signature import unflatten
from fdl._modes import disabled, tracing

SOURCES = Path(__file__).with_name("dispatch")
# Quicker to compile than with Inductor's own, and loops over floats in vectors, by IEEE 754.
FLAGS = "-O2 -g0 -ftree-loop-vectorize -fno-math-errno -fsigned-zeros"
MOST = 8  # programs of a function that are tried; more are called from Python

_loaded: list[Any] = []  # the module, once it is built


class Direct(NamedTuple):
    """What a program is, for `dispatch/`."""

    run: Compiled  # from arguments and closed-over tensors to the results that `aliases` lacks
    spec: Hashable  # the structure of the result
    results: int  # how many
    aliases: dict[int, int]  # results that are written to donated arguments
    writes: bool  # to donated arguments
    places: Sequence[int] = ()  # of what it takes among the arguments, if in another order
    result_places: Sequence[int] = ()  # of the results among those that it computes, likewise


def start() -> None:
    """Load the extension, or begin to build it in a thread."""
    _extension()


def at_hand() -> Any:
    """Return the extension if this process or an earlier one has built it, else None."""
    if not _loaded and _is_kept():
        start()
    return _loaded[0] if _loaded else None


@cache
def _is_kept() -> bool:
    return _cache.find(_name()) is not None


def prepare(
    direct: Direct | None,
    spec: Hashable,
    leaves: Sequence[Tensor],
    constants: Sequence[Tensor],
    donated: Sequence[int],
    read: Callable[[], list[Tensor] | None],
) -> list[Any] | None:
    """Return a program for `call_known`, or nothing if it can only be called from Python.

    Return None while the extension is being built.

    Args:
        direct: the program.
        spec: structure of the arguments.
        leaves: the arguments.
        constants: the closed-over tensors.
        donated: indices of the arguments that the program is given.
        read: returns the closed-over tensors at a later call.
    """
    if not _extension().done():
        return None
    extension, library = _extension().result(), direct and library_of(direct.run)
    inputs = [*leaves, *constants]
    if direct is None or extension is None or not extension.takes(spec):
        return []
    if any(x.layout is not torch.strided for x in inputs):
        return []
    program = extension.make(
        spec,
        default_device(),
        direct.spec,
        read if constants else None,
        direct.run,
        library.entry if library else 0,
        inputs,
        list(donated),
        [_new(0, inputs[i].dtype, inputs[i].device) for i in donated],
        [_new(1, inputs[i].dtype, inputs[i].device) for i in donated],
        [direct.aliases.get(out, -1) for out in range(direct.results)],
        list(direct.places),
        list(direct.result_places),
        direct.writes,
    )
    return [program]


def from_library(library: Library, outputs: int) -> Compiled | None:
    """Make a program of its library, or return None if there is nothing to call it with."""
    extension = _extension().result()
    return program(library, outputs, extension.execute) if extension else None


def call_known(programs: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the result of the first program made for such arguments, or NotImplemented."""
    if not programs:
        return NotImplemented
    try:
        return _loaded[0].call(programs, args, kwargs)
    except BaseException as error:
        raise_python_error(error)


@cache
def _new(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=dtype, device=device)


@cache
def _extension() -> Future[Any]:
    """Load the extension, or build it in a thread; the result is its module, or None on failure."""
    future: Future[Any] = Future()
    name = _name()
    found = _cache.find(name)
    if found is None:
        # Two threads that import torch's compiler at the same time find parts of it missing.
        import torch._inductor.cpp_builder  # noqa: F401

    def load() -> None:
        try:
            extension = _load(found[0]) if found else _build(name)
            if extension is not None:
                _loaded.append(extension)
            future.set_result(extension)
        except Exception as error:
            message = (
                f"jit: calls are dispatched in Python, which takes longer ({first_line(error)})"
            )
            with suppress(UserWarning):  # a filter may make it an error, which nobody could catch
                warnings.warn(message, stacklevel=1)
        finally:  # whatever happened: others wait for it
            if not future.done():
                future.set_result(None)

    if found:
        load()
    else:  # not a daemon: a short process leaves the extension to the next ones
        Thread(target=load, name="fdl-dispatch").start()
    return future


os.register_at_fork(after_in_child=_extension.cache_clear)  # the child has no such thread


def _name() -> str:
    """Return the name in the cache of the extension for this torch and Python."""
    built_for = torch.__version__, torch.__file__, sys.version, get_cpu_capability(), FLAGS
    texts = b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.*")))
    digest = hashlib.sha256(texts + repr(built_for).encode()).hexdigest()
    return f"dispatch-{digest}{_cache.ENTRY}"  # with a lock of its own: programs wait for it


def _build(name: str) -> Any:
    """Compile and load the extension, or return None without a compiler."""
    if missing_compiler():
        return None
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions

    with _cache.lock(name):
        found = _cache.find(name)  # another process has compiled it meanwhile
        if found is not None:
            return _load(found[0])
        silence_log()
        options = CppTorchOptions(
            include_pytorch=True, warning_all=False, extra_flags=FLAGS.split()
        )
        with tempfile.TemporaryDirectory() as own:
            builder = CppBuilder("dispatch", str(SOURCES / "dispatch.cpp"), options, own)
            if sys.platform == "linux":
                os.setpriority(os.PRIO_PROCESS, get_native_id(), 5)  # the program comes first
            builder.build()
            library = Path(builder.get_target_file_path())
            return _load(_cache.keep(name, library, {}) or library)


def _load(library: Path) -> Any:
    """Import the extension, and give it the objects of Python that it uses."""
    loader = ExtensionFileLoader("dispatch", str(library))
    module = module_from_spec(ModuleSpec("dispatch", loader, origin=str(library)))
    example = torch.empty(1)
    module.install(
        Tensor,
        torch.nn.Parameter,
        Donated,
        disabled,
        watching,
        tracing,
        default_device,
        torch._C._functorch.peek_interpreter_stack,
        has_active_mode,
        unflatten,
        vars(forward_ad),
        INTACT,
        example,
        example._cdata,
    )
    return module
