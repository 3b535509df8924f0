"""Every recipe of `train`: the ways to run it agree, it compiles once, on one device."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fdl import TrainState, data, disable_jit, jit, optim, random, scan, train_step, tree
from fdl._compiler import _interpreter, _trace
from fdl._compiler._signature import flatten, unflatten
from models import torch_modules
from tests.conftest import StandIn
from tests.data.test_augment import by_torchvision
from tests.support.asserts import draw, unchanged
from train import config, loop, recipes

pytestmark = pytest.mark.usefixtures("real_loops")

RECIPES = {
    "linreg": config.Linreg(),
    "linreg-decay": config.LinregDecay(),
    "weight-decay": config.WeightDecay(),
    "softmax": config.Softmax(data="sample", batch_size=64),
    "mlp": config.Mlp(data="sample", batch_size=64),
    "dropout": config.Dropout(data="sample", batch_size=64),
    "lenet": config.LeNet(data="sample", batch_size=8),
    "lenet-bn": config.LeNetBN(data="sample", batch_size=16),
}
RESNET = config.ResnetSmall(data="sample", batch_size=8)  # compiled alone, as it takes longest
# Batch normalisation subtracts what these add: their gradients are zero.
CANCELLED = {"conv.0.bias", "conv.4.bias", "fc.0.bias", "fc.3.bias"}
STEPS = 100
Epoch = Callable[[TrainState, Any, data.Indices], Any]


class Run(NamedTuple):
    """What a recipe starts from."""

    epoch: Epoch
    state: TrainState
    dataset: data.Dataset
    indices: data.Indices


def prepare(name: str, dtype: torch.dtype) -> Run:
    """Set up 100 steps of a recipe, with a schedule that halves the rate twice.

    The rate is a fifth of the recipe's, with which rounding grows a thousandfold on its steepest
    steps: then losses in float32 tell nothing.
    """
    chosen = RECIPES[name]
    problem = recipes.build(chosen, random.key(1))
    rate = optim.schedules.step(chosen.lr / 5, step_size=40, gamma=0.5)
    opt = optim.sgd(rate, weight_decay=chosen.weight_decay)
    state = TrainState.create(problem.model, opt, key=random.key(0))
    params = tree.cast(state.params, dtype)
    state = state._replace(params=params, opt_state=opt.init(params))
    x, y = problem.train
    if x.dtype == torch.uint8:
        x, y = x[:1000, None] / 255, y[:1000]
    dataset = tree.cast(data.Dataset(x, y), dtype)
    epochs = math.ceil(STEPS / math.ceil(len(x) / chosen.batch_size))
    parts = [
        data.epoch_indices(random.fold_in(random.key(2), e), len(x), chosen.batch_size)
        for e in range(epochs)
    ]
    indices = tree.map(lambda *rows: torch.cat(rows)[:STEPS], *parts)
    step = train_step(problem.loss, opt)

    def epoch(state: TrainState, dataset: data.Dataset, indices: data.Indices) -> Any:
        return scan(lambda s, row: step(s, data.to_float(data.batch(dataset, row))), state, indices)

    return Run(epoch, state, dataset, indices)


def agree(got: Any, expected: Any, rtol: float = 1e-10, atol: float = 1e-10) -> None:
    assert tree.diff(expected, got, rtol=rtol, atol=atol) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_compiled_equals_eager(dtype: torch.dtype) -> None:
    """All recipes as one function, which takes far less time to compile than each alone."""
    runs = {name: prepare(name, dtype) for name in RECIPES}
    arguments = {name: run[1:] for name, run in runs.items()}

    def everything(arguments: Any) -> Any:
        return {name: run.epoch(*arguments[name]) for name, run in runs.items()}

    with unchanged(arguments):
        got = jit(everything, strict=True)(arguments)
    for name, run in runs.items():
        state, metrics = run.epoch(*run[1:])
        moved = tree.map(lambda a, b: (a - b).abs().max(), state.params, run.state.params)
        still = {path for path, leaf in tree.flatten_dict(moved).items() if leaf <= 1e-4}
        assert still == (CANCELLED if name == "lenet-bn" else set()), name
        if dtype == torch.float64:
            agree(got[name], (state, metrics))
        else:
            # Normalising by a small batch amplifies rounding from step to step.
            first = 10 if name == "lenet-bn" else STEPS
            losses = [m["loss"].value[:first] for m in (got[name][1], metrics)]
            agree(*losses, rtol=1e-5, atol=1e-5)


def by_steps(run: Run) -> Any:
    """A Python loop over a jitted epoch of one step."""
    jitted, state, found = jit(run.epoch, strict=True), run.state, []
    for i in range(STEPS):
        row = tree.map(lambda leaf, i=i: leaf[i : i + 1], run.indices)
        state, metrics = jitted(state, run.dataset, row)
        found.append(metrics)
    assert len(jitted.report()) == 1
    return state, tree.map(lambda *rows: torch.cat(rows), *found)


def by_bodies(run: Run) -> Any:
    """A Python loop over the compiled body, as where the compiler refuses the loop."""
    leaves, spec = flatten((run[1:], {}))
    traced = _trace.trace(run.epoch, leaves, spec)
    results = _interpreter.compile_bodies(traced)([*leaves, *traced.constants])
    return unflatten(results, traced.spec)


def in_parts(run: Run) -> Any:
    """Five jitted epochs of twenty steps each, one program for all."""
    jitted, state, found = jit(run.epoch, donate_argnums=0, strict=True), run.state, []
    state = tree.map(torch.clone, state)
    for e in range(0, STEPS, 20):
        rows = tree.map(lambda leaf, e=e: leaf[e : e + 20], run.indices)
        state, metrics = jitted(state, run.dataset, rows)
        found.append(metrics)
    assert len(jitted.report()) == 1
    return state, tree.map(lambda *rows: torch.cat(rows), *found)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_steps_bodies_parts_and_graphs_equal_eager(name: str, stand_in: StandIn) -> None:
    run = prepare(name, torch.float64)
    expected = run.epoch(*run[1:])
    with unchanged(run[1:]):
        for way in (by_steps, by_bodies, in_parts):
            agree(way(run), expected)
    # Parameters of a megabyte are read where they are at first, until they are seen to move.
    assert stand_in.recorded == 2 + (name in ("mlp", "dropout"))
    assert stand_in.replayed == STEPS + STEPS // 20


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RECIPES, "resnet-small"])
def test_all_of_a_chunk_is_on_the_device_of_its_arguments(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No copy from the CPU, which could not be recorded: shown on another device than the CPU."""

    def elsewhere(mode: FakeTensorMode, x: Tensor) -> Tensor:
        with mode:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    monkeypatch.setattr(_trace, "fake_like", elsewhere)
    problem = recipes.build(RECIPES.get(name, RESNET), random.key(1))
    state = TrainState.create(problem.model, problem.opt, key=random.key(0))
    rows = data.epoch_indices(random.key(2), 100, 10)
    for fn, first in (
        (loop.run_chunk(problem), (state, torch.tensor(True))),
        (loop.run_evaluation(problem), state),
    ):
        leaves, spec = flatten(((first, problem.train, rows), {}))
        traced = _trace.trace(fn.__wrapped__, leaves, spec)
        assert traced.constants == []
        graphs = [m.graph for m in traced.graph.modules() if isinstance(m, torch.fx.GraphModule)]
        assert len(graphs) == 2  # the whole and the body of its loop
        values = [node.meta.get("val") for graph in graphs for node in graph.nodes]
        found = [x.device.type for x in values if isinstance(x, Tensor)]
        assert len(found) > 20 and set(found) == {"meta"}


