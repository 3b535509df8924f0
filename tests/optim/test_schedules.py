"""Schedules against torch's schedulers, 300 updates of each, on every route."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.optim import lr_scheduler as theirs
from torch.optim.swa_utils import SWALR

from fdl import jit, optim, tree
from fdl.optim import schedules as ours
from tests.support.asserts import close

LR = 0.1


class Row(NamedTuple):
    name: str  # of torch's class
    ours: optim.Schedule
    theirs: Callable[[torch.optim.Optimizer], Any]
    steps: int = 300


class Handover:
    """`SWALR` as it is meant to be used: in the place of another scheduler, from `start` on."""

    def __init__(self, optimizer, start, before=None, **options):
        self.optimizer, self.start, self.options = optimizer, start, options
        self.before = before(optimizer) if before else None
        self.count = 0
        self.swa = SWALR(optimizer, **options) if start == 0 else None

    def step(self):
        self.count += 1
        if self.swa:
            self.swa.step()
        elif self.before:
            self.before.step()
        if self.count == self.start:
            self.swa = SWALR(self.optimizer, **self.options)


def same(name: str, function: str, *args: Any, steps: int = 300, **options: Any) -> Row:
    """Both take the same arguments after the first."""
    return Row(
        name,
        getattr(ours, function)(LR, *args, **options),
        lambda optimizer: getattr(theirs, name)(optimizer, *args, **options),
        steps,
    )


def free(name: str, function: str, *args: Any, steps: int = 300, **options: Any) -> Row:
    """The scheduler brings its own rate."""
    schedule = getattr(ours, function)(*args, **options)
    return Row(name, schedule, lambda o: getattr(theirs, name)(o, *args, **options), steps)


def swa(swa_lr: float, start: int, before: Any = None, value: Any = LR, **options: Any) -> Row:
    return Row(
        "SWALR",
        ours.swa_anneal(value, swa_lr, start, **options),
        lambda optimizer: Handover(optimizer, start, before, swa_lr=swa_lr, **options),
    )


class OncePerEpoch:
    """A scheduler that a training loop steps at the end of each epoch."""

    def __init__(self, scheduler, steps):
        self.scheduler, self.steps, self.count = scheduler, steps, 0

    def step(self):
        self.count += 1
        if self.count % self.steps == 0:
            self.scheduler.step()


def by_epoch(row: Row, steps: int) -> Row:
    return Row(
        row.name,
        ours.by_epoch(row.ours, steps),
        lambda optimizer: OncePerEpoch(row.theirs(optimizer), steps),
    )


def sequential(milestones: list[int], *pairs: Any) -> Row:
    return Row(
        "SequentialLR",
        ours.join([schedule for schedule, _ in pairs], milestones),
        lambda o: theirs.SequentialLR(o, [make(o) for _, make in pairs], milestones),
    )


def chain(*pairs: Any) -> Row:
    return Row(
        "ChainedScheduler",
        ours.chained(LR, *(factor for factor, _ in pairs)),
        lambda o: theirs.ChainedScheduler([make(o) for _, make in pairs], o),
    )


def hyperbola(t):
    return 1 / (1 + 0.1 * t)


def wobble(t):
    return 1 - (t % 7 - 3) / (50 + t)


ROWS = [
    same("LambdaLR", "lambda_lr", lambda t: 0.95**t),
    same("LambdaLR", "lambda_lr", hyperbola),
    Row(
        "MultiplicativeLR",
        ours.multiplicative(LR, wobble, total_iters=300),
        lambda o: theirs.MultiplicativeLR(o, wobble),
    ),
    Row(
        "MultiplicativeLR",
        ours.multiplicative(LR, lambda t: torch.where(t % 30 == 0, 0.5, 1.0), total_iters=299),
        lambda o: theirs.MultiplicativeLR(o, lambda t: 0.5 if t % 30 == 0 else 1.0),
    ),
    same("StepLR", "step", 30),
    same("StepLR", "step", 1, gamma=0.97),
    same("StepLR", "step", step_size=7, gamma=0.5),
    same("MultiStepLR", "multi_step", [30, 80]),
    same("MultiStepLR", "multi_step", [0, 5, 5, 5, 100], gamma=0.7),
    same("ConstantLR", "constant", 1 / 3, 5),
    same("ConstantLR", "constant", factor=0.01, total_iters=120),
    same("LinearLR", "linear"),
    same("LinearLR", "linear", 0.001, 1.0, 200),
    same("LinearLR", "linear", start_factor=1.0, end_factor=0.0, total_iters=100),
    same("ExponentialLR", "exponential", 0.9),
    same("ExponentialLR", "exponential", gamma=1.01),
    same("PolynomialLR", "polynomial"),
    same("PolynomialLR", "polynomial", 250, 0.9),
    same("PolynomialLR", "polynomial", total_iters=100, power=3.0),
    same("CosineAnnealingLR", "cosine_annealing", 300),
    same("CosineAnnealingLR", "cosine_annealing", 40, 0.01),
    same("CosineAnnealingLR", "cosine_annealing", T_max=7, eta_min=0.2),
    same("CosineAnnealingLR", "cosine_annealing", 1),
    same("CosineAnnealingWarmRestarts", "cosine_annealing_warm_restarts", 50),
    same("CosineAnnealingWarmRestarts", "cosine_annealing_warm_restarts", 7, 2, 0.001),
    same("CosineAnnealingWarmRestarts", "cosine_annealing_warm_restarts", T_0=1, T_mult=3),
    free("CyclicLR", "cyclic", 0.01, 0.1),
    free("CyclicLR", "cyclic", 0.01, 0.1, 20, 35, "triangular2"),
    free("CyclicLR", "cyclic", 0.0, 0.1, step_size_up=13, mode="exp_range", gamma=0.99),
    free("CyclicLR", "cyclic", 0.01, 0.1, 10, 0),
    free("CyclicLR", "cyclic", 0.01, 0.1, 10, 11, scale_fn=hyperbola, scale_mode="cycle"),
    free("CyclicLR", "cyclic", 0.01, 0.1, 10, scale_fn=hyperbola, scale_mode="iterations"),
    free("OneCycleLR", "one_cycle", 0.5, total_steps=300),
    free("OneCycleLR", "one_cycle", 0.5, total_steps=300, three_phase=True),
    free("OneCycleLR", "one_cycle", 0.5, total_steps=300, anneal_strategy="linear"),
    *[
        free("OneCycleLR", "one_cycle", 0.5, total_steps=n, pct_start=part, steps=n, **options)
        for n, part in ((97, 0.43), (100, 0.29), (20, 0.0), (20, 0.6), (20, 1.0), (2, 0.3))
        for options in ({"three_phase": True, "div_factor": 10.0}, {"final_div_factor": 3.0})
    ],
    swa(0.05, 0),
    swa(0.5, 100, anneal_epochs=50, anneal_strategy="linear"),
    swa(0.5, 30, anneal_epochs=0),
    swa(0.05, 100, lambda o: theirs.ExponentialLR(o, 0.99), ours.exponential(LR, 0.99)),
    sequential(
        [20],
        (ours.linear(LR, 0.01, total_iters=20), lambda o: theirs.LinearLR(o, 0.01, total_iters=20)),
        (ours.cosine_annealing(LR, 280, 0.001), lambda o: theirs.CosineAnnealingLR(o, 280, 0.001)),
    ),
    sequential(
        [10, 50, 50],
        (ours.constant(LR, 0.1, 20), lambda o: theirs.ConstantLR(o, 0.1, 20)),
        (ours.exponential(LR, 0.9), lambda o: theirs.ExponentialLR(o, 0.9)),
        (ours.step(LR, 3), lambda o: theirs.StepLR(o, 3)),
        (
            ours.cosine_annealing_warm_restarts(LR, 9, 2),
            lambda o: theirs.CosineAnnealingWarmRestarts(o, 9, 2),
        ),
    ),
    sequential([], (ours.polynomial(LR, 100, 2.0), lambda o: theirs.PolynomialLR(o, 100, 2.0))),
    chain(
        (ours.constant(1.0, 0.1, 20), lambda o: theirs.ConstantLR(o, 0.1, 20)),
        (ours.exponential(1.0, 0.99), lambda o: theirs.ExponentialLR(o, 0.99)),
    ),
    chain(
        (ours.linear(1.0, 0.5, 1.0, 50), lambda o: theirs.LinearLR(o, 0.5, 1.0, 50)),
        (ours.multi_step(1.0, [100, 200]), lambda o: theirs.MultiStepLR(o, [100, 200])),
        (ours.step(1.0, 40, 0.8), lambda o: theirs.StepLR(o, 40, 0.8)),
        (ours.polynomial(1.0, 290, 2.0), lambda o: theirs.PolynomialLR(o, 290, 2.0)),
        (ours.multiplicative(1.0, wobble, 300), lambda o: theirs.MultiplicativeLR(o, wobble)),
    ),
    chain(
        (ours.cosine_annealing(1.0, 300), lambda o: theirs.CosineAnnealingLR(o, 300)),
        (ours.exponential(1.0, 0.99), lambda o: theirs.ExponentialLR(o, 0.99)),
    ),
    by_epoch(same("StepLR", "step", 3), 7),
    by_epoch(same("LambdaLR", "lambda_lr", hyperbola), 1),
    by_epoch(same("CosineAnnealingLR", "cosine_annealing", 20, 0.01), 13),
    by_epoch(swa(0.5, 10, lambda o: theirs.StepLR(o, 4), ours.step(LR, 4), anneal_epochs=5), 20),
    by_epoch(
        sequential(
            [5],
            (
                ours.linear(LR, 0.1, total_iters=5),
                lambda o: theirs.LinearLR(o, 0.1, total_iters=5),
            ),
            (ours.exponential(LR, 0.9), lambda o: theirs.ExponentialLR(o, 0.9)),
        ),
        10,
    ),
]
TABLE = {f"{row.name}-{i}": row for i, row in enumerate(ROWS)}
each_row = pytest.mark.parametrize("name", TABLE)

NO_ROW = {
    "LRScheduler": "the base class",
    "_LRScheduler": "an older name of it",
    "ReduceLROnPlateau": "follows a metric, not the count",
}


def rate(optimizer):
    return optimizer.param_groups[0]["lr"]


def make_sgd():
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], LR, momentum=0.9)


def run_torch(make, steps, read=rate, optimizer=None):
    """What torch's optimizer uses in each of so many updates."""
    optimizer = optimizer or make_sgd()
    scheduler = make(optimizer)
    values = [read(optimizer)]
    for _ in range(1, steps):
        optimizer.step()
        scheduler.step()
        values.append(read(optimizer))
    return torch.tensor(values, dtype=torch.float64)


