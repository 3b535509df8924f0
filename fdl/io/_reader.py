"""Open a tree file: the header is checked, the tensors are read on demand."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdl._files import expanded
from fdl.io._json import as_numbers
from fdl.io._safetensors import Header, parse_json, read_header, read_tensors
from fdl.io._schema import Node, rebuild, walk
from fdl.tree import Tree, unflatten_dict


class File(NamedTuple):
    """An open tree file with a valid header."""

    descriptor: int
    where: str  # first words of error messages
    header: Header
    structure: Node
    ties: dict[str, str]  # path of a tensor -> path under which it is stored, if they differ
    has_structure: bool  # False for a file that only has names of tensors
    metadata: dict[str, Any]

    def name(self, path: str) -> str:
        return self.ties.get(path, path)

    def tensors(self) -> dict[str, Tensor]:
        """Map the path of each tensor to a `meta` tensor of its shape and dtype."""
        return {
            path: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            for path, node in walk(self.structure)
            if node == ["tensor"]
            for entry in [self.header.entries[self.name(path)]]
        }

    def read(self, paths: Mapping[str, torch.device | str | None]) -> dict[str, Tensor]:
        """Read the tensors at some paths to their devices; tied tensors stay tied."""
        stored = read_tensors(
            self.descriptor, self.header, {self.name(path) for path in paths}, self.where
        )
        moved: dict[Any, Tensor] = {}
        for path, device in paths.items():
            place = self.name(path), torch.device(device or "cpu")
            if place not in moved:
                moved[place] = stored[place[0]].to(place[1])
        return {
            path: moved[self.name(path), torch.device(device or "cpu")]
            for path, device in paths.items()
        }

    def subtree(self, node: Node, at: str, device: torch.device | str | None) -> Tree:
        paths = {path: device for path, inner in walk(node, at) if inner == ["tensor"]}
        try:
            # First without tensors: an unknown NamedTuple is an error before anything is read.
            rebuild(node, lambda path: torch.empty(0), at)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from None
        return rebuild(node, self.read(paths).__getitem__, at)


@contextmanager
def open_tree_file(path: str | os.PathLike[str], caller: str) -> Iterator[File]:
    path = expanded(path, caller)
    where = f"{caller}: cannot read {path}"
    if not path.exists():
        raise FileNotFoundError(f"{caller}: no such file: {path}")
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{where}: it is not a file")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        header = read_header(descriptor, where)
        try:
            file = File(descriptor, where, header, *_parse_metadata(header, where))
        except RecursionError as error:
            raise ValueError(f"{where}: the structure is nested too deep") from error
        yield file
    finally:
        os.close(descriptor)


def _parse_metadata(
    header: Header, where: str
) -> tuple[Node, dict[str, str], bool, dict[str, Any]]:
    """Parse structure, ties and the user's metadata from a header, and check that they agree."""
    has_structure = "fdl.tree" in header.metadata
    if has_structure:
        structure, ties, metadata = (
            parse_json(header.metadata.get(name, ""), f"{where}: {name}")
            for name in ("fdl.tree", "fdl.ties", "fdl.metadata")
        )
        if not isinstance(ties, dict) or not isinstance(metadata, dict):
            raise ValueError(f"{where}: fdl.ties and fdl.metadata must be objects")
        places = parse_json(header.metadata.get("fdl.floats", "[]"), f"{where}: fdl.floats")
        try:
            as_numbers(metadata, places)
        except ValueError as error:
            raise ValueError(f"{where}: fdl.floats: {error}") from error
    else:
        structure, ties, metadata = None, {}, dict(header.metadata)
    try:
        if not has_structure:
            structure = unflatten_dict({name: ["tensor"] for name in header.entries})
        places = list(walk(structure))
        if len({path for path, _ in places}) < len(places):
            raise ValueError("the structure is malformed: two places have one path")
        stored = [ties.get(path, path) for path, node in places if node == ["tensor"]]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not all(isinstance(name, str) for name in stored) or set(stored) != header.entries.keys():
        raise ValueError(f"{where}: the header's structure and its list of tensors disagree")
    return structure, ties, has_structure, metadata
