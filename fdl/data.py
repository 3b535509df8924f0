"""Data sets as plain tensors, and batches as rows of index arrays.

A data set stays where its tensors are; an epoch is an array of indices, and `gather` takes one row
of it to a batch. Nothing is shuffled, copied or cached behind the caller's back.
"""

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fdl import _fashion_mnist, _rows, random, tree

__all__ = [
    "LABELS",
    "Batch",
    "Dataset",
    "Indices",
    "batches",
    "bootstrap_indices",
    "epoch_indices",
    "fashion_mnist",
    "fashion_mnist_sample",
    "gather",
    "sequential_indices",
    "split",
    "synthetic_linear",
]

T = TypeVar("T")

LABELS = (
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
"""What the Fashion-MNIST classes 0 to 9 show."""


class Dataset(NamedTuple):
    """Examples, all in memory: row i of `x` belongs to row i of `y`.

    >>> x, y = Dataset(torch.zeros(5, 2), torch.arange(5))
    """

    x: Tensor  # [n, ...] features or images
    y: Tensor  # [n, ...] targets


class Batch(NamedTuple):
    """What a training step takes: some examples and which of them count.

    >>> Batch(torch.zeros(3, 2), torch.zeros(3)).mask
    ()
    """

    x: Tensor  # [batch, ...]
    y: Tensor  # [batch, ...]
    mask: Tensor | tuple[()] = ()  # bool [batch], False where a row is padding; () if none is


class Indices(NamedTuple):
    """Which examples each step of an epoch takes; `scan` and `zip(*indices)` walk over the steps.

    Where no step holds padding the mask has the width 0, and `gather` makes batches without one:
    a model computes faster without a mask, and one that takes none can be trained.

    >>> for index, mask in zip(*sequential_indices(3, batch_size=2)):
    ...     print(index.tolist(), mask.tolist())
    [0, 1] [True, True]
    [2, 0] [True, False]
    """

    index: Tensor  # type: ignore[assignment]  # int64 [steps, batch], rows of a data set
    mask: Tensor  # bool [steps, batch], False where `index` is padding; [steps, 0] if none is


def fashion_mnist(
    root: str | os.PathLike[str] | None = None, *, train: bool = True, download: bool = True
) -> Dataset:
    """Read Fashion-MNIST: 28×28 grey images of clothes in ten classes (see `LABELS`).

    It comes from the first of these places that has it: `root`, `data/FashionMNIST/raw` below the
    working directory (where torchvision is usually told to put it), and
    `/usr/share/datasets/fashion-mnist` (the Debian package `dataset-fashion-mnist`). If none has
    it, torchvision downloads it, into `root` or else `data`.

    `root` may hold the four IDX files, gzipped or not, itself or in `FashionMNIST/raw`; a `.npz`
    file with x_train, y_train, x_test and y_test; or Parquet files as Hugging Face serves them
    (`pip install 'fdl[parquet]'`). Contents are verified, so all give the same tensors or an error.

    Args:
        root: A folder that holds the images, or that torchvision is or was given as its `root`, or
            the `.npz` file itself.
        train: The 60,000 training images if true, the 10,000 test images if false.
        download: Whether to download what is in none of the places. If false, a `root` that holds
            nothing but other files is an error.

    Returns:
        `x` uint8 [n, 28, 28], 0 (background) to 255, and `y` int64 [n], the classes 0 to 9.

    Raises:
        FileNotFoundError: The images are in none of the places and were not downloaded, or `root`
            holds only other files; the error lists them, and what can be read.
        ValueError: A file that was found is damaged, or holds other images; no other place is
            tried then.
        ImportError: They are in Parquet files, and pyarrow is not installed.

    Source: Xiao, Rasul and Vollgraf, Fashion-MNIST, 2017, https://arxiv.org/abs/1708.07747

    Example::

        images, labels = fashion_mnist()  # uint8 [60000, 28, 28] and int64 [60000]
        test = fashion_mnist(train=False)  # 10,000 images that training does not see
    """
    return Dataset(*_fashion_mnist.load(root, train, download))


def fashion_mnist_sample(*, train: bool = True) -> Dataset:
    """Read a tenth of Fashion-MNIST, which comes with this package: real images, no download.

    It holds the first 600 training or 100 test images of each class, in the order of the full set.

    Args:
        train: 6,000 training images if true, 1,000 test images if false.

    Returns:
        `x` uint8 [n, 28, 28], 0 (background) to 255, and `y` int64 [n], the classes 0 to 9.

    Raises:
        FileNotFoundError: The installation lacks a file of the sample.
        ValueError: A file of the sample is truncated or damaged.

    Source: as `fashion_mnist`; MIT licence, Copyright (c) 2017 Zalando SE.

    >>> images, labels = fashion_mnist_sample(train=False)
    >>> images.shape, labels.bincount().tolist()
    (torch.Size([1000, 28, 28]), [100, 100, 100, 100, 100, 100, 100, 100, 100, 100])
    >>> LABELS[labels[0]]
    'ankle boot'
    """
    return Dataset(*_fashion_mnist.load_sample(train))


def synthetic_linear(
    key: random.Key, w: Tensor | Sequence[float], b: Tensor | float, n: int, noise: float
) -> Dataset:
    """Draw examples of a linear model with Gaussian features: y = x·w + b + noise·ε.

    Every entry of x and of ε is N(0, 1) and independent of the others.

    Args:
        key: A key; the examples are on its device.
        w: The weights, [in]. A floating tensor sets the dtype, all else gives float32.
        b: The offset, one number.
        n: How many examples, at least 1.
        noise: The standard deviation of the noise, at least 0, in units of y.

    Returns:
        `x` [n, in] and `y` [n, 1], the shape that a linear layer with one output gives.

    Raises:
        TypeError: `n` is no int.
        ValueError: `w` is no vector, `b` not one number, `n` < 1, or `noise` negative.

    >>> x, y = synthetic_linear(random.key(0), [2.0, -3.4], 4.2, n=1000, noise=0.0)
    >>> x.shape, y.shape
    (torch.Size([1000, 2]), torch.Size([1000, 1]))
    >>> torch.allclose(y, x @ torch.tensor([[2.0], [-3.4]]) + 4.2, atol=1e-5)
    True
    """
    _check_count("synthetic_linear", "n", n)
    if not 0 <= noise < math.inf:
        raise ValueError(f"synthetic_linear: noise must be finite and at least 0, got {noise!r}")
    dtype = w.dtype if isinstance(w, Tensor) and w.is_floating_point() else torch.float32
    weight = torch.as_tensor(w, dtype=dtype, device=key.device)
    if weight.ndim != 1:
        raise ValueError(
            f"synthetic_linear: w must have shape [in], got {list(weight.shape)}; "
            "flatten it, there is one output"
        )
    offset = torch.as_tensor(b, dtype=dtype, device=key.device)
    if offset.numel() != 1:
        raise ValueError(f"synthetic_linear: b must be one number, got {list(offset.shape)}")
    key_x, key_noise = random.split(key)
    x = random.normal(key_x, (n, weight.shape[0]), dtype)
    error = random.normal(key_noise, (n,), dtype)
    return Dataset(x, (x @ weight + offset + noise * error).unsqueeze(-1))


def epoch_indices(key: random.Key, n: int, batch_size: int, *, drop_last: bool = False) -> Indices:
    """Shuffle the examples 0 to n − 1 and cut them into the batches of one epoch.

    Where `batch_size` does not divide n, the last batch is filled up with index 0 and mask False:
    means over the mask are then exact, and every step has the same shape. Where it does, or with
    `drop_last`, there is no mask.

    Args:
        key: The key of this epoch, `fold_in(data_key, epoch)`; the result is on its device.
        n: How many examples there are, at least 1.
        batch_size: Examples in a batch, at least 1.
        drop_last: Leave out the smaller last batch instead of filling it up.

    Returns:
        `index` int64 and `mask` bool [steps, batch_size], with steps = ⌈n / batch_size⌉, or
        ⌊n / batch_size⌋ if `drop_last`; `mask` is [steps, 0] where nothing is filled up.

    Raises:
        TypeError: `n` or `batch_size` is no int.
        ValueError: `n` or `batch_size` is below 1, or `drop_last` would leave no batch at all.

    >>> index, mask = epoch_indices(random.key(0), 5, batch_size=2)
    >>> sorted(index[mask].tolist())
    [0, 1, 2, 3, 4]
    >>> mask.tolist()
    [[True, True], [True, True], [True, False]]
    """
    _check_count("epoch_indices", "n", n)
    _check_count("epoch_indices", "batch_size", batch_size)
    if drop_last and batch_size > n:
        raise ValueError(
            f"epoch_indices: batch_size must be at most n={n} with drop_last=True, got "
            f"{batch_size}: no batch would be left; use a smaller one or drop_last=False"
        )
    order = random.permutation(key, n)
    return _in_batches(order[: n - n % batch_size] if drop_last else order, batch_size)


def bootstrap_indices(key: random.Key, n: int, batch_size: int) -> Indices:
    """Draw n of the examples 0 to n − 1, with replacement, and cut them into batches.

    About 63 % of the examples are among them, some several times. One key draws one sample: for
    bagging every member of a population keeps its own (Breiman, 1996).

    Args:
        key: The key of this sample; the result is on its device.
        n: How many examples there are, at least 1.
        batch_size: Examples in a batch, at least 1; the last batch is filled up with index 0 and
            mask False.

    Returns:
        `index` int64 and `mask` bool [⌈n / batch_size⌉, batch_size]; `mask` is [steps, 0] where
        `batch_size` divides n.

    Raises:
        TypeError: `n` or `batch_size` is no int.
        ValueError: `n` or `batch_size` is below 1.

    >>> index, mask = bootstrap_indices(random.key(0), 1000, batch_size=100)
    >>> index.shape, len(index.unique())
    (torch.Size([10, 100]), 639)
    """
    _check_count("bootstrap_indices", "n", n)
    _check_count("bootstrap_indices", "batch_size", batch_size)
    return _in_batches(random.randint(key, (n,), 0, n), batch_size)


def sequential_indices(
    n: int, batch_size: int, *, device: torch.device | str | None = None
) -> Indices:
    """Cut the examples 0 to n − 1 into batches in their own order, for evaluation.

    Args:
        n: How many examples there are, at least 1.
        batch_size: Examples in a batch, at least 1; the last batch is filled up with index 0 and
            mask False.
        device: Where the result is to be; torch's default device if None.

    Returns:
        `index` int64 and `mask` bool [⌈n / batch_size⌉, batch_size]; `mask` is [steps, 0] where
        `batch_size` divides n.

    Raises:
        TypeError: `n` or `batch_size` is no int.
        ValueError: `n` or `batch_size` is below 1.

    >>> sequential_indices(3, batch_size=2).index.tolist()
    [[0, 1], [2, 0]]
    """
    _check_count("sequential_indices", "n", n)
    _check_count("sequential_indices", "batch_size", batch_size)
    return _in_batches(torch.arange(n, device=device), batch_size)


def split(key: random.Key, dataset: T, fraction: float) -> tuple[T, T]:
    """Split a data set at random into two, to train on the first and to validate on the second.

    Each example is in exactly one of them. The second holds the first round(fraction · n) entries
    of `random.permutation(key, n)`, the first holds the others.

    Args:
        key: A key, on the device of the data set.
        dataset: A `Dataset`, or any tree of tensors [n, ...] with one row for each example.
        fraction: The share of the second, between 0 and 1; rounding must leave no part empty.

    Returns:
        Two trees of the structure of `dataset`; they are copies.

    Raises:
        TypeError: `dataset` holds something other than tensors, or `fraction` is not a float.
        ValueError: The tensors differ in length or device, or a part would be empty.

    >>> train, validation = split(random.key(0), fashion_mnist_sample(), 0.1)
    >>> train.x.shape, validation.x.shape
    (torch.Size([5400, 28, 28]), torch.Size([600, 28, 28]))
    """
    n = _rows.count("split", key, dataset)
    if not isinstance(fraction, float):
        raise TypeError(f"split: fraction must be a float between 0 and 1, got {fraction!r}")
    held_out = round(fraction * n) if 0 < fraction < 1 else 0
    if not 0 < held_out < n:
        raise ValueError(
            f"split: fraction must leave at least one of the {n} examples in each part, "
            f"got {fraction}"
        )
    second, first = random.permutation(key, n).tensor_split([held_out])
    return tree.map(lambda x: x[first], dataset), tree.map(lambda x: x[second], dataset)


def gather(dataset: tuple[Tensor, Tensor], indices: Tensor | tuple[Tensor, Any]) -> Batch:
    """Take the examples of one step out of a data set, images as floats.

    uint8 images [n, height, width] or [n, channels, height, width] become float32 in [0, 1] with a
    channel axis, as torchvision's `ToTensor` makes them. All else keeps its dtype and shape.

    Args:
        dataset: A `Dataset`, or any pair of x [n, ...] and y [n, ...].
        indices: An index, int64 [batch], on the device of the data set; or one row of `Indices`,
            such an index and its mask, bool [batch], or [0] or () where all of them count.

    Returns:
        `x` [batch, ...], `y` [batch, ...] and the row's `mask`, () if it has none.

    Raises:
        TypeError: The index is not an int64 tensor.
        ValueError: x and y differ in length, data and index are on different devices, or the mask
            has another shape than the index.

    >>> sample = fashion_mnist_sample(train=False)
    >>> for row in zip(*sequential_indices(len(sample.x), batch_size=300)):
    ...     batch = gather(sample, row)
    >>> batch.x.shape, batch.x.dtype, batch.mask.sum()
    (torch.Size([300, 1, 28, 28]), torch.float32, tensor(100))
    >>> gather(sample, torch.tensor([5, 7])).mask
    ()
    """
    x, y = dataset
    index, mask = _index_and_mask(indices)
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"gather: dataset must have as many rows in y as in x, got {x.shape[0]} in x and "
            f"{y.shape[0]} in y"
        )
    if not x.device == y.device == index.device:
        raise ValueError(
            "gather: dataset and index must be on one device, got "
            f"x on {x.device}, y on {y.device}, index on {index.device}; move them with .to(...)"
        )
    rows = x[index]
    if x.dtype == torch.uint8 and x.ndim in (3, 4):
        rows = (rows if x.ndim == 4 else rows.unsqueeze(-3)).to(torch.float32) / 255
    return Batch(rows, y[index], mask)


