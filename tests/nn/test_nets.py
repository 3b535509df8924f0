"""The residual net and the transformer of `models` against their `nn.Module`s in float64."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn as oo
from torch.func import grad, vmap

import fdl
import models
from fdl import data, losses, optim, random, tree
from fdl.testing import check_equals_module
from models import torch_modules
from tests.support.asserts import close, draw

KEY = random.key(2)
IMAGES, LABELS = draw(1, 14, 1, 28, 28), random.randint(KEY, (14,), 0, 10)


class Pair(NamedTuple):
    model: Any
    module: Callable[[], oo.Module]


PAIRS = {
    "resnet": Pair(models.resnet(4), functools.partial(torch_modules.ResNet, 4)),
    "transformer": Pair(
        models.transformer(12, 3, rate=0.0),
        functools.partial(torch_modules.Transformer, 12, 3, rate=0.0),
    ),
}
each_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


def begin(pair: Pair, opt: optim.Optimizer) -> tuple[fdl.TrainState, oo.Module]:
    """The same start for a model and its module, in float64."""
    state = tree.cast(fdl.TrainState.create(pair.model, opt, key=KEY), torch.float64)
    values = tree.flatten_dict(tree.merge(state.params, state.buffers))
    module = pair.module().double()
    module.load_state_dict(values)
    return state, module


@each_pair
def test_the_order_of_the_leaves_is_that_of_the_module(pair):
    state, module = begin(pair, optim.sgd(0.1))
    assert list(tree.flatten_dict(state.params)) == [name for name, _ in module.named_parameters()]
    assert list(tree.flatten_dict(state.buffers)) == [name for name, _ in module.named_buffers()]


@pytest.mark.curriculum("C3", "R2")
@each_pair
def test_a_net_equals_its_module(pair):
    optimizers = (
        optim.sgd(0.05, momentum=0.9),
        lambda module: torch.optim.SGD(module.parameters(), 0.05, momentum=0.9),
    )
    batch, loss = (IMAGES[:4], LABELS[:4]), (losses.cross_entropy, F.cross_entropy)
    check_equals_module(pair.model, pair.module(), batch, loss, optimizers=optimizers)


@pytest.mark.slow
@each_pair
def test_a_population_and_a_compiled_epoch_equal_single_steps(pair, plain_backend):
    opt = optim.adamw(0.01)
    step = fdl.train_step(fdl.supervised(pair.model, losses.cross_entropy), opt)
    states = [
        tree.cast(fdl.TrainState.create(pair.model, opt, key=key), torch.float64)
        for key in random.split(KEY)
    ]
    batches = (IMAGES.view(2, 7, 1, 28, 28), LABELS.view(2, 7))
    epoch = functools.partial(fdl.scan, vmap(step, (0, None)))
    found, _ = fdl.jit(epoch)(tree.stack(states), batches)
    for state, end in zip(states, tree.unstack(found), strict=True):
        for batch in zip(*batches, strict=True):
            state, _ = step(state, batch)
        assert tree.diff(state, end, rtol=1e-7, atol=1e-9) == []


@pytest.mark.slow
@each_pair
def test_gradients_compiled_by_inductor(pair):
    loss = fdl.supervised(pair.model, losses.cross_entropy)
    state, _ = begin(pair, optim.sgd(0.1))
    batch = data.Batch(IMAGES, LABELS)
    args = (state.buffers,) if isinstance(loss, fdl.StatefulLoss) else ()

    def gradients(params):
        return grad(lambda p: loss(p, *args, batch, train=True)[0])(params)

    close(fdl.jit(gradients, strict=True)(state.params), gradients(state.params), 1e-9, 1e-11)


def test_a_block_whose_last_kernel_is_zero_passes_its_input_on():
    """What a residual net is made for: depth that costs nothing where it does not help."""
    model = models.resnet(4)
    params, buffers = model.init(KEY)
    params["block2"]["5"]["weight"] = torch.zeros(8, 8, 3, 3)
    x = IMAGES.float()
    y, _ = model.apply(params, buffers, x)
    params["block2"]["2"]["weight"] = 9 * params["block2"]["2"]["weight"]  # within the block
    assert torch.equal(model.apply(params, buffers, x)[0], y)
    params["wider1"]["2"]["weight"] = 9 * params["wider1"]["2"]["weight"]  # around it
    assert not torch.equal(model.apply(params, buffers, x)[0], y)


def test_a_transformer_says_which_images_it_takes():
    model = models.transformer(12, 3)
    params = model.init(KEY)
    with pytest.raises(
        ValueError, match=r"position\(49, 12\): .* \[batch, 49, 12\], got \[2, 64, 1"
    ):
        model.apply(params, torch.ones(2, 1, 32, 32))


def test_without_positions_a_transformer_does_not_see_the_order_of_patches():
    model = models.transformer(12, 3)
    params = tree.cast(model.init(KEY), torch.float64)
    patches = F.unfold(IMAGES, 4, stride=4)
    order = random.permutation(KEY, 49)
    shuffled = F.fold(patches[..., order], (28, 28), 4, stride=4)
    assert (model.apply(params, shuffled) - model.apply(params, IMAGES)).abs().max() > 1e-3
    params["position"]["weight"] = torch.zeros_like(params["position"]["weight"])
    close(model.apply(params, shuffled), model.apply(params, IMAGES))


def test_dropout_is_drawn_from_the_key_in_training():
    model = models.transformer(12, 3, rate=0.5)
    params = model.init(KEY)
    x = IMAGES.float()
    with pytest.raises(ValueError, match="key"):
        model.apply(params, x, train=True)
    a, b = (model.apply(params, x, train=True, key=key) for key in random.split(KEY))
    assert not torch.equal(a, b)
    assert torch.equal(a, model.apply(params, x, train=True, key=random.split(KEY)[0]))
