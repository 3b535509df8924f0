"""Proof 1: gradients equal `backward()`, finite differences and the closed forms, in float64."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

import models
from fdl import data, losses, nn, random, supervised, tree
from fdl.testing import assert_trees_close
from tests.support import twins

KEY = random.key(7)  # of the dropout masks


def images(n: int = 32) -> data.Batch:
    row = data.Indices(torch.arange(n), torch.ones(n, dtype=torch.bool))
    batch = data.to_float(data.batch(data.fashion_mnist_sample(), row))
    return data.Batch(batch.x.double(), batch.y)


def points(features: int, n: int = 32) -> data.Batch:
    w = torch.linspace(-1, 2, features, dtype=torch.float64)
    return data.Batch(*data.synthetic_linear(random.key(1), w, 4.2, n=n, noise=0.1))


class Case(NamedTuple):
    model: nn.Model
    twin: Callable[[], torch.nn.Module]
    loss: Callable[..., Tensor]
    twin_loss: Callable[[Tensor, Tensor], Tensor]
    batch: Callable[[], data.Batch]
    drops: bool = False


CASES = {
    "linreg": Case(
        models.linreg(3),
        lambda: twins.linreg(3),
        losses.squared_loss,
        twins.half_mse,
        lambda: points(3),
    ),
    "linreg-mse": Case(
        models.linreg(3), lambda: twins.linreg(3), losses.mse, F.mse_loss, lambda: points(3)
    ),
    "softmax": Case(
        models.softmax_regression(),
        twins.softmax_regression,
        losses.cross_entropy,
        F.cross_entropy,
        images,
    ),
    "mlp": Case(models.mlp(), twins.mlp, losses.cross_entropy, F.cross_entropy, images),
    "dropout": Case(
        models.mlp(hidden=(64, 64), rates=(0.2, 0.5)),
        lambda: twins.mlp(hidden=(64, 64), rates=(0.2, 0.5)),
        losses.cross_entropy,
        F.cross_entropy,
        images,
        drops=True,
    ),
    "lenet": Case(models.lenet(), twins.lenet, losses.cross_entropy, F.cross_entropy, images),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def params_of(model: nn.Model) -> Any:
    """Float64 parameters with biases that are not zero, as large as after some training."""
    params = tree.cast(model.init(random.key(0)), torch.float64)
    keys = dict(zip(tree.flatten_dict(params), random.split(random.key(5), 32), strict=False))
    moved = {
        path: leaf + 0.05 * random.normal(keys[path], leaf.shape, torch.float64)
        for path, leaf in tree.flatten_dict(params).items()
    }
    return tree.unflatten_dict(moved)


def objective(case: Case) -> Callable[..., Tensor]:
    loss = supervised(case.model, case.loss)
    return lambda params, batch: loss(params, batch, train=case.drops, key=KEY)[0]


def assert_equal(got: Any, expected: Any, rtol: float = 1e-10) -> None:
    assert all(leaf.abs().max() > 1e-6 for leaf in tree.leaves(expected)), "a gradient vanished"
    assert_trees_close(got, expected, rtol=rtol, atol=1e-15)


@pytest.mark.curriculum("A1")
@each_case
def test_gradient_equals_that_of_backward(case: Case) -> None:
    params, batch = params_of(case.model), case.batch()
    twin = twins.set_params(case.twin(), params)
    if case.drops:
        twins.draw_masks(twin, KEY, batch.x)
    value = case.twin_loss(twin(batch.x), batch.y)
    value.backward()
    assert_equal(grad(objective(case))(params, batch), twins.get_grads(twin))
    torch.testing.assert_close(
        objective(case)(params, batch), value.detach(), rtol=1e-12, atol=1e-15
    )


@each_case
def test_gradient_equals_central_differences(case: Case) -> None:
    params, batch = params_of(case.model), case.batch()
    f, gradient = objective(case), tree.flatten_dict(grad(objective(case))(params, batch))
    flat = tree.flatten_dict(params)
    h = 1e-5
    for i, (path, leaf) in enumerate(flat.items()):
        # The largest coordinates of some random ones: relative error means something there.
        some = random.randint(random.fold_in(random.key(3), i), (50,), 0, leaf.numel())
        for j in some[gradient[path].flatten()[some].abs().argsort(descending=True)][:3]:
            shift = torch.zeros_like(leaf).flatten().index_fill(0, j, h).view_as(leaf)
            above, below = (
                f(tree.unflatten_dict(flat | {path: leaf + s}), batch) for s in (shift, -shift)
            )
            expected = (above - below) / (2 * h)
            torch.testing.assert_close(
                gradient[path].flatten()[j],
                expected,
                rtol=1e-6,
                atol=1e-9,
                msg=lambda m, p=path: p + m,
            )


@pytest.mark.curriculum("L1")
def test_linear_regression_has_its_closed_form() -> None:
    case = CASES["linreg"]
    params, (x, y, _) = params_of(case.model), case.batch()
    r = x @ params["weight"].T + params["bias"] - y
    expected = {"weight": r.T @ x / len(x), "bias": r.sum(0) / len(x)}
    assert_equal(grad(objective(case))(params, (x, y)), expected)


def test_softmax_regression_has_its_closed_form() -> None:
    case = CASES["softmax"]
    params, (x, y, _) = params_of(case.model), case.batch()
    flat = x.flatten(1)
    logits = flat @ params["1"]["weight"].T + params["1"]["bias"]
    error = logits.exp() / logits.exp().sum(1, keepdim=True) - torch.eye(10)[y]
    expected = {"1": {"weight": error.T @ flat / len(x), "bias": error.sum(0) / len(x)}}
    assert_equal(grad(objective(case))(params, (x, y)), expected)


def test_l2_penalty_has_the_weights_as_gradient() -> None:
    params = params_of(models.mlp(8, (4,), 2))
    assert_equal(grad(losses.l2_penalty)(params), params)


@pytest.mark.curriculum("A1")
def test_detach_stops_a_gradient() -> None:
    def f(x: Tensor) -> Tensor:
        return x**2 + (x**3).detach()

    x = torch.tensor(1.0, dtype=torch.float64)
    assert grad(f)(x) == 2
    leaf = x.clone().requires_grad_()
    f(leaf).backward()
    assert leaf.grad == 2
    assert grad(lambda x: x**2 + x**3)(x) == 5


@each_case
def test_per_sample_gradients_equal_a_loop(case: Case) -> None:
    params, batch = params_of(case.model), case.batch()

    def one(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return objective(case)(params, (x[None], y[None]))

    got = vmap(grad(one), (None, 0, 0))(params, batch.x, batch.y)
    rows = [grad(one)(params, x, y) for x, y in zip(batch.x, batch.y, strict=True)]
    assert_equal(got, tree.stack(rows))
    if not case.drops:  # there the rows share one mask, and the batch has a mask for each
        whole = grad(objective(case))(params, batch)
        assert_equal(tree.map(lambda leaf: leaf.mean(0), got), whole)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.drops])
def test_a_masked_example_has_no_gradient(name: str) -> None:
    case = CASES[name]  # a shorter batch would draw other dropout masks
    params, batch = params_of(case.model), case.batch()
    mask = torch.arange(len(batch.x)) < 20
    got = grad(objective(case))(params, batch._replace(mask=mask))
    assert_equal(got, grad(objective(case))(params, (batch.x[:20], batch.y[:20])))
