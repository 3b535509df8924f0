"""Proof 2: 50 steps of training move the parameters exactly as the object-oriented twin's do.

Compared are displacements from the shared start, in float64: of the eager step, of the compiled
step, and of the compiled scan. Over more steps than some tens, rounding grows chaotically.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fdl
import models
from fdl import TrainState, data, losses, nn, optim, random, tree
from tests.support import twins

STEPS = 50
Build = Callable[[torch.nn.Module], torch.optim.Optimizer]


class Recipe(NamedTuple):
    model: nn.Model
    twin: torch.nn.Module
    loss: Callable[..., Tensor]
    twin_loss: Callable[[Tensor, Tensor], Tensor]
    batches: data.Batch  # stacked, [steps, batch, ...]
    opt: optim.Optimizer
    twin_opt: Build
    drops: bool = False
    penalty: float = 0.0  # λ of an explicit l2_penalty on the weights


def sgd(**options: Any) -> Build:
    return lambda module: torch.optim.SGD(module.parameters(), **options)


def decay_weights_only(module: torch.nn.Module) -> torch.optim.Optimizer:
    named = dict(module.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if n.endswith("weight")], "weight_decay": 3.0},
        {"params": [p for n, p in named.items() if n.endswith("bias")]},
    ]
    return torch.optim.SGD(groups, lr=0.003)


def in_batches(dataset: data.Dataset, batch: int, steps: int = STEPS) -> data.Batch:
    """Shuffled batches, one epoch after the other, stacked to `[steps, batch, ...]`."""
    n = len(dataset.x)
    epochs = -(-steps // (n // batch))
    rows = [
        data.epoch_indices(random.fold_in(random.key(2), e), n, batch, drop_last=True).index
        for e in range(epochs)
    ]
    index = torch.cat(rows)[:steps]
    return data.Batch(dataset.x[index], dataset.y[index])


def points(w: list[float], b: float, n: int, noise: float = 0.01) -> data.Dataset:
    return data.synthetic_linear(random.key(1), torch.tensor(w).double(), b, n=n, noise=noise)


def images(batch: int) -> data.Batch:
    sample = data.fashion_mnist_sample()
    n = 2048
    x = sample.x[:n, None].double() / 255
    return in_batches(data.Dataset(x, sample.y[:n]), batch)


def classifier(
    model: nn.Model, twin: torch.nn.Module, batch: int, lr: float, drops: bool = False
) -> Recipe:
    return Recipe(
        model,
        twin,
        losses.cross_entropy,
        F.cross_entropy,
        images(batch),
        optim.sgd(lr),
        sgd(lr=lr),
        drops,
    )


def high_dimensional(opt: optim.Optimizer, twin_opt: Build, penalty: float = 0.0) -> Recipe:
    return Recipe(
        models.linreg(200, std=1.0),
        twins.linreg(200),
        losses.squared_loss,
        twins.half_mse,
        in_batches(points([0.01] * 200, 0.05, 20), 5),
        opt,
        twin_opt,
        penalty=penalty,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "linreg": lambda: Recipe(
        models.linreg(2),
        twins.linreg(2),
        losses.squared_loss,
        twins.half_mse,
        in_batches(points([2.0, -3.4], 4.2, 1000), 10),
        optim.sgd(0.03),
        sgd(lr=0.03),
    ),
    "linreg-decay": lambda: Recipe(
        models.linreg(3),
        twins.linreg(3),
        losses.mse,
        F.mse_loss,
        in_batches(points([1.0, -1.0, 2.0], 5.0, 1000), 50),
        optim.sgd(0.03, weight_decay=0.1),
        sgd(lr=0.03, weight_decay=0.1),
    ),
    "softmax": lambda: classifier(
        models.softmax_regression(), twins.softmax_regression(), 256, 0.1
    ),
    "mlp": lambda: classifier(models.mlp(), twins.mlp(), 32, 0.5),
    "dropout": lambda: classifier(
        models.mlp(hidden=(64, 64), rates=(0.2, 0.5)),
        twins.mlp(hidden=(64, 64), rates=(0.2, 0.5)),
        32,
        0.5,
        drops=True,
    ),
    "weight-decay": lambda: high_dimensional(
        optim.chain(optim.add_decayed_weights(3.0, mask="weight"), optim.sgd(0.003)),
        decay_weights_only,
    ),
    "l2-penalty": lambda: high_dimensional(optim.sgd(0.003), decay_weights_only, penalty=3.0),
    "lenet": lambda: classifier(models.lenet(), twins.lenet(), 16, 0.9),
}

SGD_OPTIONS = {
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "decay": {"weight_decay": 0.01},
    "maximize": {"maximize": True},
    "maximize-decay-dampening": {
        "maximize": True,
        "weight_decay": 0.01,
        "momentum": 0.8,
        "dampening": 0.1,
    },
    "nesterov-decay-maximize": {
        "momentum": 0.7,
        "nesterov": True,
        "weight_decay": 0.05,
        "maximize": True,
    },
}


def start(recipe: Recipe) -> TrainState:
    state = TrainState.create(recipe.model, recipe.opt, key=random.key(0))
    params = tree.cast(state.params, torch.float64)
    return state._replace(params=params, opt_state=recipe.opt.init(params))


def step_of(recipe: Recipe) -> Callable[..., Any]:
    plain = fdl.supervised(recipe.model, recipe.loss)

    def loss(params: Any, batch: Any, **options: Any) -> tuple[Tensor, Any]:
        value, metrics = plain(params, batch, **options)
        if recipe.penalty:
            value = value + recipe.penalty * losses.l2_penalty(params["weight"])
        return value, metrics

    return fdl.train_step(loss, recipe.opt)


def rows(batches: data.Batch) -> Iterable[Any]:
    return zip(batches.x, batches.y, strict=True)


def eagerly(recipe: Recipe) -> tuple[TrainState, Tensor]:
    step, state, found = step_of(recipe), start(recipe), []
    for batch in rows(recipe.batches):
        state, metrics = step(state, batch)
        found.append(metrics["loss"].value)
    return state, torch.stack(found)


def step_by_step(recipe: Recipe) -> tuple[TrainState, Tensor]:
    step, state, found = fdl.jit(step_of(recipe)), start(recipe), []
    for batch in rows(recipe.batches):
        state, metrics = step(state, batch)
        found.append(metrics["loss"].value)
    return state, torch.stack(found)


def in_one_scan(recipe: Recipe) -> tuple[TrainState, Tensor]:
    step = step_of(recipe)
    epoch = fdl.jit(lambda state, batches: fdl.scan(step, state, batches))
    state, metrics = epoch(start(recipe), recipe.batches)
    return state, metrics["loss"].value


def by_the_twin(recipe: Recipe, **options: Any) -> tuple[Any, list[float]]:
    state = start(recipe)
    twin = twins.set_params(recipe.twin, state.params)
    found = twins.train(
        twin,
        recipe.twin_loss,
        recipe.twin_opt(twin),
        rows(recipe.batches),
        key=state.key if recipe.drops else None,
        **options,
    )
    return twins.get_params(twin), found


def assert_same_way(recipe: Recipe, params: Any, expected: Any, least: float = 1e-4) -> None:
    """Compare displacements from the start: where little moves, equal positions prove little."""
    begin = start(recipe).params
    way = tree.map(torch.sub, params, begin)
    expected_way = tree.map(torch.sub, expected, begin)
    for path, leaf in tree.flatten_dict(expected_way).items():
        assert leaf.abs().max() > least, f"{path} did not move"
        # An element that hardly moves has lost digits to its own size: measure by the leaf.
        atol = 1e-9 * leaf.abs().max().item()
        torch.testing.assert_close(
            tree.flatten_dict(way)[path], leaf, rtol=1e-9, atol=atol, msg=lambda m, p=path: p + m
        )


WAYS = {"eager": eagerly, "jit": step_by_step, "scan": in_one_scan}


@pytest.mark.slow
@pytest.mark.curriculum("L2", "S1", "M1", "C2")
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("way", WAYS)
def test_recipe_moves_as_its_twin(way: str, name: str) -> None:
    recipe = RECIPES[name]()
    expected, twin_losses = by_the_twin(recipe)
    state, found = WAYS[way](recipe)
    assert_same_way(recipe, state.params, expected)
    assert state.step == STEPS
    twin_losses = torch.tensor(twin_losses, dtype=torch.float64)
    torch.testing.assert_close(found, twin_losses, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SGD_OPTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_sgd_option_moves_as_torch(way: str, name: str, request: pytest.FixtureRequest) -> None:
    # Inductor is shown the richest in earnest; to trace the others tells as much for less.
    if name != "maximize-decay-dampening":
        request.getfixturevalue("plain_backend")
    options = SGD_OPTIONS[name]
    recipe = classifier(models.mlp(784, (16,)), twins.mlp(784, (16,)), 8, 0.05)
    recipe = recipe._replace(opt=optim.sgd(0.05, **options), twin_opt=sgd(lr=0.05, **options))
    expected, _ = by_the_twin(recipe)
    assert_same_way(recipe, WAYS[way](recipe)[0].params, expected)


@pytest.mark.curriculum("M2")
def test_decay_by_the_optimizer_equals_the_penalty_in_the_loss() -> None:
    recipes = [RECIPES[name]() for name in ("weight-decay", "l2-penalty")]
    one, two = (eagerly(recipe)[0].params for recipe in recipes)
    assert_same_way(recipes[0], one, two)


@pytest.mark.curriculum("L4")
def test_decay_ends_near_the_ridge() -> None:
    dataset = points([1.0, -1.0, 2.0], 5.0, 1000)
    recipe = RECIPES["linreg-decay"]()._replace(batches=in_batches(dataset, 50, 30 * 20))
    with fdl.disable_jit():
        params = in_one_scan(recipe)[0].params
    ones = torch.cat([dataset.x, torch.ones(1000, 1).double()], 1)  # [w, b]: b decays as well
    hessian = 2 / 1000 * ones.T @ ones + 0.1 * torch.eye(4).double()
    ridge = torch.linalg.solve(hessian, 2 / 1000 * ones.T @ dataset.y)[:, 0]
    torch.testing.assert_close(
        torch.cat([params["weight"][0], params["bias"]]), ridge, rtol=0, atol=0.05
    )
    assert 4.5 < params["bias"].item() < 4.9  # the decay keeps it from 5
    expected, _ = by_the_twin(recipe)
    assert_same_way(recipe, params, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linreg", "linreg-decay", "lenet"])
def test_padded_last_batch_equals_the_short_one_of_the_twin(name: str, plain_backend: None) -> None:
    recipe = RECIPES[name]()
    n, size = 70, 16  # 4 whole batches and one of 6
    flat = data.Dataset(recipe.batches.x.flatten(0, 1)[:n], recipe.batches.y.flatten(0, 1)[:n])
    twin = twins.set_params(recipe.twin, start(recipe).params)
    short = list(zip(flat.x.split(size), flat.y.split(size), strict=True))
    twins.train(twin, recipe.twin_loss, recipe.twin_opt(twin), short)
    indices = data.sequential_indices(n, size)
    assert indices.mask.sum() == n and not indices.mask.all()

    step = step_of(recipe)
    epoch = fdl.jit(
        lambda state, dataset, indices: fdl.scan(
            lambda s, row: step(s, data.batch(dataset, row)), state, indices
        )
    )
    state, metrics = epoch(start(recipe), flat, indices)
    assert_same_way(recipe, state.params, twins.get_params(twin))
    assert metrics["loss"].sum().count == n


@pytest.mark.curriculum("L3")
def test_rate_changed_in_the_middle_moves_as_torch(plain_backend: None) -> None:
    recipe = RECIPES["linreg"]()
    twin = twins.set_params(recipe.twin, start(recipe).params)
    twin_opt = recipe.twin_opt(twin)
    halves = [tree.map(lambda leaf: leaf[:25], recipe.batches)]
    halves.append(tree.map(lambda leaf: leaf[25:], recipe.batches))
    twins.train(twin, recipe.twin_loss, twin_opt, rows(halves[0]))
    twin_opt.param_groups[0]["lr"] = 0.005
    twins.train(twin, recipe.twin_loss, twin_opt, rows(halves[1]))

    step = step_of(recipe)
    epoch = fdl.jit(lambda state, batches: fdl.scan(step, state, batches))
    state, _ = epoch(start(recipe), halves[0])
    state = state._replace(opt_state=optim.with_hyperparams(state.opt_state, lr=0.005))
    state, _ = epoch(state, halves[1])
    assert_same_way(recipe, state.params, twins.get_params(twin))


@pytest.mark.parametrize("way", WAYS)
def test_step_schedule_moves_as_step_lr(way: str, plain_backend: None) -> None:
    recipe = RECIPES["linreg"]()
    twin = twins.set_params(recipe.twin, start(recipe).params)
    twin_opt = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(twin_opt, step_size=7, gamma=0.6)
    twins.train(twin, recipe.twin_loss, twin_opt, rows(recipe.batches), scheduler=scheduler)
    opt = optim.sgd(optim.schedules.step(0.1, step_size=7, gamma=0.6), momentum=0.5)
    recipe = recipe._replace(opt=opt)
    state, _ = WAYS[way](recipe)
    assert_same_way(recipe, state.params, twins.get_params(twin))
    rate = optim.hyperparams(state.opt_state)["lr"].item()
    assert rate == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