@cache
def expected(name: str) -> Tensor:
    return run_torch(TABLE[name].theirs, TABLE[name].steps)


def agree(got: Tensor, wanted: Tensor) -> None:
    close(got, wanted, rtol=1e-12, atol=1e-15)


# ------------------------------------------------------------------------------ torch's classes


def test_every_class_of_torch_has_a_row():
    classes = {
        name
        for name, thing in vars(theirs).items()
        if inspect.isclass(thing)
        and issubclass(thing, (theirs.LRScheduler, theirs.ReduceLROnPlateau))
    }
    assert len(classes) > 15
    assert classes | {"SWALR"} == {row.name for row in ROWS} | NO_ROW.keys()


@each_row
def test_equals_torch_count_by_count(name):
    values = [TABLE[name].ours(torch.tensor(i)) for i in range(TABLE[name].steps)]
    assert all(value.shape == () and value.dtype == torch.float64 for value in values)
    assert len(set(expected(name).tolist())) > 1, "torch's rate does not move"
    agree(torch.stack(values), expected(name))


@each_row
def test_equals_torch_under_vmap(name):
    counts = torch.arange(TABLE[name].steps)
    agree(vmap(TABLE[name].ours)(counts), expected(name))
    agree(TABLE[name].ours(counts), expected(name))


