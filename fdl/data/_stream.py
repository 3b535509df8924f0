"""Data that does not fit in memory: chunks of batches, read ahead in a thread."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl._checks import check_positive, describe
from fdl._files import expanded
from fdl.data._batches import index_and_mask
from fdl.data._rows import check_rows
from fdl.data._types import Batch
from fdl.tree import Tree, flatten_dict

Read = Callable[[Tensor], tuple[Tree, Tree]]


def stream(
    read: Read,
    indices: Tensor | tuple[Tensor, Any],
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

    Rows are read in a thread, `ahead` chunks before they are asked for; memory holds `ahead` + 2
    chunks. An error of `read` is raised where its chunk would come.

    Args:
        read: a function from rows, int64 [n] on the CPU, to their x and y, leaves [n, ...], such as
            `on_disk` makes; it is called in a thread, one call at a time.
        indices: `Indices`, or an index of all steps, int64 [total, batch].
        steps: batches in a chunk, at least 1. The last chunk has what is left: if `steps` does not
            divide the number of batches, its shape makes a jitted function compile once more.
        ahead: chunks to read ahead, at least 1.
        device: where the chunks go; None leaves them where `read` puts them.

    Returns:
        An iterator over batches of leaves [steps, batch, ...], their mask [steps, batch] or ().

    Raises:
        TypeError: `read` is not a function, the index is not int64, or a number not an int; when
            iterated over, `read` returns something else than a pair of trees of tensors.
        ValueError: a number is below 1; when iterated over, `read` returns another number of rows
            than it was asked for.

    >>> from fdl.data import Dataset, sequential_indices, take
    >>> points = Dataset(torch.arange(6.0), torch.arange(6))
    >>> chunks = stream(lambda rows: take(points, rows), sequential_indices(6, 2), steps=2)
    >>> [chunk.y.tolist() for chunk in chunks]
    [[[0, 1], [2, 3]], [[4, 5]]]
    """
    if not callable(read):
        raise TypeError(
            "stream: read must be a function from rows to (x, y), such as "
            f"lambda rows: data.take(dataset, rows), got {describe(read)}"
        )
    check_positive("stream", "steps", steps)
    check_positive("stream", "ahead", ahead)
    index, mask = index_and_mask(indices, "stream")
    if index.ndim != 2:
        raise ValueError(f"stream: the index must be [total, batch], got {list(index.shape)}")
    masks = mask.split(steps) if isinstance(mask, Tensor) else itertools.repeat(())
    parts: list[tuple[Tensor, Any]] = list(zip(index.split(steps), masks, strict=False))
    return _chunks(read, parts if len(index) else [], ahead, device)


def _chunks(
    read: Read, parts: list[tuple[Tensor, Any]], ahead: int, device: Any
) -> Iterator[Batch]:
    """Yield the chunks in order, while a thread reads those that come."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="data.stream")
    coming: deque[Future[Batch]] = deque()
    left = iter(parts)
    try:
        coming.extend(pool.submit(_chunk, read, *part) for part in itertools.islice(left, ahead))
        while coming:
            chunk = coming.popleft().result()
            coming.extend(pool.submit(_chunk, read, *part) for part in itertools.islice(left, 1))
            yield chunk if device is None else _to(chunk, device)
    finally:  # the loop ended, or was left by an error or Ctrl-C
        pool.shutdown(wait=True, cancel_futures=True)


def _chunk(read: Read, index: Tensor, mask: Any) -> Batch:
    """Read the rows of a chunk and give the leaves an axis of steps."""
    got = read(index.flatten().cpu())
    if not isinstance(got, tuple | list) or len(got) != 2:
        raise TypeError(f"stream: read must return a pair (x, y), got {describe(got)}")
    leaves = flatten_dict({"x": got[0], "y": got[1]})
    check_rows("stream", "what read returns", leaves)
    rows = next(iter(leaves.values())).shape[0]
    if rows != index.numel():
        raise ValueError(f"stream: read was asked for {index.numel()} rows and returned {rows}")
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

    The files are mapped into memory for each call and released afterwards, so that no more than the
    rows asked for stays in memory.

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
    paths = expanded(x), expanded(y)
    lengths = [len(_mapped(path)) for path in paths]
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"on_disk: x and y must have the same number of rows, got {lengths[0]} in {x} and "
            f"{lengths[1]} in {y}"
        )

    def read(rows: Tensor) -> tuple[Tensor, Tensor]:
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < lengths[0]:
            raise ValueError(
                f"on_disk: rows must be from 0 to {lengths[0] - 1}, got {int(rows.min())} to "
                f"{int(rows.max())}"
            )
        first, second = (torch.from_numpy(_mapped(path)[rows.numpy()]) for path in paths)
        return first, second

    return read


def _mapped(path: Path) -> np.ndarray[Any, Any]:
    """Map a `.npy` file of numbers into memory."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"on_disk: {path} is not a .npy file of numbers: {error}") from None
    if not isinstance(array, np.ndarray) or array.ndim == 0:
        raise ValueError(f"on_disk: {path} must hold one array [n, ...]")
    try:
        torch.from_numpy(np.empty(0, array.dtype))
    except (TypeError, ValueError):
        raise ValueError(
            f"on_disk: {path} must hold numbers of a dtype of torch, got {array.dtype.str!r}; save "
            "the array again after astype, such as astype('float32')"
        ) from None
    return array
