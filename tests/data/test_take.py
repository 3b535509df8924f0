"""`data.take` against NumPy's indexing, `data.to_float` against torchvision's transform."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import to_pil_image, to_tensor

from fdl import data, random


@pytest.fixture(scope="module")
def sample() -> data.Dataset:
    return data.fashion_mnist_sample(train=False)


def test_images_equal_to_tensor(sample: data.Dataset) -> None:
    row = data.take(data.epoch_indices(random.key(0), 1000, 64), 15)
    batch = data.to_float(data.batch(sample, row))
    assert isinstance(batch, data.Batch)
    theirs = torch.stack([to_tensor(to_pil_image(sample.x[i])) for i in row.index])
    assert theirs.shape == (64, 1, 28, 28)
    assert batch.x.dtype == torch.float32
    assert torch.equal(batch.x, theirs)
    assert torch.equal(batch.y, sample.y[row.index])
    assert torch.equal(batch.mask, row.mask)
    assert batch.x.max() == 1
    # images with channels: the same, but the channel axis is there already
    colour = data.to_float(sample.x.reshape(500, 2, 28, 28))
    assert torch.equal(colour[:, 1], sample.x[1::2] / 255)
    # before or after the batch is cut, a tensor or what holds it
    assert torch.equal(data.batch(data.to_float(sample), row).x, theirs)
    assert torch.equal(data.to_float(sample.x[row.index]), theirs)
    assert isinstance(data.to_float(sample), data.Dataset)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_to_float_leaves_floats_alone(dtype: torch.dtype) -> None:
    x = torch.linspace(-300, 300, 12).to(dtype)
    for shape in ((12,), (3, 4), (3, 2, 2), (1, 3, 2, 2)):
        assert data.to_float(x.view(shape)).data_ptr() == x.data_ptr()
        batch = data.to_float(data.Batch(x.view(shape), x))
        assert torch.equal(batch.x, x.view(shape)) and batch.mask == ()


@pytest.mark.parametrize(
    ("x", "kind", "got"),
    [
        (torch.zeros(2, 3, 3, dtype=torch.int64), TypeError, "a tensor int64[2, 3, 3]"),
        (torch.zeros(2, 3, 3, dtype=torch.bool), TypeError, "a tensor bool[2, 3, 3]"),
        (torch.zeros(2, 3, 3, dtype=torch.complex64), TypeError, "a tensor complex64[2, 3, 3]"),
        (torch.zeros(5, 4, dtype=torch.uint8), ValueError, "uint8 of shape (5, 4)"),
        (torch.zeros(1, 1, 1, 2, 2, dtype=torch.uint8), ValueError, "of shape (1, 1, 1, 2, 2)"),
    ],
)
def test_to_float_refuses(x, kind, got) -> None:
    wanted = "to_float: {} must be floating, or uint8 images [n, height, width] or [n, channels, "
    for wrong in (x, data.Batch(x, x), data.Dataset(x, x)):
        with pytest.raises(kind, match=re.escape(wanted.format("x")) + ".*" + re.escape(got)):
            data.to_float(wrong)
    if x.dtype == torch.uint8:  # in a tree, other dtypes may be right
        with pytest.raises(kind, match=re.escape(wanted.format("x.left.0"))):
            data.to_float(data.Batch({"left": [x], "right": torch.ones(len(x))}, x))


def test_to_float_refuses_what_is_not_a_tensor() -> None:
    for pair in ([1.0], (torch.zeros(1), torch.zeros(1))):
        with pytest.raises(TypeError, match=r"got a (list|tuple); make a pair a data.Dataset"):
            data.to_float(pair)  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"to_float: x\.0 must be floating.* got a float"):
        data.to_float(data.Batch([1.0], torch.zeros(1)))


def test_take_returns_rows_of_every_leaf(sample: data.Dataset) -> None:
    x = torch.arange(24.0).view(4, 3, 2)
    everything = {"x": x, "labels": [x[:, 0, 0].long(), x[:, 0] > 3]}
    for index in (torch.tensor([3, 0, 3]), torch.tensor([[1], [2]]), torch.tensor(2), 2, -1):
        taken = data.take(everything, index)
        numbers = index if isinstance(index, int) else index.tolist()
        expected = torch.from_numpy(np.asarray(x.numpy()[numbers]))
        assert torch.equal(taken["x"], expected)
        assert torch.equal(taken["labels"][0], expected[..., 0, 0].long())
        assert torch.equal(taken["labels"][1], expected[..., 0, :] > 3)
    few = data.take(sample, torch.tensor([5, 7]))
    assert isinstance(few, data.Dataset) and few.x.dtype == torch.uint8
    for indices in (data.sequential_indices(10, 4), data.sequential_indices(8, 4)):
        step = data.take(indices, 1)
        assert isinstance(step, data.Indices) and step.index.tolist() == [4, 5, 6, 7]
        assert step.mask.shape == indices.mask.shape[1:]


@pytest.mark.parametrize(
    ("tree", "index", "kind", "message"),
    [
        ({"a": 1, "b": torch.tensor(0)}, 0, TypeError, r"tensors \[n, \.\.\.\], .*got\n  a: 1"),
        ({"a": 1, "b": torch.tensor(0)}, 0, TypeError, r"\n  b: a tensor, int64 of shape \(\)"),
        (torch.ones(2), torch.tensor([True, False]), TypeError, "must be int64, got torch.bool"),
        (torch.ones(2), [0], TypeError, "must be an int64 tensor, got a list"),
        (torch.ones(2), True, TypeError, "must be an int64 tensor, got a bool"),
        ({"a": np.ones((2, 3))}, 0, TypeError, r"\n  a: numpy float64\[2, 3\]; convert arrays"),
        ({"a": torch.ones(2), "b": [torch.ones(3)]}, 0, ValueError, r"\{'a': 2, 'b\.0': 3\}"),
        (torch.ones(2), torch.tensor([0], device="meta"), ValueError, r"\['cpu'\] and meta"),
    ],
)
def test_take_refuses(tree, index, kind, message) -> None:
    with pytest.raises(kind, match=f"(?s)take: .*{message}"):
        data.take(tree, index)
