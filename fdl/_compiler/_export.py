"""`export`: a compiled function as a file."""

from __future__ import annotations

import errno
import inspect
import os
import shutil
import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload

from fdl import tree
from fdl._checks import check_function
from fdl._checks import describe as describe_argument
from fdl._compiler import _inductor, _package
from fdl._compiler._callbacks import calls_back
from fdl._compiler._decompose import decompose
from fdl._compiler._garbage import fewer_collections
from fdl._compiler._graph import NAMESPACES, nodes_of, operations
from fdl._compiler._jit import one_at_a_time
from fdl._compiler._program_file import (
    ENTRY,
    About,
    about,
    as_json,
    describe_arguments,
    kinds,
    structure,
)
from fdl._compiler._refusals import describe, first_line, write_log
from fdl._compiler._settings import as_written, current_settings, is_plain, use_settings
from fdl._compiler._signature import flatten, paths, runs_in_python, unflatten
from fdl._compiler._trace import Traced, trace
from fdl._compiler._unknown_ops import CannotTrace, trace_unknown
from fdl._dtensor import is_dtensor
from fdl._files import atomic_write, expanded
from fdl._modes import is_eager
from fdl._torch_compat import RELEASE
from fdl.tree._checks import check_tensors


def export(
    fn: Callable[..., Any], example_args: Sequence[Any], path: str | os.PathLike[str]
) -> None:
    """Compile a pure function of trees of tensors, and write the program to a `.pt2` file.

    `load_program` runs it in a process that has neither a compiler nor the code of `fn`, and
    computes the same bits as `jit(fn)` does here; from C++, torch's `AOTIModelPackageLoader` does.
    The program is for the structure, shapes and dtypes of the example, for the CPU, for this
    release of torch and for processors with the instructions of this one. It uses as many threads
    as torch does now. Closed-over tensors become part of the file, with their present values.

    Args:
        fn: a pure function, as for `jit`; a jitted function is exported as well.
        example_args: a tuple of its positional arguments; only structure, shapes, strides and
            dtypes matter.
        path: the file, whose name ends in `.pt2`; an old one is replaced, atomically.

    Raises:
        TypeError: `fn` is not a function, `example_args` is not a tuple of its arguments, or the
            arguments or results hold a leaf that is not a tensor, a container other than a dict,
            list, tuple or NamedTuple, or a key that is not a string.
        ValueError: a tensor is not on the CPU, `path` does not end in `.pt2`, two leaves have one
            path, or `fn` is not pure.
        NotImplementedError: `fn` calls Python (`debug.print`, `debug.callback`) or operations that
            are not torch's, or has loops and torch is older than 2.12.
        RuntimeError: there is no C++ compiler, torch's compiler refuses `fn`, or `export` is called
            in a traced or transformed function.
        OSError: the file cannot be written.

    >>> export(lambda x: x + 1, (torch.ones(2),), "add.so")
    Traceback (most recent call last):
    ValueError: export: path must end in .pt2, as torch's loaders expect, got 'add.so'
    """
    if not is_eager():
        raise RuntimeError("export: call it outside jit, torch.compile and torch.func")
    target = _checked_path(path)
    arguments = _named(fn, example_args)
    leaves = _checked_leaves(arguments)
    arguments = unflatten(leaves, flatten(arguments)[1])
    _, spec = flatten((tuple(arguments.values()), {}))
    settings = current_settings()

    def again() -> Traced:
        with use_settings(settings):
            return decompose(trace(fn, leaves, spec, unroll=False))

    with fewer_collections(), one_at_a_time, ExitStack() as stack:
        traced = _trace(fn, leaves, spec, stack)
        if not is_plain(settings):
            stack.enter_context(as_written())
        program = about(arguments, unflatten(traced.results, traced.spec))
        known = kinds(program.arguments, program.results)
        for node in (program.arguments, program.results):
            structure(node, known)  # raises for what `load_program` could not read
        _write(target, fn, traced, program, again)


def _checked_path(path: str | os.PathLike[str]) -> Path:
    """Raise now if a file cannot be written later: compiling takes a while."""
    target = expanded(path, "export")
    if target.suffix != ".pt2":
        raise ValueError(
            f"export: path must end in .pt2, as torch's loaders expect, got {os.fspath(path)!r}"
        )
    if not target.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, "export: there is no such folder; create it first", str(target.parent)
        )
    if target.is_dir() or not os.access(target.parent, os.W_OK):
        raise PermissionError(errno.EACCES, "export: it cannot be written", str(target))
    return target


