"""Rows of Parquet and Arrow files, a part of a file at a time."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fdl._files import expanded
from fdl.data._rows import check_within
from fdl.data._sources import Read

SUFFIXES = (".parquet", ".arrow", ".feather", ".ipc")


def table(path: Path | str, x: str, y: str) -> Read:
    """Make a function that reads rows of two columns of Parquet or Arrow files, for `stream`.

    Such files are read by the part: a row group of Parquet, a record batch of Arrow. One part is
    kept, so that neighbouring rows cost one read; rows in random order read every part for each
    chunk. For random order, write small parts, or the columns to `.npy` files once (`on_disk`).

    Args:
        path: a `.parquet`, `.arrow`, `.feather` or `.ipc` file, or a folder of them, whose rows
            follow one another in the order of the files' names. Needs `pip install 'fdl[parquet]'`.
        x: name of a column of numbers, of lists of one length (nested ones too), of fixed-shape
            tensors, or of images in files (PNG, JPEG or WebP bytes, or Hugging Face's structs of
            them).
        y: name of another, such as that of the labels.

    Returns:
        A function from rows, int64 [k], to the pair of tensors [k, ...]: numbers of the column's
        dtype, images uint8 [k, height, width] if they are grey, else [k, 3, height, width].

    Raises:
        ImportError: pyarrow is not installed.
        FileNotFoundError: there is no such file.
        ValueError: a file is damaged or lacks a column, a column is of several types, or there are
            no rows; at call: a row is not in the files, or the column holds nulls, lists or images
            of several shapes, or images of more than 8 bits.
        TypeError: at call: the column holds something else, such as text.

    Example::

        read = data.table("folder/of/parquet", x="image", y="label")
        for chunk in data.stream(read, data.sequential_indices(60_000, 256), steps=20): ...
    """
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError(
            f"table: reading {path} needs pyarrow; `pip install 'fdl[parquet]'`"
        ) from error
    files = _files(expanded(path, "table"))
    try:
        parts = [part for file in files for part in _parts(file, (x, y))]
    except pyarrow.ArrowException as error:
        raise ValueError(f"table: a file of {path} is damaged: {error}") from error
    _check_kinds(parts, (x, y))
    rows_of = [part.rows for part in parts]
    if not any(rows_of):
        raise ValueError(f"table: there are no rows in {path}")
    ends = np.cumsum(rows_of)
    starts, total = ends - rows_of, int(ends[-1])
    load = lru_cache(maxsize=1)(lambda i: parts[i].load())

    def read(rows: Tensor) -> tuple[Tensor, Tensor]:
        check_within("table", rows, total)
        if not rows.numel():  # leaves [0, ...] of the right shapes
            x_of_one, y_of_one = read(torch.zeros(1, dtype=torch.int64))
            return x_of_one[:0], y_of_one[:0]
        wanted, back = np.unique(rows.numpy(), return_inverse=True)
        owner = np.searchsorted(ends, wanted, side="right")
        found = [load(i).take(wanted[owner == i] - starts[i]) for i in np.unique(owner)]
        both = pyarrow.concat_tables(found)
        first, second = (
            _tensor(both.column(name).combine_chunks(), f"table: column {name!r} of {path}")
            for name in (x, y)
        )
        return first[back], second[back]

    return read


class _Part(NamedTuple):
    """A part of a file that is read as a whole."""

    rows: int
    load: Callable[[], Any]  # gives a pyarrow.Table of both columns
    kinds: tuple[Any, Any]  # the types of the columns
    file: Path


def _files(path: Path) -> list[Path]:
    """List the files of a table."""
    files = [path] if path.is_file() else sorted(path.glob("*"))
    found = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not found:
        got = "another file" if path.is_file() else "none"
        raise FileNotFoundError(f"table: expected {', '.join(SUFFIXES)} files, got {got} at {path}")
    return found


def _parts(file: Path, names: tuple[str, str]) -> list[_Part]:
    """List the parts of a file, without reading them."""
    from pyarrow import ipc, memory_map
    from pyarrow.parquet import ParquetFile

    if file.suffix.lower() == ".parquet":
        with ParquetFile(file) as parquet:
            kinds = _kinds(file, parquet.schema_arrow, names)
            counts = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]

        def group(i: int) -> Any:
            with ParquetFile(file) as parquet:
                return parquet.read_row_group(i, columns=list(dict.fromkeys(names)))

        return [_Part(n, partial(group, i), kinds, file) for i, n in enumerate(counts)]

    import pyarrow

    with memory_map(str(file)) as mapped:
        arrow = ipc.open_file(mapped)
        kinds = _kinds(file, arrow.schema, names)
        counts = [arrow.get_batch(i).num_rows for i in range(arrow.num_record_batches)]

    def batch(i: int) -> Any:
        arrow = ipc.open_file(memory_map(str(file)))
        return pyarrow.Table.from_batches([arrow.get_batch(i)]).select(list(dict.fromkeys(names)))

    return [_Part(n, partial(batch, i), kinds, file) for i, n in enumerate(counts)]


def _kinds(file: Path, schema: Any, names: tuple[str, str]) -> tuple[Any, Any]:
    """Return the types of both columns."""
    for name in names:
        count = schema.names.count(name)
        if count != 1:
            what = f"{count} columns" if count else "no column"
            has = ", ".join(schema.names)
            raise ValueError(f"table: {file} has {what} {name!r}; it has {has}")
    return schema.field(names[0]).type, schema.field(names[1]).type


def _check_kinds(parts: list[_Part], names: tuple[str, str]) -> None:
    """Raise unless all parts have the types of the first."""
    for part in parts:
        for name, first, kind in zip(names, parts[0].kinds, part.kinds, strict=True):
            if kind != first:
                raise ValueError(
                    f"table: column {name!r} must have one type in all files, got {first} in "
                    f"{parts[0].file} and {kind} in {part.file}; write one of them again"
                )


def _tensor(column: Any, what: str) -> Tensor:
    """Convert a column to a tensor [n, ...]."""
    from pyarrow import types
    from pyarrow.compute import list_value_length

    if column.null_count:
        raise ValueError(f"{what} must hold no nulls, got {column.null_count}")
    kind = column.type
    if hasattr(column, "to_numpy_ndarray"):  # fixed-shape tensors
        return torch.from_numpy(np.array(column.to_numpy_ndarray()))
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return _tensor(column.field("bytes"), what)
    if types.is_binary(kind) or types.is_large_binary(kind):
        return _images(column.to_pylist(), what)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        lengths = set(list_value_length(column).to_pylist())
        if len(lengths) > 1:
            raise ValueError(f"{what} must hold lists of one length, got {sorted(lengths)[:5]}")
        inner = _tensor(column.flatten(), what)
        return inner.reshape(len(column), *lengths, *inner.shape[1:])
    if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind):
        return torch.from_numpy(np.array(column.to_numpy(zero_copy_only=False)))
    raise TypeError(
        f"{what} must hold numbers, lists of them or images, got {kind}; convert it, or give "
        "data.stream a function from rows to (x, y)"
    )


def _images(contents: list[bytes], what: str) -> Tensor:
    """Decode images in files, all of one size."""
    from PIL import Image, UnidentifiedImageError

    pixels = []
    try:
        for content in contents:
            with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as image:
                if image.mode.startswith(("I", "F")):  # Pillow would clip them
                    raise ValueError(f"one has more than 8 bits, mode {image.mode}")
                grey = image.mode == "L"
                array = np.array(image if grey else image.convert("RGB"))
            pixels.append(array if grey else array.transpose(2, 0, 1))
        return torch.from_numpy(np.stack(pixels))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError) as error:
        raise ValueError(
            f"{what} must hold PNG, JPEG or WebP images of 8 bits, of one size, all grey or all in "
            f"colour: {error}"
        ) from error
