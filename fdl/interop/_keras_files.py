"""Read the configuration and the arrays of files of Keras, which nobody has to trust.

Only JSON and plain arrays are read, no code and no pickle; an array has its bytes in the file.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fdl._files import expanded


class KerasFile(NamedTuple):
    """What a file holds of a model: its layers as JSON, and its arrays by their HDF5 paths."""

    config: Any
    arrays: dict[str, Tensor]
    names: dict[str, str]  # of layers, by the HDF5 path of their variables
    legacy: bool  # an .h5 file of a whole model


def read(path: str | os.PathLike[str], caller: str) -> KerasFile:
    """Read a `.keras` file, or the `.h5` file of a whole model."""
    try:
        import h5py
    except ImportError:
        raise ImportError(
            f"{caller}: files of Keras are read with h5py: pip install h5py"
        ) from None
    path = expanded(path, caller)
    if not path.is_file():
        raise FileNotFoundError(f"{caller}: no such file: {path}")
    size = path.stat().st_size
    try:
        if zipfile.is_zipfile(path):
            config, content = _members(path, size)
            with h5py.File(io.BytesIO(content), "r") as file:
                return KerasFile(config, *_arrays(h5py, file, len(content)), legacy=False)
        with h5py.File(path, "r") as file:
            text = file.attrs.get("model_config")
            if text is None:
                raise ValueError(
                    "it has weights, but no configuration that tells their layers; save the whole "
                    "model: model.save('model.keras')"
                )
            return KerasFile(json.loads(text), *_arrays(h5py, file, size), legacy=True)
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(
            f"{caller}: cannot read {path}: {error or type(error).__name__}"
        ) from error


def _members(path: Path, size: int) -> tuple[Any, bytes]:
    """Read configuration and weights of the archive, which Keras stores uncompressed."""
    with zipfile.ZipFile(path) as archive:
        contents = []
        for name in ("config.json", "model.weights.h5"):
            found = [member for member in archive.infolist() if member.filename == name]
            if len(found) != 1:
                raise ValueError(f"it is an archive with {len(found)} times {name!r}, expected 1")
            if found[0].compress_type != zipfile.ZIP_STORED or found[0].file_size > size:
                raise ValueError(f"{name!r} is compressed, which Keras does not do")
            contents.append(archive.read(found[0]))
    return json.loads(contents[0]), contents[1]


def _arrays(h5py: Any, file: Any, size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all arrays but those of the optimizer, and the names of layers."""
    arrays, names = {}, {}
    for path, item in _items(h5py, file, "", set()):
        if "name" in item.attrs:
            names[path] = str(item.attrs["name"])
        if isinstance(item, h5py.Dataset):
            size -= item.nbytes
            if item.chunks is not None or item.is_virtual or item.external or size < 0:
                raise ValueError(f"{path!r} is not stored in the file itself, as Keras does")
            arrays[path] = _tensor(path, item)
    return arrays, names


def _items(h5py: Any, group: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Yield all groups and datasets below a group; links to elsewhere are refused."""
    for name in group:
        inner = f"{path}/{name}" if path else name
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"{inner!r} is a link")
        if not path and name.startswith("optimizer"):
            continue
        item = group[name]
        address = h5py.h5o.get_info(item.id).addr
        if address in seen:
            raise ValueError(f"{inner!r} is there twice")
        seen.add(address)
        yield inner, item
        if isinstance(item, h5py.Group):
            yield from _items(h5py, item, inner, seen)


def _tensor(path: str, dataset: Any) -> Tensor:
    if dataset.dtype.str == "|V2":  # bfloat16, which HDF5 does not have
        return torch.from_numpy(dataset[()].view(np.int16)).view(torch.bfloat16)
    if dataset.dtype.kind not in "fiu":
        raise ValueError(f"{path!r} has the dtype {dataset.dtype}, expected numbers")
    array = np.asarray(dataset[()])
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