def _named(fn: Callable[..., Any], example_args: Any) -> dict[str, Any]:
    """Return the arguments by name."""
    check_function("export", "fn", fn)
    if not isinstance(example_args, tuple | list) or hasattr(example_args, "_fields"):
        raise TypeError(
            "export: example_args must be a tuple of the arguments of fn, got "
            f"{describe_argument(example_args)}; write (state, batch), or (x,) for one argument"
        )
    try:
        parameters = inspect.signature(fn)
    except ValueError:  # a function of C without one
        return {str(i): arg for i, arg in enumerate(example_args)}
    try:
        bound = parameters.bind(*example_args)
    except TypeError as error:
        raise TypeError(f"export: example_args do not fit {describe(fn)}: {error}") from None
    names = []
    for name, value in bound.arguments.items():
        several = parameters.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
        names += [f"{name}{i}" for i in range(len(value))] if several else [name]
    return dict(zip(names, example_args, strict=True))


def _checked_leaves(arguments: dict[str, Any]) -> list[Tensor]:
    """Return the leaves of the arguments, with memory for each element, or raise."""
    leaves, spec = flatten(arguments)
    check_tensors(leaves, arguments, "export: every leaf of an argument")
    describe_arguments(arguments, "export: the arguments")  # raises for other containers
    if any(map(runs_in_python, leaves)) or any(map(is_dtensor, tree.leaves(arguments))):
        raise TypeError(
            "export: the arguments must be ordinary tensors with values, not DTensors or "
            "FakeTensors; fdl.parallel.gather makes ordinary tensors of DTensors"
        )
    for path, leaf in zip(paths(spec), leaves, strict=True):
        if leaf.device.type != "cpu":
            raise ValueError(
                f"export: {path} is on {leaf.device}, but a file is for the CPU; move the "
                "arguments with fdl.tree.to"
            )
    return [
        leaf.contiguous() if torch._debug_has_internal_overlap(leaf) else leaf for leaf in leaves
    ]


def _trace(
    fn: Callable[..., Any], leaves: Sequence[Tensor], spec: Hashable, stack: ExitStack
) -> Traced:
    """Trace a function into primitives, and raise if it needs Python."""
    name = f"export: {describe(fn)}"
    try:
        traced, unknown = trace_unknown(fn, leaves, spec, stack)
    except CannotTrace as error:
        raise NotImplementedError(f"{name}: {error}; a file can hold operations of torch") from None
    if calls_back(traced.graph):
        raise NotImplementedError(
            f"{name} calls fdl.debug.print or fdl.debug.callback, Python functions that a file "
            "cannot hold; remove the calls, or return the values"
        )
    called = [node.target for node in operations(traced.graph)]
    foreign = {str(op) for op in unknown} | {
        str(op) for op in called if isinstance(op, OpOverload) and op.namespace not in NAMESPACES
    }
    if foreign:
        raise NotImplementedError(
            f"{name} calls {', '.join(sorted(foreign))}, which a process that loads the file would "
            "not have; write it with operations of torch"
        )
    if not _inductor.HAS_CPP_WRAPPER and any(isinstance(op, HigherOrderOperator) for op in called):
        raise NotImplementedError(
            f"{name} has a loop or branch, which torch {'.'.join(map(str, RELEASE))} cannot write "
            "to a file; install torch 2.12 or newer, or export a single step"
        )
    if any(x.device.type != "cpu" for x in [*traced.constants, *traced.results]):
        raise ValueError(f"{name} closes over or returns a tensor on a GPU; a file is for the CPU")
    for steps, why in traced.unrolled:
        warnings.warn(f"{name}: the {steps} steps of a scan are unrolled: {why}", stacklevel=3)
    return decompose(traced)


def _write(
    target: Path,
    fn: Callable[..., Any],
    traced: Traced,
    program: About,
    without_unrolling: Callable[[], Traced],
) -> None:
    """Compile a trace, and write the file."""
    missing = _inductor.missing_compiler()
    if missing:
        raise RuntimeError(f"export: {missing}")
    with TemporaryDirectory(prefix="fdl-export-") as folder:
        files = _compile(fn, traced, program, without_unrolling, Path(folder))
        package = _package.write(files, Path(folder, "program.pt2"))

        def copy(file: Any) -> None:
            with package.open("rb") as source:
                shutil.copyfileobj(source, file)

        atomic_write(target, copy)


def _compile(
    fn: Callable[..., Any],
    traced: Traced,
    program: About,
    without_unrolling: Callable[[], Traced],
    folder: Path,
) -> list[Path]:
    attempts: list[tuple[str, Exception]] = []
    while True:
        inputs = [node.meta["val"] for node in nodes_of(traced.graph.graph, "placeholder")]
        metadata = {ENTRY: as_json(program)}
        try:
            return _package.lower(
                traced.graph, traced.mode, inputs, traced.constants, folder, metadata
            )
        except Exception as error:
            attempts.append(("to a file", error))
        if not traced.several_steps:
            log = write_log(fn, traced, attempts)
            raise RuntimeError(
                f"export: torch's compiler refused {describe(fn)} ({first_line(attempts[0][1])})"
                + (f"; full log: {log}" if log else "")
            ) from attempts[0][1]
        traced = without_unrolling()