@each_row
def test_stays_on_the_device_of_the_count(name):
    assert TABLE[name].ours(torch.tensor(3, device="meta")).device.type == "meta"


@pytest.mark.slow
def test_one_compiled_training_step_computes_all_schedules(plain_backend, count_programs):
    """Rate and momentum cycle as under `CyclicLR`, and beside them runs every other schedule."""
    opt = optim.sgd(ours.cyclic(0.01, 0.1, 20), ours.cyclic_momentum(step_size_up=20))

    def step(count, state, params):
        updates, state = opt.update(tree.map(lambda w: (w + count).sin(), params), state, params)
        values = {name: row.ours(count) for name, row in TABLE.items()}
        return values, (count + 1, state, optim.apply_updates(params, updates))

    graphs = count_programs()
    compiled = jit(step)
    twin = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([twin], LR, momentum=0.9)
    scheduler = theirs.CyclicLR(optimizer, 0.01, 0.1, step_size_up=20)
    params = {"w": twin.detach().clone()}
    carry, found = (torch.tensor(0), opt.init(params), params), []
    for i in range(300):
        values, carry = compiled(*carry)
        found.append(values)
        twin.grad = (twin.detach() + i).sin()
        optimizer.step()
        scheduler.step()
        assert (twin - params["w"]).abs() > 1e-3
        close(carry[2]["w"], twin.detach())
    assert graphs.count == 1
    for name, values in tree.stack(found).items():
        agree(values[: TABLE[name].steps], expected(name))


