"""Data shared by all processes of a host, through memory-mapped files."""

from __future__ import annotations

import math
import shutil
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdl import tree
from fdl._checks import check_function
from fdl.parallel._group import Mesh, T, group_of, on_all
from fdl.tree import Tree


def load_once(load: Callable[[], T], mesh: Mesh | None) -> T:
    """Load data in one process of each host, and share its memory with the others.

    Tensors are memory-mapped from files in /dev/shm (or the temporary folder if it is too small).
    The files are unlinked at once, so the memory is freed with the last process.

    Args:
        load: reads the data, a tree of tensors on the CPU and of anything that can be pickled.
        mesh: the processes, a `DeviceMesh` of one dimension; None for this process alone.

    Returns:
        The result of `load`. Treat it as read-only: other processes do not see writes.

    Raises:
        Exception: as raised by `load`; in processes that did not call it, an `OSError`.

    Example::

        images = parallel.load_once(lambda: data.fashion_mnist(train=True), mesh)

    >>> load_once(lambda: {"x": torch.ones(2), "name": "ones"}, None)
    {'x': tensor([1., 1.]), 'name': 'ones'}
    """
    check_function("load_once", "load", load)
    group, _, _ = group_of(mesh, "load_once")
    return load() if group is None else _load_per_host(load, group)


MEMORY = Path("/dev/shm")  # a folder in memory, on Linux


@dataclass(frozen=True)
class _File:
    """The file of a tensor."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def _load_per_host(load: Callable[[], T], group: Any) -> T:
    """Call a function in one process of each host, and share the result."""
    hosts = on_all(group, socket.gethostname)
    first = hosts.index(hosts[group.rank()])
    folder: Path | None = None

    def write() -> Tree:
        nonlocal folder
        loaded = load()
        leaves = [leaf for leaf in tree.leaves(loaded) if isinstance(leaf, Tensor)]
        folder = _make_folder(sum(leaf.nbytes for leaf in leaves))
        files = (folder / str(i) for i in range(len(leaves)))
        return tree.map(lambda x: _write(x, next(files)) if isinstance(x, Tensor) else x, loaded)

    try:
        written = on_all(group, write if group.rank() == first else lambda: None)[first]
        shared = tree.map(lambda leaf: _map(leaf) if isinstance(leaf, _File) else leaf, written)
        on_all(group, lambda: None)  # every process has mapped the files: they can be unlinked
        return shared
    finally:
        if folder is not None:
            shutil.rmtree(folder)


def _make_folder(size: int) -> Path:
    fits = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > size
    return Path(tempfile.mkdtemp(prefix="fdl-", dir=MEMORY if fits else None))


def _write(leaf: Tensor, path: Path) -> _File:
    flat = leaf.detach().cpu().contiguous().reshape(-1)
    flat.view(torch.uint8).numpy().tofile(path)
    return _File(path, tuple(leaf.shape), leaf.dtype)


def _map(file: _File) -> Tensor:
    size = math.prod(file.shape)
    if not size:
        return torch.empty(file.shape, dtype=file.dtype)
    # shared=False maps copy-on-write.
    flat = torch.from_file(str(file.path), shared=False, size=size, dtype=file.dtype)
    return flat.reshape(file.shape)
