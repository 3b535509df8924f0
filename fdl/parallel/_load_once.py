"""One copy of what all processes of a host read: files that each of them maps into memory."""

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
from fdl.parallel._group import Mesh, T, group_of, on_all
from fdl.tree import Tree


def load_once(load: Callable[[], T], mesh: Mesh | None) -> T:
    """Load data in one process of each host, for all of its processes: they share the memory.

    The tensors are files in memory (where it has no room for them, in the temporary folder), which
    all processes map, and which have no name from then on: they go with the last process.

    Args:
        load: reads the data, a tree of tensors on the CPU and of anything that can be pickled.
        mesh: the processes, a `DeviceMesh` of one dimension; None is this process alone.

    Returns:
        What `load` returned, to be read only. Writing in place is seen by nobody else.

    Raises:
        Exception: what `load` raised; an `OSError` that says so in processes that did not call it.

    Example::

        images = parallel.load_once(lambda: data.fashion_mnist(train=True), mesh)

    >>> load_once(lambda: {"x": torch.ones(2), "name": "ones"}, None)
    {'x': tensor([1., 1.]), 'name': 'ones'}
    """
    group, _, _ = group_of(mesh, "load_once")
    return load() if group is None else _load_per_host(load, group)


MEMORY = Path("/dev/shm")  # a folder in memory, where Linux has it


@dataclass(frozen=True)
class _File:
    """Where a tensor lies."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def _load_per_host(load: Callable[[], T], group: Any) -> T:
    """Call a function in one process of each host, and share what it returns."""
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
        found = tree.map(lambda leaf: _map(leaf) if isinstance(leaf, _File) else leaf, written)
        on_all(group, lambda: None)  # all have mapped them: names are not needed any more
        return found
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
    # Not `shared`: should somebody write to it, nobody else sees that.
    flat = torch.from_file(str(file.path), shared=False, size=size, dtype=file.dtype)
    return flat.reshape(file.shape)