def batches(
    dataset: tuple[Tensor, Tensor], indices: Tensor | tuple[Tensor, Any]
) -> Iterator[Batch]:
    """Iterate over the batches of an epoch, in a Python loop: `gather` for each step.

    Args:
        dataset: As for `gather`.
        indices: `Indices`, or an index of all steps, int64 [steps, batch].

    Raises:
        TypeError: The index is not an int64 tensor.
        ValueError: As for `gather`.

    >>> points = Dataset(torch.arange(5.0), torch.arange(5))
    >>> [batch.y.tolist() for batch in batches(points, sequential_indices(5, batch_size=2))]
    [[0, 1], [2, 3], [4, 0]]
    """
    rows = indices if isinstance(indices, Tensor) else zip(*indices, strict=True)
    return (gather(dataset, row) for row in rows)


def _index_and_mask(indices: Any) -> tuple[Tensor, Tensor | tuple[()]]:
    alone = isinstance(indices, Tensor)
    if not alone and not (isinstance(indices, tuple | list) and len(indices) == 2):
        raise TypeError(
            "gather: indices must be an index, int64 [batch], or a pair of one and its mask, got "
            f"{type(indices).__name__}"
        )
    index, mask = (indices, ()) if alone else indices
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"gather: the index must be int64, got {got}; cast it")
    if not isinstance(mask, Tensor) or (mask.shape[-1:] == (0,) and index.shape[-1:] != (0,)):
        return index, ()
    if mask.shape != index.shape:
        raise ValueError(
            f"gather: the mask must have the shape {list(index.shape)} of the index, got "
            f"{list(mask.shape)}"
        )
    return index, mask


def _check_count(caller: str, name: str, value: int) -> None:
    if not isinstance(value, int):
        raise TypeError(f"{caller}: {name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{caller}: {name} must be at least 1, got {value}")


def _in_batches(order: Tensor, batch_size: int) -> Indices:
    n = order.shape[0]
    steps = -(-n // batch_size)
    padding = torch.zeros(steps * batch_size - n, dtype=order.dtype, device=order.device)
    index = torch.cat([order, padding])
    # Compared with zeros like the index, which have its axes under vmap: torch 2.11's vmap fails
    # on results that have none of them.
    mask = torch.arange(n - len(index), n, device=order.device).flip(0) >= torch.zeros_like(index)
    width = batch_size if len(padding) else 0
    return Indices(
        index.reshape(steps, batch_size), mask.reshape(steps, batch_size)[:, :width].contiguous()
    )
