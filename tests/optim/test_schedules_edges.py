"""Schedules where torch's schedulers end: held values, far counts, warm-ups, errors."""

import inspect
import math

import pytest
import torch

from fdl.optim import schedules as ours
from tests.support.asserts import close
from tests.support.jax import x64

LR = 0.1


def agree(got, wanted):
    close(got, wanted, rtol=1e-12, atol=1e-15)


def hyperbola(t):
    return 1 / (1 + 0.1 * t)


def test_constant_and_no_milestones_are_the_number():
    for schedule in (ours.constant(0.1), ours.multi_step(0.1, [])):
        assert schedule(torch.arange(3)).tolist() == [0.1] * 3


def test_one_cycle_holds_its_last_value():
    long_fall = ours.one_cycle(0.5, 20, pct_start=0.6, three_phase=True)
    for schedule in (ours.one_cycle(0.5, 20), ours.one_cycle_momentum(20), long_fall):
        last, *later = schedule(torch.tensor([19, 20, 21, 1000])).tolist()
        assert later == [last] * 3
    assert ours.one_cycle(0.5, 20)(torch.tensor(19)).item() == pytest.approx(0.5 / 25e4)


def test_multiplicative_holds_its_last_value():
    bounded = ours.multiplicative(LR, hyperbola, total_iters=50)(torch.arange(100))
    free = ours.multiplicative(LR, hyperbola, total_iters=100)(torch.arange(100))
    agree(bounded[:51], free[:51])
    assert bounded[50:].tolist() == [bounded[50].item()] * 50


@pytest.mark.parametrize("T_0", [1, 3, 7, 1000])
@pytest.mark.parametrize("T_mult", [2, 3, 10])
def test_warm_restarts_are_exact_far_out(T_0, T_mult):
    """The restarts by integer arithmetic, up to 10¹² updates: no count is on the wrong side."""
    schedule = ours.cosine_annealing_warm_restarts(1.0, T_0, T_mult)
    start, length = 0, T_0
    while start < 10**12:
        assert schedule(torch.tensor(start)).item() == pytest.approx(1.0, abs=1e-12)
        before_the_next = (1 + math.cos(math.pi * (length - 1) / length)) / 2
        last = schedule(torch.tensor(start + length - 1)).item()
        assert last == pytest.approx(before_the_next, abs=1e-12)
        start, length = start + length, length * T_mult


def warmup_cosine(t, warmup, total, end):
    if t < warmup:
        return LR * t / warmup
    x = min(1, (t - warmup) / (total - warmup))
    return end + (LR - end) * (1 + math.cos(math.pi * x)) / 2


def warmup_stable_decay(t, warmup, stable, decay, end):
    if t < warmup + stable:
        return LR * min(1, t / max(warmup, 1) if warmup else 1)
    x = min(1, (t - warmup - stable) / decay)
    return LR * (1 - x) + end * x


@pytest.mark.parametrize(
    "formula, args",
    [
        (warmup_cosine, (10, 250, 0.001)),
        (warmup_cosine, (0, 300, 0.0)),
        (warmup_stable_decay, (10, 100, 150, 0.001)),
        (warmup_stable_decay, (0, 0, 300, 0.0)),
        (warmup_stable_decay, (50, 0, 1, 0.0)),
    ],
)
def test_warm_ups_equal_their_formulas(formula, args):
    schedule = getattr(ours, formula.__name__)(LR, *args)
    wanted = torch.tensor([formula(t, *args) for t in range(300)], dtype=torch.float64)
    agree(schedule(torch.arange(300)), wanted)
    jump = ours.warmup_stable_decay(LR, 0, 5, 0, 0.01)
    assert jump(torch.tensor([4, 5, 6])).tolist() == [LR, 0.01, 0.01]


def test_warm_ups_equal_optax():
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    with x64():
        counts = jax.numpy.arange(300)
        cosine = optax.warmup_cosine_decay_schedule(0.0, LR, 30, 250, 0.01)(counts)
        trapezoid = optax.join_schedules(
            [
                optax.linear_schedule(0.0, LR, 30),
                optax.constant_schedule(LR),
                optax.linear_schedule(LR, 0.01, 120),
            ],
            [30, 130],
        )(counts)
    wanted = torch.tensor([cosine.tolist(), trapezoid.tolist()], dtype=torch.float64)
    agree(ours.warmup_cosine(LR, 30, 250, 0.01)(torch.arange(300)), wanted[0])
    agree(ours.warmup_stable_decay(LR, 30, 100, 120, 0.01)(torch.arange(300)), wanted[1])