def test_inductor_computes_the_same(count_programs):
    graphs = count_programs()
    compiled = jit(lambda count: {name: row.ours(count) for name, row in TABLE.items()})
    counts = [0, 1, 2, 5, 19, 20, 50, 97, 150, 299]
    values = tree.stack([compiled(torch.tensor(count)) for count in counts])
    assert graphs.count == 1
    for name, row in TABLE.items():
        known = [i for i, count in enumerate(counts) if count < row.steps]
        agree(values[name][known], expected(name)[[counts[i] for i in known]])


@pytest.mark.parametrize("name", ["StepLR", "CosineAnnealingLR", "OneCycleLR", "SequentialLR"])
def test_the_state_of_sgd_follows_the_scheduler(name):
    row = next(row for row in ROWS if row.name == name)
    optimizer = make_sgd()
    scheduler = row.theirs(optimizer)
    opt, params = optim.sgd(lr=row.ours), {"w": torch.ones(1)}
    state = opt.init(params)
    for _ in range(100):
        agree(optim.hyperparams(state)["lr"].item(), scheduler.get_last_lr()[0])
        _, state = opt.update(params, state, params)
        optimizer.step()
        scheduler.step()


def test_a_chained_schedule_is_the_product():
    """Torch's chain is another: a cosine with `eta_min` adds to what the exponential left."""
    counts = torch.arange(50)
    cosine, decay = ours.cosine_annealing(1.0, 50, 0.1), ours.exponential(1.0, 0.9)
    product = ours.chained(LR, cosine, decay)(counts)
    agree(product, LR * cosine(counts) * decay(counts))
    chained = run_torch(
        lambda o: theirs.ChainedScheduler(
            [theirs.CosineAnnealingLR(o, 50, 0.1 * LR), theirs.ExponentialLR(o, 0.9)]
        ),
        50,
    )
    assert (chained - product).abs().max() > 1e-3


# ------------------------------------------------------------------------------ momentum

CYCLES = [
    {"step_size_up": 20},
    {"step_size_up": 20, "step_size_down": 35, "mode": "triangular2"},
    {"step_size_up": 7, "mode": "exp_range", "gamma": 0.98},
    {"step_size_up": 7, "scale_fn": hyperbola, "scale_mode": "iterations"},
]
MOMENTA = [
    *[
        (
            ours.cyclic_momentum(0.7, 0.95, **cycle),
            lambda o, cycle=cycle: theirs.CyclicLR(
                o, 0.01, 0.1, base_momentum=0.7, max_momentum=0.95, **cycle
            ),
        )
        for cycle in CYCLES
    ],
    (ours.cyclic_momentum(), lambda o: theirs.CyclicLR(o, 0.01, 0.1)),
    (ours.one_cycle_momentum(300), lambda o: theirs.OneCycleLR(o, 0.1, 300)),
    *[
        (
            ours.one_cycle_momentum(300, 0.5, 0.9, 0.4, strategy, three_phase=three),
            lambda o, strategy=strategy, three=three: theirs.OneCycleLR(
                o,
                0.1,
                300,
                base_momentum=0.5,
                max_momentum=0.9,
                pct_start=0.4,
                anneal_strategy=strategy,
                three_phase=three,
            ),
        )
        for strategy in ("cos", "linear")
        for three in (False, True)
    ],
]


@pytest.mark.parametrize("make", ["SGD", "Adam"])
@pytest.mark.parametrize("schedule, scheduler", MOMENTA)
def test_momentum_cycles_as_in_torch(schedule, scheduler, make):
    def read(optimizer):
        (group,) = optimizer.param_groups
        return group["momentum"] if make == "SGD" else group["betas"][0]

    optimizer = make_sgd() if make == "SGD" else torch.optim.Adam([torch.zeros(1)], LR)
    wanted = run_torch(scheduler, 300, read, optimizer)
    assert wanted.max() - wanted.min() > 0.01
    agree(schedule(torch.arange(300)), wanted)
