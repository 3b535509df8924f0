"""List the content of a tree file without loading it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fdl._files import expanded
from fdl._table import WIDTH, aligned
from fdl.io._reader import open_tree_file
from fdl.io._schema import as_container, leaf_value, walk
from fdl.tree import Tree
from fdl.tree._summary import dtype_name

LIMITS = (WIDTH, 24, 16, 24)  # most characters of a cell; paths get the rest of a line


@dataclass(frozen=True)
class TreeInfo:
    """The content of a tree file, from its header alone; `print` shows a table.

    >>> import tempfile, fdl
    >>> params = fdl.nn.linear(2, 1).init(fdl.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fdl.io.save(f"{folder}/it.safetensors", {"fc": params, "step": 5})
    ...     info = inspect(f"{folder}/it.safetensors")
    ...     sorted(info.read("fc"))  # reads nothing else of the file
    ['bias', 'weight']
    >>> info.leaves["fc.weight"].shape
    torch.Size([1, 2])
    >>> print(info)
    path       shape   dtype    bytes
    fc.weight  [1, 2]  float32      8
    fc.bias    [1]     float32      4
    step       5       int
    total                          12
    """

    path: Path
    leaves: dict[str, Any]  # by dotted path; tensors are on the device `meta`
    metadata: dict[str, Any]  # as passed to `save`; all metadata of a file of another writer
    ties: dict[str, str] = field(repr=False)  # path -> path under which the tensor is stored

    def read(self, at: str) -> Tree:
        """Read the leaf or subtree at a dotted path, and nothing else of the file.

        Args:
            at: a path in `leaves`, or of a container of them.

        Raises:
            KeyError: there is nothing at this path.
            ValueError: the file is damaged.
        """
        with open_tree_file(self.path, "inspect") as file:
            for path, node in walk(file.structure):
                if path == at:
                    return file.subtree(node, at, None)
        raise KeyError(f"read: nothing at {at!r} in {self.path}; it has {list(self.leaves)}")

    def __str__(self) -> str:
        rows = [("path", "shape", "dtype", "bytes")]
        total = 0
        for at, leaf in self.leaves.items():
            if not isinstance(leaf, Tensor):
                value = leaf if isinstance(leaf, (dict, list, tuple)) else repr(leaf)
                rows.append((at, str(value), type(leaf).__name__, ""))
                continue
            tied = at in self.ties
            total += 0 if tied else leaf.nbytes
            size = f"= {self.ties[at]}" if tied else f"{leaf.nbytes:,}"
            rows.append((at, str(list(leaf.shape)), dtype_name(leaf.dtype), size))
        return aligned([*rows, ("total", "", "", f"{total:,}")], numbers=(3,), limits=LIMITS)


def inspect(path: str | os.PathLike[str]) -> TreeInfo:
    """List the content of a file, reading its header alone.

    Args:
        path: a file of `save` or of another safetensors writer.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the header is damaged.

    >>> import tempfile, fdl
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fdl.io.save(f"{folder}/w.safetensors", {}, metadata={"epoch": 5})
    ...     inspect(f"{folder}/w.safetensors").metadata
    {'epoch': 5}
    """
    with open_tree_file(path, "inspect") as file:
        tensors = file.tensors()
        leaves = {
            at: tensors[at] if at in tensors else leaf_value(node)
            for at, node in walk(file.structure)
            if as_container(node, at) is None
        }
        return TreeInfo(expanded(path, "inspect"), leaves, file.metadata, file.ties)