def test_a_schedule_may_return_a_number():
    joined = ours.join([lambda count: 0.5, ours.chained(2.0, lambda count: 3)], [4])
    assert joined(torch.arange(3, 6)).tolist() == [0.5, 6.0, 6.0]
    assert ours.chained(2.0, lambda count: 3)(torch.tensor(0)).dtype == torch.float64


def test_lists_are_copied():
    milestones = [3]
    schedules = [ours.multi_step(1.0, milestones), ours.join([ours.constant(1.0)] * 2, milestones)]
    before = [schedule(torch.arange(9)) for schedule in schedules]
    milestones.append(0)
    agree([schedule(torch.arange(9)) for schedule in schedules], before)


# ------------------------------------------------------------------------------ errors

REQUIRED = {
    "constant": (),
    "lambda_lr": (hyperbola,),
    "multiplicative": (hyperbola, 5),
    "step": (5,),
    "multi_step": ([5],),
    "linear": (),
    "exponential": (0.9,),
    "polynomial": (),
    "cosine_annealing": (5,),
    "cosine_annealing_warm_restarts": (5,),
    "cyclic": (0.1,),
    "cyclic_momentum": (),
    "one_cycle": (5,),
    "swa_anneal": (0.1, 5),
    "warmup_cosine": (5, 9),
    "warmup_stable_decay": (5, 5, 5),
    "chained": (ours.constant(1.0),),
}


@pytest.mark.parametrize(
    "value, rule",
    [
        (-0.1, "must be finite and at least 0, got -0.1"),
        (math.nan, "must be finite and at least 0, got nan"),
        (math.inf, "must be finite and at least 0, got inf"),
        ("0.1", "must be finite and at least 0, got '0.1'"),
        (torch.ones(2), r"must be a number or a 0-d tensor, got \[2\]"),
    ],
)
@pytest.mark.parametrize("name", REQUIRED)
def test_a_value_out_of_range_is_refused(name, value, rule):
    function = getattr(ours, name)
    argument = next(iter(inspect.signature(function).parameters))
    function(0.1, *REQUIRED[name])
    with pytest.raises(ValueError, match=rf"^schedules\.{name}: {argument} {rule}$"):
        function(value, *REQUIRED[name])


