"""Dispatch of calls that need nothing new, in C++.

`dispatch/` compares the arguments of a call with those that the known programs were made for, gives
donated memory away, and runs a program: about half a microsecond for each leaf of the state.
Whatever is new about a call, and every error, is left to `_jit.py`. The elementwise maths of eager
optimizers are computed there too. It is compiled once on a machine, in the background while the
first function is compiled, and kept in the cache of programs. Until it is ready, programs are
called from Python, and a process that ends meanwhile leaves it to the next one.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import cache
from io import BufferedWriter
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.backends.cpu import get_cpu_capability

from fdl._compiler import _cache
from fdl._compiler._donation import Donated
from fdl._compiler._inductor import Compiled, raise_python_error
from fdl._compiler._interrupt import INTACT
from fdl._compiler._library import (
    Library,
    extension_module,
    from_python,
    library_of,
    program,
)
from fdl._compiler._nans import watching
from fdl._compiler._refusals import first_line
from fdl._compiler._settings import default_device, has_active_mode
from fdl._compiler._signature import unflatten
from fdl._modes import disabled, tracing

SOURCES = Path(__file__).with_name("dispatch")
# Loops over floats in vectors, by IEEE 754.
FLAGS = (
    "-O2 -DNDEBUG -ftree-loop-vectorize -fno-math-errno -fno-trapping-math -ffp-contract=off "
    "-std=c++20 -fPIC -shared -w"
)
if sys.platform == "darwin":  # where clang++ has no OpenMP; the symbols are those of Python
    FLAGS += " -undefined dynamic_lookup"
else:
    FLAGS += " -march=native -fopenmp"
LIBRARIES = "-ltorch -ltorch_cpu -ltorch_python"
MOST = 8  # programs of a function that are tried; more are called from Python

_loaded: list[Any] = []  # the module, once it is built
_compiles = Event()  # set when the compiler runs, or need not run


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
    """Load the extension, or begin to build it."""
    _extension()


def wait() -> None:
    """Wait until the extension is built, if it is being built, and do nothing without one."""
    _extension().result()


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


def from_library(library: Library, outputs: int) -> Compiled:
    """Make a program of its library."""
    extension = at_hand()
    return program(library, outputs, extension.execute if extension else from_python(library))


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
            _compiles.set()

    if found:
        load()
    else:  # a daemon: the process may end before the compiler does
        Thread(target=load, name="fdl-dispatch", daemon=True).start()
        _compiles.wait(0.2)  # but not before it runs, unless that of another process does
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
    if shutil.which(_compiler()[0]) is None:
        return None
    with _cache.lock(name) as lock, tempfile.TemporaryDirectory() as own:
        found = _cache.find(name)  # another process has compiled it meanwhile
        if found is not None:
            return _load(found[0])
        # In the folder of the cache one that has ended may have left it.
        place = Path(lock.name).parent if lock else Path(own)
        made = place / f"{name}{_cache.UNFINISHED}"
        if not made.exists():
            _compile(made, lock)
        library = Path(own, "dispatch.so")
        shutil.move(made, library)
        return _load(_cache.keep(name, library, {}) or library)


def _compile(made: Path, lock: BufferedWriter | None) -> None:
    """Compile the extension in a process that goes on, and keeps the lock, if this one ends."""
    unfinished = made.with_name(f"1-{made.name}")
    script = _cache.script_to_write([*_command(), str(unfinished)])
    process = subprocess.Popen(
        ["nice", "sh", "-c", script, str(unfinished), str(made)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[lock.fileno()] if lock else [],
        process_group=0,  # Ctrl-C is not for it
    )
    if lock is None:  # nobody could use it later
        atexit.register(_stop, process)
    _compiles.set()
    _, error = process.communicate()
    if process.returncode:
        raise RuntimeError(error)


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGTERM)


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


def _command() -> list[str]:
    """Return the command that compiles the extension, up to the name of the file to write.

    Torch has functions that write such a command, in modules whose import takes three seconds.
    """
    folder = Path(torch.__file__).parent
    headers = folder / "include"
    includes = [sysconfig.get_path("include"), headers, headers / "torch/csrc/api/include"]
    return [
        *_compiler(),
        str(SOURCES / "dispatch.cpp"),
        *FLAGS.split(),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{path}" for path in includes),
        f"-L{folder / 'lib'}",
        *LIBRARIES.split(),
        "-o",
    ]


def _load(library: Path) -> Any:
    """Import the extension, and give it the objects of Python that it uses."""
    module: Any = extension_module("dispatch", library)
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
