"""Data that does not fit in memory: chunks of batches, read ahead in a thread."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl._checks import check_positive, describe
from fdl._files import expanded
from fdl.data._batches import index_and_mask
from fdl.data._rows import check_rows, check_within
from fdl.data._sources import Read, check_iterable, reader, stacked
from fdl.data._types import Batch
from fdl.tree import flatten_dict


def stream(
    source: Any,
    indices: Tensor | tuple[Tensor, Any] | None,
    steps: int,
    *,
    ahead: int = 1,
    device: torch.device | str | None = None,
) -> Iterator[Batch]:
    """Iterate over an epoch in chunks of `steps` batches, and read the next ones meanwhile.

    A chunk is what `scan` takes: `state, metrics = scan(step, state, chunk)`. The order is that of
    the indices, which follow from a key. So a run continues in the middle of an epoch with the rows
    that are left, `take(indices, torch.arange(done, total))`, and a process reads its own part with
    `parallel.own_rows(indices, mesh)`.

    An iterable of batches has an order of its own, and no rows: indices are None, and a run
    continues with `itertools.islice(batches, done, None)`, which reads what it skips.

    Sources are read in a thread, `ahead` chunks before they are asked for; memory holds `ahead` + 2
    chunks. An error while reading is raised where its chunk would come.

    Args:
        source: a function from rows, int64 [n] on the CPU, to their x and y, leaves [n, ...], such
            as `on_disk` and `table` make; a `Dataset`; a data set of torch with `__getitem__` and
            `__len__` whose items are pairs (x, y), such as `torchvision.datasets.ImageFolder`; or
            an iterable of batches, such as a `torch.utils.data.DataLoader`. It is used in a thread,
            one call at a time.
        indices: `Indices`, or an index of all steps, int64 [total, batch]; None for an iterable.
        steps: batches in a chunk, at least 1. The last chunk has what is left: if `steps` does not
            divide the number of batches, its shape makes a jitted function compile once more.
        ahead: chunks to read ahead, at least 1.
        device: where the chunks go; None leaves them where they were read.

    Returns:
        An iterator over batches of leaves [steps, batch, ...], their mask [steps, batch] or ().

    Raises:
        TypeError: `source` is none of these, the index is not int64, or a number not an int; when
            iterated over, rows are something else than a pair of trees of tensors.
        ValueError: a number is below 1; when iterated over, `source` returns another number of rows
            than it was asked for, items of several shapes, or batches of several in one chunk.

    >>> from fdl.data import Dataset, sequential_indices
    >>> points = Dataset(torch.arange(6.0), torch.arange(6))
    >>> chunks = stream(points, sequential_indices(6, 2), steps=2)
    >>> [chunk.y.tolist() for chunk in chunks]
    [[[0, 1], [2, 3]], [[4, 5]]]
    >>> loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*points), 3)
    >>> [chunk.y.tolist() for chunk in stream(loader, None, steps=2)]
    [[[0, 1, 2], [3, 4, 5]]]
    """
    check_positive("stream", "steps", steps)
    check_positive("stream", "ahead", ahead)
    if indices is None:
        check_iterable(source)
        return _ahead(_of_iterable(source, steps), ahead, device)
    read = reader(source)
    index, mask = index_and_mask(indices, "stream")
    if index.ndim != 2:
        raise ValueError(f"stream: the index must be [total, batch], got {list(index.shape)}")
    masks = mask.split(steps) if isinstance(mask, Tensor) else itertools.repeat(())
    parts: Any = zip(index.split(steps) if len(index) else (), masks, strict=False)
    return _ahead((partial(_chunk, read, *part) for part in parts), ahead, device)


def _of_iterable(source: Any, steps: int) -> Iterator[Callable[[], Batch | None]]:
    batches = iter(source)
    yield from itertools.repeat(partial(stacked, batches, steps))


def _ahead(
    chunks: Iterator[Callable[[], Batch | None]], ahead: int, device: Any
) -> Iterator[Batch]:
    """Yield the chunks in order up to None, while a thread reads those that come."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="data.stream")
    coming: deque[Future[Batch | None]] = deque()
    try:
        coming.extend(pool.submit(read) for read in itertools.islice(chunks, ahead))
        while coming and (chunk := coming.popleft().result()) is not None:
            coming.extend(pool.submit(read) for read in itertools.islice(chunks, 1))
            yield chunk if device is None else _to(chunk, device)
    finally:  # the loop ended, or was left by an error or Ctrl-C
        pool.shutdown(wait=True, cancel_futures=True)