INT = "must be an int, got "
ERRORS = [
    ("constant", (0.1, -0.5), "factor must be finite and at least 0, got -0.5"),
    ("constant", (0.1, 0.5, -1), "total_iters must be at least 0, got -1"),
    ("lambda_lr", (0.1, 0.5), "factor must be callable, got 0.5"),
    ("multiplicative", (0.1, 0.5, 10), "factor must be callable, got 0.5"),
    ("multiplicative", (0.1, hyperbola, 0), "total_iters must be at least 1, got 0"),
    ("multiplicative", (0.1, hyperbola, 2.0), f"total_iters {INT}2.0"),
    ("step", (0.1, 0), "step_size must be at least 1, got 0"),
    ("step", (0.1, 30.0), f"step_size {INT}30.0"),
    ("step", (0.1, True), f"step_size {INT}True"),
    ("step", (0.1, 3, math.inf), "gamma must be finite and at least 0, got inf"),
    ("multi_step", (0.1, [5, 3]), r"milestones must be in ascending order, got \[5, 3\]"),
    ("multi_step", (0.1, [-1, 3]), "milestones must be at least 0, got -1"),
    ("multi_step", (0.1, [3.5]), f"milestones {INT}3.5"),
    ("multi_step", (0.1, [3], math.nan), "gamma must be finite and at least 0, got nan"),
    ("linear", (0.1, -1.0), "start_factor must be finite and at least 0, got -1.0"),
    ("linear", (0.1, 1.0, math.inf), "end_factor must be finite and at least 0, got inf"),
    ("linear", (0.1, 1.0, 1.0, 0), "total_iters must be at least 1, got 0"),
    ("exponential", (0.1, math.nan), "gamma must be finite and at least 0, got nan"),
    ("polynomial", (0.1, 0), "total_iters must be at least 1, got 0"),
    ("polynomial", (0.1, 5, -1.0), "power must be finite and at least 0, got -1.0"),
    ("cosine_annealing", (0.1, 0), "T_max must be at least 1, got 0"),
    ("cosine_annealing", (0.1, 5, -1), "eta_min must be finite and at least 0, got -1"),
    ("cosine_annealing_warm_restarts", (0.1, 0), "T_0 must be at least 1, got 0"),
    ("cosine_annealing_warm_restarts", (0.1, 5, 1.5), f"T_mult {INT}1.5"),
    ("cyclic", (0.1, -1.0), "max_lr must be finite and at least 0, got -1.0"),
    ("cyclic", (0.1, 0.2, 0), "step_size_up must be at least 1, got 0"),
    ("cyclic", (0.1, 0.2, 5, -1), "step_size_down must be at least 0, got -1"),
    ("cyclic", (0.1, 0.2, 5, 5, "square"), r"mode must be one of \['triang.*, got 'square'"),
    ("cyclic", (0.1, 0.2, 5, 5, "exp_range", -1), "gamma must be finite and at least 0, got -1"),
    ("cyclic_momentum", (0.1, 0.2, 5, 5, "", 1.0, 0.5), "scale_fn must be callable, got 0.5"),
    (
        "cyclic_momentum",
        (0.1, 0.2, 5, 5, "", 1.0, hyperbola, "step"),
        r"scale_mode must be one of \['cycle', 'iterations'\], got 'step'",
    ),
    ("one_cycle", (0.1, 0), "total_steps must be at least 1, got 0"),
    ("one_cycle", (0.1, 9, 1.5), r"pct_start must be in \[0, 1\], got 1.5"),
    ("one_cycle", (0.1, 9, 0.3, "sin"), r"anneal_strategy must be one of .*, got 'sin'"),
    ("one_cycle", (0.1, 9, 0.3, "cos", 0.0), "div_factor must be above 0, got 0.0"),
    (
        "one_cycle",
        (0.1, 9, 0.3, "cos", 1.0, math.inf),
        "final_div_factor must be finite and at least 0, got inf",
    ),
    ("one_cycle_momentum", (9.0,), f"total_steps {INT}9.0"),
    ("one_cycle_momentum", (9, -0.1), "base_momentum must be finite and at least 0, got -0.1"),
    ("swa_anneal", (0.1, -1, 5), "swa_lr must be finite and at least 0, got -1"),
    ("swa_anneal", (0.1, 0.1, -1), "swa_start must be at least 0, got -1"),
    ("swa_anneal", (0.1, 0.1, 5, 2.5), f"anneal_epochs {INT}2.5"),
    ("swa_anneal", (0.1, 0.1, 5, 2, "sin"), "anneal_strategy must be one of .*, got 'sin'"),
    ("warmup_cosine", (0.1, -1, 5), "warmup must be at least 0, got -1"),
    ("warmup_cosine", (0.1, 5, 5), "total must be at least 6, got 5"),
    ("warmup_cosine", (0.1, 5, 9, -1), "end must be finite and at least 0, got -1"),
    ("warmup_stable_decay", (0.1, 1, 2.0, 3), f"stable {INT}2.0"),
    ("warmup_stable_decay", (0.1, 1, 2, -3), "decay must be at least 0, got -3"),
    ("by_epoch", (0.1, 5), "schedule must be callable, got 0.1"),
    ("by_epoch", (hyperbola, 0), "steps_per_epoch must be at least 1, got 0"),
    ("by_epoch", (hyperbola, 2.5), f"steps_per_epoch {INT}2.5"),
    ("join", ([], []), "milestones must be one fewer than schedules, got 0 for 0"),
    ("join", ([hyperbola], [3]), "milestones must be one fewer than schedules, got 1 for 1"),
    ("join", ([hyperbola, 0.1], [3]), "schedules must be callable, got 0.1"),
    ("join", ([hyperbola] * 3, [3, 2]), r"milestones must be in ascending order, got \[3, 2\]"),
    ("chained", (0.1,), "factors must be at least one schedule, got none"),
    ("chained", (0.1, 0.5), "factors must be callable, got 0.5"),
]


@pytest.mark.parametrize(
    "name, args, rule", ERRORS, ids=[f"{e[0]}-{i}" for i, e in enumerate(ERRORS)]
)
def test_what_is_out_of_range_is_refused(name, args, rule):
    with pytest.raises(ValueError, match=rf"^schedules\.{name}: {rule}$"):
        getattr(ours, name)(*args)


def test_every_schedule_has_its_errors_tested():
    assert set(ours.__all__) == {name for name, *_ in ERRORS}
