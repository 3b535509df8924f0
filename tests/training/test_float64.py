"""A device without float64, such as MPS, which no machine here has: `meta` stands in for one."""

import pytest
import torch
import torch.utils._pytree as pytree
from torch.func import grad
from torch.utils._python_dispatch import TorchDispatchMode

import fdl
import models
from fdl import data, losses, metrics, nn, optim, random, tree

KEY = random.key(0).to("meta")
IMAGES = torch.zeros(4, 1, 28, 28, device="meta")
LABELS = torch.zeros(4, dtype=torch.int64, device="meta")
NET = nn.linear(3, 2)


class WithoutFloat64(TorchDispatchMode):
    """Refuse every float64 tensor on `meta`, with the words of MPS."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.is_meta and leaf.dtype == torch.float64:
                raise TypeError("the MPS framework doesn't support float64")
        return out


def test_a_state_says_so():
    message = r"key is on the device meta, which has no float64 \(the MPS framework doesn't sup"
    with WithoutFloat64(), pytest.raises(ValueError, match=message):
        fdl.TrainState.create(NET, optim.sgd(0.1), key=KEY)
    state = fdl.TrainState.create(NET, optim.sgd(0.1), key=KEY)  # meta itself has float64
    assert {leaf.device.type for leaf in tree.leaves(state)} == {"meta"}
    with WithoutFloat64():  # elsewhere nothing changes
        fdl.TrainState.create(NET, optim.sgd(0.1), key=random.key(0))


def cross_entropy(model):
    params = model.init(KEY)
    return grad(lambda params: losses.cross_entropy(model.apply(params, IMAGES), LABELS))(params)


@pytest.mark.parametrize(
    "needs_none",
    [
        lambda: cross_entropy(models.mlp()),
        lambda: cross_entropy(models.lenet()),
        lambda: random.normal(KEY, (3,)),
        lambda: data.epoch_indices(KEY, 20, 4),
        lambda: data.random_crop(KEY, IMAGES, padding=2),
    ],
    ids=["mlp", "lenet", "normal", "order", "crop"],
)
def test_what_the_page_says_needs_no_float64(needs_none):
    with WithoutFloat64():
        got = needs_none()
    assert {leaf.device.type for leaf in tree.leaves(got)} == {"meta"}


@pytest.mark.parametrize(
    "needs_it",
    [
        lambda: losses.cross_entropy(IMAGES.flatten(1), LABELS, IMAGES[:, 0, 0, 0]),
        lambda: metrics.accuracy(IMAGES.flatten(1), LABELS),
        lambda: optim.adam(0.1).init({"w": IMAGES}),
        lambda: data.random_rotation(KEY, IMAGES, 10),
    ],
    ids=["weighted loss", "metric", "optimizer", "rotation"],
)
def test_what_the_page_says_needs_it(needs_it):
    needs_it()
    with WithoutFloat64(), pytest.raises(TypeError, match="doesn't support float64"):
        needs_it()