@pytest.mark.slow
def test_a_chunk_of_the_residual_net_compiled_equals_eager() -> None:
    """With its own optimizer and augmentation, in float64, the last batch padded."""
    problem = recipes.build(RESNET, random.key(1))
    state = TrainState.create(problem.model, problem.opt, key=random.key(0))
    state = tree.cast(state, torch.float64)
    dataset = data.Dataset(problem.train.x[:28, None].double() / 255, problem.train.y[:28])
    rows = data.epoch_indices(random.key(2), 28, RESNET.batch_size)
    run = loop.run_chunk(problem)
    with disable_jit():
        (expected, _), metrics = run((state, torch.tensor(True)), dataset, rows)
    moved = tree.map(lambda a, b: (a - b).abs().max(), expected.params, state.params)
    assert min(tree.leaves(moved)) > 1e-6
    (got, ok), found = run((tree.map(torch.clone, state), torch.tensor(True)), dataset, rows)
    assert ok and run.report()[0].route == "one program"
    agree(found, metrics)
    agree(got, expected, rtol=1e-8, atol=1e-9)


def test_the_residual_net_is_trained_as_by_an_imperative_loop() -> None:
    """Augmentation, AdamW without decay of vectors, warm-up and cosine, against torch's own."""
    options = config.ResnetSmall(epochs=5, batch_size=8)
    x, y = draw(4, 28, 1, 28, 28), random.randint(random.key(5), (28,), 0, 10)
    problem = recipes.image_problem(options, data.Dataset(x, y), None, "")
    state = TrainState.create(problem.model, problem.opt, key=random.key(0))
    state = tree.cast(state, torch.float64)
    start = tree.flatten_dict(state.params)
    twin = torch_modules.ResNet().double()
    twin.load_state_dict(tree.flatten_dict(tree.merge(state.params, state.buffers)))
    matrices = [p for p in twin.parameters() if p.ndim > 1]
    vectors = [p for p in twin.parameters() if p.ndim == 1]
    opt = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=options.lr,
        weight_decay=options.weight_decay,
    )
    shares = [0, 1 / 2, *((1 + math.cos(math.pi * i / 18)) / 2 for i in range(19))]  # 20 steps
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, shares.__getitem__)
    step = train_step(problem.loss, problem.opt)
    for number, rows in enumerate([*torch.arange(28).split(8)] * 5):
        _, *keys = random.split(random.fold_in(state.key, number), 3)
        images = x[rows]
        for name, key in zip(("random_crop", "random_flip"), keys, strict=True):
            images = by_torchvision(name, key, images)
        loss = torch.nn.functional.cross_entropy(twin(images), y[rows])
        opt.zero_grad()
        loss.backward()
        opt.step()
        scheduler.step()
        padding = 8 - len(rows)
        index = torch.cat([rows, rows.new_zeros(padding)])
        state, found = step(state, data.batch((x, y), (index, torch.arange(8) < len(rows))))
        torch.testing.assert_close(found["loss"].value, loss.detach(), rtol=1e-10, atol=1e-12)
    theirs = {path: p.detach() for path, p in twin.named_parameters()}
    assert all((theirs[path] - start[path]).abs().max() > 1e-3 for path in theirs)
    agree(state.params, tree.unflatten_dict(theirs))
    agree(state.buffers, tree.unflatten_dict(dict(twin.named_buffers())))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", RECIPES)
def test_an_epoch_is_one_cuda_graph_and_equals_the_cpu(name: str) -> None:
    run = prepare(name, torch.float64)
    expected = run.epoch(*run[1:])
    run = Run(run.epoch, *tree.to(run[1:], "cuda"))
    jitted = jit(run.epoch, strict=True)
    with unchanged(run[1:]):
        for _ in range(2):
            agree(tree.to(jitted(*run[1:]), "cpu"), expected, rtol=1e-9, atol=1e-9)
    (report,) = jitted.report()
    assert report.route == "CUDA graph" and report.kernels > 0