def _chunk(read: Read, index: Tensor, mask: Any) -> Batch:
    """Read the rows of a chunk and give the leaves an axis of steps."""
    got = read(index.flatten().cpu())
    if not isinstance(got, tuple | list) or len(got) != 2:
        raise TypeError(f"stream: source must return a pair (x, y), got {describe(got)}")
    leaves = flatten_dict({"x": got[0], "y": got[1]})
    check_rows("stream", "what source returns", leaves)
    rows = next(iter(leaves.values())).shape[0]
    if rows != index.numel():
        raise ValueError(f"stream: source was asked for {index.numel()} rows and returned {rows}")
    x, y = pytree.tree_map(lambda leaf: leaf.unflatten(0, index.shape), tuple(got))
    return Batch(x, y, mask)


def _to(chunk: Batch, device: torch.device | str) -> Batch:
    """Move a chunk; to a GPU from pinned memory, so that the copy overlaps with computing."""
    pin = torch.device(device).type == "cuda"

    def move(leaf: Tensor) -> Tensor:
        leaf = leaf.pin_memory() if pin and leaf.device.type == "cpu" else leaf
        return leaf.to(device, non_blocking=pin)

    moved: Batch = pytree.tree_map(move, chunk)
    return moved


def on_disk(x: Path | str, y: Path | str) -> Read:
    """Make a function that reads rows of two `.npy` files, for `stream`.

    Nothing stays in memory but the rows asked for.

    Args:
        x: file of an array [n, ...], as `numpy.save` writes it.
        y: file of an array with as many rows.

    Returns:
        A function from rows, int64 [k], to the pair of tensors [k, ...], of the files' dtypes.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is not a `.npy` file of numbers, or they differ in length; at call: a row
            is not in the files.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> np.save(folder / "x.npy", np.arange(12.0).reshape(4, 3))
    >>> np.save(folder / "y.npy", np.arange(4))
    >>> on_disk(folder / "x.npy", folder / "y.npy")(torch.tensor([3, 1]))
    (tensor([[ 9., 10., 11.],
            [ 3.,  4.,  5.]], dtype=torch.float64), tensor([3, 1]))
    """
    paths = expanded(x, "on_disk", "x"), expanded(y, "on_disk", "y")
    lengths = [len(_mapped(path)) for path in paths]
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"on_disk: x and y must have the same number of rows, got {lengths[0]} in {x} and "
            f"{lengths[1]} in {y}"
        )

    def read(rows: Tensor) -> tuple[Tensor, Tensor]:
        check_within("on_disk", rows, lengths[0])
        first, second = (torch.from_numpy(_rows_of(path, rows.numpy())) for path in paths)
        return first, second

    return read


SMALL = 64 << 20  # bytes of a file that may be mapped as a whole


def _rows_of(path: Path, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Copy rows of a file; of a large one by reads, as the kernel may map 2 MB around each row."""
    mapped = _mapped(path)  # nothing is read yet
    if mapped.nbytes <= SMALL or not mapped.flags.c_contiguous:  # rows in pieces, of a transpose
        return np.array(mapped[rows])
    numbers = math.prod(mapped.shape[1:])
    size = numbers * mapped.itemsize
    copied = np.empty((len(rows), *mapped.shape[1:]), mapped.dtype)
    with path.open("rb", buffering=0) as file:
        for row, target in zip(rows.tolist(), copied.reshape(len(rows), numbers), strict=True):
            file.seek(mapped.offset + row * size)
            if file.readinto(target.view(np.uint8).data) != size:
                raise OSError(f"on_disk: {path} was cut short while it was read")
    return copied


def _mapped(path: Path) -> np.memmap[Any, Any]:
    """Map a `.npy` file of numbers into memory."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"on_disk: {path} is not a .npy file of numbers: {error}") from None
    if not isinstance(array, np.memmap) or array.ndim == 0:
        raise ValueError(f"on_disk: {path} must hold one array [n, ...]")
    try:
        torch.from_numpy(np.empty(0, array.dtype))
    except (TypeError, ValueError):
        raise ValueError(
            f"on_disk: {path} must hold numbers of a dtype of torch, got {array.dtype.str!r}; save "
            "the array again after astype, such as astype('float32')"
        ) from None
    return array
