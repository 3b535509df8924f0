"""Readers of labelled 28×28 grey images in the usual formats: IDX, .npz and Parquet.

Each format has a function that searches a folder and returns a function that reads the files, or
None if there are none. Nothing is unpickled, and sizes are checked before memory is allocated.
"""

from __future__ import annotations

import gzip
import io
import math
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

Part = tuple[Path, np.ndarray]  # the file and its contents, uint8 [n, 28, 28] or [n]
Read = Callable[[], tuple[Part, Part]]  # images and labels

ACCEPTED = """\
  train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte,
    each gzipped (.gz) or not; also in FashionMNIST/raw, where torchvision puts them, or raw
  a .npz file with x_train, y_train, x_test and y_test, as Keras has them
  train-*.parquet and test-*.parquet with the columns image (PNG) and label, as Hugging Face serves
    them; also in fashion_mnist or data"""
_SIDE = 28
_CLASSES = 10


def find(place: Path, train: bool) -> Read | None:
    """Search a folder, or one .npz file, for images; return a function that reads them.

    >>> find(Path("nowhere"), train=True) is None
    True
    """
    for look in (find_idx, find_npz, find_parquet):
        read = look(place, train)
        if read is not None:
            return read
    return None


def wrong(path: Path, expected: str, got: str) -> ValueError:
    """Return the error for a file with unexpected contents.

    >>> wrong(Path("a.npz"), "uint8", "float32")
    ValueError('a.npz is damaged, or not Fashion-MNIST: expected uint8, got float32')
    """
    return ValueError(f"{path} is damaged, or not Fashion-MNIST: expected {expected}, got {got}")


# IDX


def idx_names(train: bool) -> tuple[str, str]:
    """Return the names of the files of images and of labels.

    >>> idx_names(train=False)
    ('t10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte')
    """
    split = "train" if train else "t10k"
    return f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte"


def find_idx(folder: Path, train: bool) -> Read | None:
    """Search for the two IDX files of a split, in torchvision's sub-folders as well."""
    for place in (folder, folder / "FashionMNIST" / "raw", folder / "raw"):
        files = [
            next((path for path in (place / name, place / f"{name}.gz") if path.is_file()), None)
            for name in idx_names(train)
        ]
        images, labels = files
        if images and labels:
            return partial(_read_both_idx, images, labels)
    return None


