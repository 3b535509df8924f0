"""Every row of docs/curriculum.md is in a notebook and carried by a test, the last two here."""

import ast
import re
from pathlib import Path

import einops
import pytest
import torch
from torch.func import grad, vmap

import fdl
import models
from fdl import data, losses, metrics, optim, population, random, tree

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/curriculum.md").read_text()
ROWS = re.findall(r"^\| ([A-Z]\d) \| .* \| (.*) \|$", PAGE, re.M)
SECTIONS = {"T": 3, "A": 1, "L": 4, "D": 2, "S": 1, "M": 3, "B": 6, "G": 1, "C": 3, "R": 2}
IDS = [f"{letter}{i}" for letter, count in SECTIONS.items() for i in range(1, count + 1)]


def marked() -> set[str]:
    """The ids in `@pytest.mark.curriculum(…)` over the tests."""
    marks = [
        call
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        for call in node.decorator_list
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.curriculum"
    ]
    return {argument.value for call in marks for argument in call.args}


def test_every_row_is_carried_by_a_test():
    assert [id for id, _ in ROWS] == IDS
    assert marked() == set(IDS)


@pytest.mark.parametrize("id, links", ROWS, ids=IDS)
def test_every_row_has_a_heading_in_its_notebooks(id, links):
    for name in re.findall(r"notebooks/(\w+)\.ipynb", links):
        text = (ROOT / "notebooks" / f"{name}.py").read_text()
        assert re.search(rf"^# Curriculum:.*\b{id}\b", text, re.M), f"{name} does not list {id}"
        assert re.search(rf"^# ##+ .*\b{id}\b", text, re.M), f"{name} has no heading for {id}"


@pytest.mark.curriculum("T2")
def test_einops_reshapes_what_a_gradient_and_vmap_go_through(plain_backend):
    def patches(x):  # [4·a, 4·b] -> means of 4 × 4 patches
        return einops.reduce(x, "(a p) (b q) -> a b", "mean", p=4, q=4)

    x = random.normal(random.key(0), (5, 8, 12), torch.float64)
    expected = x.view(5, 2, 4, 3, 4).mean((2, 4))
    assert torch.allclose(vmap(patches)(x), expected, rtol=1e-14)
    assert torch.allclose(torch.compile(vmap(patches), fullgraph=True)(x), expected, rtol=1e-14)
    assert torch.equal(grad(lambda x: patches(x).sum())(x[0]), torch.full_like(x[0], 1 / 16))


@pytest.mark.slow
@pytest.mark.curriculum("S1", "M1")
@pytest.mark.parametrize(
    "model, lr", [(models.softmax_regression(), 0.1), (models.mlp(), 0.5)], ids=["S1", "M1"]
)
def test_mean_test_accuracy_of_three_seeds_after_five_epochs(model, lr):
    try:
        train, test = data.fashion_mnist(download=False), data.fashion_mnist(train=False)
    except FileNotFoundError as error:
        pytest.skip(f"needs the full Fashion-MNIST: {error}")
    loss = fdl.supervised(model, losses.cross_entropy, {"accuracy": metrics.accuracy})
    opt = optim.sgd(lr)
    step = vmap(fdl.train_step(loss, opt), (0, None))
    states = population.create(model, opt, random.split(random.key(0), 3))

    def epoch(states, images, rows):
        return fdl.scan(
            lambda s, row: step(s, data.to_float(data.batch(images, row))), states, rows
        )

    run = fdl.jit(epoch, donate_argnums=0)
    for e in range(5):
        rows = data.epoch_indices(random.fold_in(random.key(1), e), len(train.x), 256)
        states, _ = run(states, train, rows)
    whole = tree.map(lambda leaf: leaf[0], data.sequential_indices(10_000, 10_000))
    scores = vmap(fdl.eval_step(loss), (0, None))(states, data.to_float(data.batch(test, whole)))
    assert scores["accuracy"].value.mean() >= 0.81
