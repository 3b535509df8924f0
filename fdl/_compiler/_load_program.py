"""`load_program`: run a file of `export` without a compiler or the code of the function."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fdl import _modes
from fdl._compiler._container import Run, load
from fdl._compiler._program_errors import python_error
from fdl._compiler._program_file import About, by_name, check_here, differences, kinds, read
from fdl._compiler._program_file import structure as structure_of
from fdl._compiler._signature import (
    flatten,
    positions,
    resolved,
    runs_in_python,
    signature,
    unflatten,
    unordered,
)
from fdl._files import expanded
from fdl.tree import Tree


def load_program(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """Load a program that `export` wrote; it needs neither a compiler nor the code of the function.

    The program computes the same bits as the jitted function on the processor where it was
    exported. Its results never share memory with its arguments, or with anything else.

    Args:
        path: the file.

    Returns:
        A function of positional arguments: trees of the structure, shapes and dtypes with which the
        program was exported. The keys of dicts may have another order, and tensors with other
        strides are copied. NamedTuples of fdl are restored as such; another NamedTuple becomes one
        of the same name and fields.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a file of `export`, or damaged; at call: an argument has another
            structure, shape, dtype or device (each is listed with its path), or requires grad.
        RuntimeError: it is for another release of torch or another processor, or it cannot be
            loaded; at call: it is transformed or traced.
        TypeError: another number of arguments, or a leaf that is not a tensor (at call).
        IndexError: an index is out of range (at call).
        LinAlgError: a matrix cannot be factorized (at call).

    >>> load_program("epoch.pt2")
    Traceback (most recent call last):
    FileNotFoundError: load_program: epoch.pt2: no such file; write it with fdl.export
    """
    file = expanded(path, "load_program")
    where = f"load_program: {os.fspath(path)}"
    about, files = read(file, where)
    check_here(about, where)
    known = kinds(about.arguments, about.results)
    take = _taker(about, structure_of(about.arguments, known, first=True), where)
    results = structure_of(about.results, known)
    run = _load(files, len(about.result_leaves), where)

    def program(*args: Any) -> Any:
        if not _modes.is_eager() or torch.autograd.forward_ad._current_level >= 0:
            raise RuntimeError(
                f"{where}: a program from a file cannot be traced, vmapped or differentiated; "
                "export a function that does this inside"
            )
        leaves = take(args)
        try:
            with torch._C._DisableAutocast():  # the program contains the casts
                return unflatten(run(leaves), results)
        except RuntimeError as error:
            raised = python_error(error)
            if type(raised) is RuntimeError:
                raised = RuntimeError(f"{where}: {raised}")
            raise raised from None

    return program


def _load(files: dict[str, bytes], outputs: int, where: str) -> Run:
    """Load the library of a program, from a temporary folder."""
    try:
        with TemporaryDirectory(prefix="fdl-program-") as folder:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            (library,) = Path(folder).glob("*.so")
            return load(library, outputs)
    except (OSError, RuntimeError, ValueError) as error:
        line = str(error).strip().partition("\n")[0]
        if isinstance(error, OSError) and error.errno:
            raise OSError(
                error.errno, f"{where}: {error.strerror}; set TMPDIR to another folder"
            ) from None
        raise RuntimeError(
            f"{where}: it cannot be loaded ({line}); export the function again here, or, if "
            "libraries in the folder for temporary files cannot be run, set TMPDIR to another"
        ) from None


def _taker(
    about: About, expected: Hashable, where: str
) -> Callable[[tuple[Any, ...]], list[Tensor]]:
    """Return a function that takes the leaves from arguments, or raises.

    Args:
        about: the program.
        expected: structure of its arguments.
        where: first words of error messages.
    """
    cpu = torch.device("cpu")
    forms = tuple(
        (torch.Size(leaf.shape), tuple(leaf.strides), getattr(torch, leaf.dtype), cpu)
        for leaf in about.argument_leaves
    )
    form = unordered(by_name(expected))
    orders: dict[Hashable, list[int]] = {}  # of the leaves, by structure of the arguments

    def take(args: tuple[Any, ...]) -> list[Tensor]:
        leaves, spec = flatten(args)
        order = orders.get(spec)
        if order is None:
            if unordered(by_name(spec)) != form:
                raise _mismatch(about, args, where)
            order = orders[spec] = positions(expected, spec)
        leaves = [leaves[i] for i in order]
        if not all(isinstance(leaf, Tensor) for leaf in leaves) or any(map(runs_in_python, leaves)):
            raise _mismatch(about, args, where)
        _check_grad(about, leaves, where)
        if any(leaf.layout is not torch.strided for leaf in leaves):
            raise _mismatch(about, args, where)
        leaves = resolved(leaves)
        found = signature(leaves)
        if found == forms:
            return leaves
        if [(x[0], *x[2:]) for x in found] != [(x[0], *x[2:]) for x in forms]:  # but for strides
            raise _mismatch(about, args, where)
        return [
            leaf
            if old == new
            else torch.empty_strided(*new[:2], dtype=new[2], device=cpu).copy_(leaf)
            for leaf, old, new in zip(leaves, found, forms, strict=True)
        ]

    return take


def _check_grad(about: About, leaves: Sequence[Tensor], where: str) -> None:
    """Raise for an argument that requires grad, in grad mode."""
    if not torch.is_grad_enabled() or not any(leaf.requires_grad for leaf in leaves):
        return
    pairs = zip(about.argument_leaves, leaves, strict=True)
    paths = [place.path for place, leaf in pairs if leaf.requires_grad]
    raise ValueError(
        f"{where}: {', '.join(paths)} require grad, but there is no backward() through a program "
        "from a file; detach them, or call under torch.no_grad()"
    )


def _mismatch(about: About, args: Sequence[Tree], where: str) -> Exception:
    """Return the error for arguments that the program does not take."""
    names = ", ".join(about.arguments)
    if len(args) != len(about.arguments):
        return TypeError(
            f"{where}: expected {len(about.arguments)} arguments ({names}), got {len(args)}"
        )
    lines = differences(about, args, where) or ["an OrderedDict has its keys in another order"]
    return ValueError(
        f"{where}: the arguments differ from those of the export; change them, or export the "
        "function again with arguments like these:\n  " + "\n  ".join(lines)
    )
