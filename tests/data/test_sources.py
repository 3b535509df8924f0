"""What `data.stream` reads from: data sets of torch, folders of images, iterables of batches."""

import itertools
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset
from torchvision import datasets
from torchvision.transforms import v2

from fdl import data, random, tree
from fdl.data import Batch, Dataset
from tests.support.asserts import draw

N = 23
POINTS = Dataset(draw(0, N, 3), torch.arange(N))
INDICES = data.epoch_indices(random.key(3), N, 4)


def expected(indices=INDICES, steps=2, points=POINTS):
    return list(data.stream(lambda rows: data.take(points, rows), indices, steps))


class Examples:
    """The protocol of a map-style data set, without torch's class."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        return POINTS.x[i].numpy(), int(POINTS.y[i])


class Many(Examples):
    def __getitems__(self, index):
        return [Examples.__getitem__(self, i) for i in index]

    def __getitem__(self, i):
        raise AssertionError("the rows of a batch are asked for together")


class Numbers(IterableDataset):
    def __iter__(self):
        return iter(zip(*POINTS, strict=True))


@pytest.mark.parametrize(
    "source",
    [POINTS, TensorDataset(*POINTS), Subset(TensorDataset(*POINTS), range(N)), Examples(), Many()],
    ids=["Dataset", "TensorDataset", "Subset", "protocol", "getitems"],
)
def test_a_data_set_gives_the_rows_of_the_indices(source):
    assert tree.diff(list(data.stream(source, INDICES, 2)), expected()) == []
    left = data.take(INDICES, torch.arange(3, 6))  # continued after three steps
    assert tree.diff(list(data.stream(source, left, 2)), expected(left)) == []


def test_rows_of_a_data_set_that_are_not_there_are_named_and_of_none_come_none():
    some = Subset(TensorDataset(*POINTS), range(3))
    for row, got in ((-1, "-1 to 1"), (3, "1 to 3")):
        with pytest.raises(ValueError, match=f"Subset: rows must be from 0 to 2, got {got}"):
            next(data.stream(some, torch.tensor([[1, row]]), 1))
    chunk = next(data.stream(some, torch.zeros(2, 0, dtype=torch.int64), 2))
    assert chunk.x.shape == (2, 0, 3)


def test_items_may_hold_trees():
    class Pairs(Examples):
        def __getitem__(self, i):
            return {"a": POINTS.x[i], "b": i}, (POINTS.y[i], 0.5)

    (chunk,) = data.stream(Pairs(), INDICES, 9)
    assert torch.equal(chunk.x["a"], POINTS.x[INDICES.index])
    assert torch.equal(chunk.x["b"], INDICES.index) and torch.equal(chunk.y[0], INDICES.index)
    assert chunk.y[1].shape == (6, 4)


@pytest.mark.curriculum("D2")
def test_a_folder_of_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        folder = tmp_path / ("even", "odd")[i % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    folder = datasets.ImageFolder(tmp_path, transform=v2.PILToTensor())
    index = torch.tensor([[5, 0], [3, 3]])
    (chunk,) = data.stream(folder, index, 2)
    order = torch.tensor([0, 2, 4, 1, 3, 5])  # by folder
    assert torch.equal(chunk.x, torch.from_numpy(pixels).movedim(-1, 1)[order[index]])
    assert chunk.y.tolist() == [[1, 0], [1, 1]]
    with pytest.raises(TypeError, match=r"(?s)items of ImageFolder must be .*v2\.PILToTensor"):
        next(data.stream(datasets.ImageFolder(tmp_path), index, 2))
    Image.fromarray(pixels[0, :3]).save(tmp_path / "even" / "0.png")
    with pytest.raises(ValueError, match=r"(?s)items of ImageFolder must .*of one shape.*Resize"):
        next(data.stream(folder, index, 2))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loader_gives_its_batches_in_its_order(workers):
    order = data.epoch_indices(random.key(3), N, 4, drop_last=True)
    loader = DataLoader(
        TensorDataset(*POINTS), batch_sampler=order.index.tolist(), num_workers=workers
    )
    got = list(data.stream(loader, None, 2, ahead=3))
    assert tree.diff(got, expected(order)) == []
    assert not [t for t in threading.enumerate() if t.name.startswith("data.stream")]


def test_batches_of_any_iterable_are_stacked_and_read_no_earlier_than_asked():
    seen = []

    def batches():
        for row in zip(*INDICES, strict=True):
            seen.append(len(seen))
            yield data.batch(POINTS, row)

    chunks = data.stream(batches(), None, 2)
    assert seen == []
    assert tree.diff(list(chunks), expected()) == [] and len(seen) == 6
    left = data.stream(itertools.islice(batches(), 3, None), None, 2)  # continued
    assert tree.diff(list(left), expected(data.take(INDICES, torch.arange(3, 6)))) == []
    assert list(data.stream([], None, 2)) == []
    dicts = [{"x": POINTS.x, "y": POINTS.y}] * 3
    assert [len(chunk.y) for chunk in data.stream(dicts, None, 2)] == [2, 1]


def test_an_iterable_data_set_by_a_loader_and_a_padded_last_batch():
    loader = DataLoader(Numbers(), batch_size=4)
    padded = (data.pad_to(batch, 4) for batch in loader)
    chunks = list(data.stream(padded, None, 3))
    rows = torch.cat([chunk.y[chunk.mask] for chunk in chunks])
    assert torch.equal(rows, torch.arange(N)) and len(chunks) == 2
    with pytest.raises(ValueError, match=r"(?s)same leaves, shapes .*\[4, 3\].*\[3, 3\].*pad_to"):
        list(data.stream(loader, None, 3))


def test_an_error_of_an_iterable_comes_in_the_place_of_its_chunk():
    def batches():
        yield POINTS
        raise OSError("the disk is gone")

    chunks = data.stream(batches(), None, 1)
    assert len(next(chunks).y) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(chunks)


X = POINTS.x


@pytest.mark.parametrize(
    ("source", "indices", "error", "message"),
    [
        (Numbers(), INDICES, TypeError, "got a Numbers; of an iterable of batches, pass indices"),
        ([(X, X)], INDICES, TypeError, "data set of torch .* got a list"),
        ((X, X), INDICES, TypeError, "got a tuple"),
        (X, INDICES, TypeError, r"got a tensor float64\[23, 3\]"),
        (3, INDICES, TypeError, "source must be a function"),
        (TensorDataset(X), INDICES, TypeError, r"items of TensorDataset must be pairs \(x, y\)"),
        (POINTS, None, TypeError, "must be an iterable of batches, got a Dataset; make an order"),
        (TensorDataset(X), None, TypeError, "must be an iterable of batches, got a TensorDataset"),
        (len, None, TypeError, "must be an iterable of batches, got the function len"),
        (X, None, TypeError, "must be an iterable of batches, got a tensor"),
        (Numbers(), None, TypeError, r"a batch must hold tensors \[n, \.\.\.\]"),
        ([3], None, TypeError, "stream: batch must be Batch"),
        ([Batch(X, X), Batch(X, X.float())], None, ValueError, "(?s)same leaves.*float64.*float32"),
        ([POINTS, data.pad_to(POINTS, N)], None, ValueError, "(?s)same leaves.*bool"),
        ([Batch(X, X[:2])], None, ValueError, "a batch must have the same number of rows"),
    ],
)
def test_errors_say_what_to_pass(source, indices, error, message):
    with pytest.raises(error, match=message):
        list(data.stream(source, indices, 2))