def _read_both_idx(images: Path, labels: Path) -> tuple[Part, Part]:
    return (images, read_idx(images, 3)), (labels, read_idx(labels, 1))


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read an IDX file of bytes: a magic number, the sizes, the bytes."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise wrong(path, "a whole gzip file", f"{len(content)} bytes ({error})") from error
    start = 4 * (1 + ndim)
    if len(content) < start:
        raise wrong(path, f"a header of {start} bytes", f"only {len(content)} bytes")
    magic, *shape = np.frombuffer(content, ">u4", count=1 + ndim).tolist()
    if magic != 0x0800 + ndim:  # 08: unsigned bytes; then the number of dimensions
        raise wrong(path, f"the magic number {0x0800 + ndim:#010x}", f"{magic:#010x}")
    if len(content) != start + math.prod(shape):
        raise wrong(path, f"{start + math.prod(shape)} bytes for shape {shape}", f"{len(content)}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


# One .npz


def find_npz(place: Path, train: bool) -> Read | None:
    """Search for a .npz file with the arrays of a split; `place` may be that file."""
    files = [place] if place.suffix == ".npz" else sorted(place.glob("*.npz"))
    split = "train" if train else "test"
    names = f"x_{split}", f"y_{split}"
    for path in files:
        if set(names) <= set(names_in(path)):
            return partial(_read_npz, path, *names)
    return None


def _read_npz(path: Path, images: str, labels: str) -> tuple[Part, Part]:
    return (path, _member(path, images, 3)), (path, _member(path, labels, 1))


def names_in(path: Path) -> list[str]:
    """List the arrays of a .npz file; none if it is not a zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile):
        return []


def _member(path: Path, name: str, ndim: int) -> np.ndarray:
    """Read one array, without pickled objects; check its header before memory is allocated."""
    try:
        with zipfile.ZipFile(path) as archive:
            with archive.open(f"{name}.npy") as file:
                version = np.lib.format.read_magic(file)
                header = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = header(file)
            _check_header(path, name, dtype, shape, ndim)
            with archive.open(f"{name}.npy") as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError) as error:
        raise wrong(path, f"a whole array {name}", f"{error or type(error).__name__}") from error
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise wrong(path, f"a whole array {name}", str(error)) from error
    return as_bytes(path, name, array.reshape(shape[:ndim]))


def _check_header(path: Path, name: str, dtype: np.dtype, shape: Sequence[int], ndim: int) -> None:
    got = f"{dtype} {list(shape)}"
    if ndim == 3:
        if dtype != np.uint8 or len(shape) not in (3, 4) or tuple(shape[1:3]) != (_SIDE, _SIDE):
            raise wrong(path, f"uint8 [n, {_SIDE}, {_SIDE}] in {name}", got)
        if tuple(shape[3:]) not in ((), (1,)):  # one channel may have an axis
            raise wrong(path, f"uint8 [n, {_SIDE}, {_SIDE}] in {name}", got)
    elif dtype.kind not in "iu" or len(shape) != 1:
        raise wrong(path, f"integers [n] in {name}", got)
    if math.prod(shape) > 10**9:
        raise wrong(path, f"at most a billion numbers in {name}", got)


def as_bytes(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    """Convert to uint8 as in IDX files; raise for labels outside 0 to 9."""
    if array.ndim == 1 and array.size and not 0 <= array.min() <= array.max() < _CLASSES:
        raise wrong(path, f"labels 0 to 9 in {name}", f"{array.min()} to {array.max()}")
    return np.ascontiguousarray(array, dtype=np.uint8)


# Parquet


def find_parquet(folder: Path, train: bool) -> Read | None:
    """Search for the Parquet files of a split, in the sub-folders of Hugging Face as well."""
    split = "train" if train else "test"
    for place in (folder, folder / "fashion_mnist", folder / "data"):
        for pattern in (f"{split}-*.parquet", f"{split}.parquet", f"{split}/*.parquet"):
            files = sorted(place.glob(pattern))
            if files:
                return partial(_read_parquet, files)
    return None


def _read_parquet(files: Sequence[Path]) -> tuple[Part, Part]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(
            f"{files[0]}: reading Parquet needs pyarrow; `pip install 'fdl[parquet]'`"
        ) from error
    images, labels = [], []
    for path in files:
        try:
            with ParquetFile(path) as file:
                for batch in file.iter_batches(1000, columns=["image", "label"]):
                    columns = batch.to_pydict()
                    if columns.keys() != {"image", "label"}:
                        raise wrong(path, "columns image and label", f"{file.schema_arrow.names}")
                    images += [_pixels(path, image) for image in columns["image"]]
                    labels += columns["label"]
        except (ArrowException, OSError) as error:
            raise wrong(path, "a whole Parquet file", str(error)) from error
    if not all(type(label) is int for label in labels):
        raise wrong(files[0], "an integer in each row of label", "something else")
    stacked = np.stack(images) if images else np.empty((0, _SIDE, _SIDE), np.uint8)
    numbers = as_bytes(files[0], "label", np.array(labels, dtype=np.int64))
    return (files[0], stacked), (files[0], numbers)


def _pixels(path: Path, image: object) -> np.ndarray:
    """Decode one image: PNG bytes, or the struct {bytes, path} of Hugging Face."""
    from PIL import Image, UnidentifiedImageError

    content = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(content, bytes):
        raise wrong(path, "PNG bytes in each row of image", type(content).__name__)
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as png:
            if png.size != (_SIDE, _SIDE) or png.mode != "L":
                raise wrong(path, f"grey images of {_SIDE} × {_SIDE}", f"{png.mode} {png.size}")
            return np.asarray(png)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise wrong(path, "PNG bytes in each row of image", str(error)) from error
