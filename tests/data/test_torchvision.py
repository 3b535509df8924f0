"""`data.from_torchvision` on small files in the formats of each data set."""

import numpy as np
import pytest
import torch
from torchvision import datasets, transforms

from fdl import data
from tests.support.image_files import KINDS, write


def opened(name, root, train, **options):
    split = {"split": "balanced"} if name == "emnist" else {}
    return KINDS[name](root, train=train, download=True, **split, **options)


@pytest.mark.parametrize("name", KINDS)
def test_images_are_upright_and_labels_the_classes(name, tmp_path, monkeypatch):
    written = write(tmp_path, name, monkeypatch)
    for (x, y), train in zip(written, (True, False), strict=True):
        dataset = opened(name, tmp_path, train)
        got = data.from_torchvision(dataset)
        assert type(got) is data.Dataset and got.x.is_contiguous() and got.y.is_contiguous()
        assert torch.equal(got.x, torch.from_numpy(x)) and torch.equal(got.y, torch.from_numpy(y))
        # torchvision's own items, pictures of Pillow
        image, label = dataset[3]
        shown = torch.from_numpy(np.array(image))
        shown = shown.movedim(-1, 0) if name.startswith("cifar") else shown
        shown = shown.mT if name == "emnist" else shown
        assert torch.equal(shown, got.x[3]) and label == got.y[3]


def test_what_it_cannot_take_is_named(tmp_path, monkeypatch):
    write(tmp_path, "mnist", monkeypatch)
    with pytest.raises(ValueError, match="MNIST must have no transforms"):
        data.from_torchvision(opened("mnist", tmp_path, True, transform=transforms.ToTensor()))
    with pytest.raises(ValueError, match="no transforms"):
        data.from_torchvision(opened("mnist", tmp_path, True, target_transform=int))
    with pytest.raises(TypeError, match=r"or CIFAR100, got a FakeData; data\.stream takes any"):
        data.from_torchvision(datasets.FakeData(3))
    dataset = opened("mnist", tmp_path, True)
    dataset.targets = dataset.targets[:5]
    with pytest.raises(ValueError, match=r"from_torchvision: all tensors of MNIST .*'y': 5"):
        data.from_torchvision(dataset)
