"""L-BFGS against torch.optim.LBFGS in float64: steps, slots, counts.

Rounding grows in L-BFGS, torch's own included, so that two implementations part in the end wherever
the problem is not benign. Hence two comparisons: of every single update, both from the same state,
at 1e-10; and of whole runs, at 1e-10 on a quadratic, elsewhere at what torch loses itself when it
starts a rounding away.
"""

import copy
import inspect
import math
from functools import partial

import pytest
import torch

from fdl import optim, tree
from fdl.optim._line_search import Point, judge, start
from fdl.optim._torch_state import _lbfgs_from_torch, _lbfgs_to_torch
from tests.support.asserts import close, draw, equal_bits
from tests.support.lbfgs_problems import (
    SEARCH,
    begin,
    either_search,
    logistic,
    moved,
    quadratic,
    rosenbrock,
    step,
)

# Those of torch.testing._internal.common_optimizers.optim_inputs_func_lbfgs.
CONFIGS = {
    "default": {},
    "lr": {"lr": 0.01},
    "tensor_lr": {"lr": torch.tensor(0.001)},
    "tolerance_grad": {"tolerance_grad": 1e-6},
    "strong_wolfe": SEARCH,
    "maximize": {"maximize": True},
    "maximize_strong_wolfe": {"maximize": True, **SEARCH},
}
MORE = {
    "history": {"history_size": 3},
    "history_strong_wolfe": {"history_size": 3, **SEARCH},
    "one_pair": {"history_size": 1, "max_iter": 7, **SEARCH},
    "max_eval": {"max_eval": 7},
    "max_eval_strong_wolfe": {"max_eval": 7, **SEARCH},
    "one_iteration": {"max_iter": 1},
    "one_evaluation": {"max_eval": 1, **SEARCH},
}
if "maximize" not in inspect.signature(torch.optim.LBFGS).parameters:  # before torch 2.12
    CONFIGS = {name: kwargs for name, kwargs in CONFIGS.items() if "maximize" not in kwargs}
each_config = pytest.mark.parametrize("kwargs", CONFIGS.values(), ids=CONFIGS)

PROBLEMS = {"quadratic": quadratic, "rosenbrock": rosenbrock, "logistic": logistic}
each_problem = pytest.mark.parametrize("f", PROBLEMS.values(), ids=PROBLEMS)


def oriented(f, kwargs):
    return (lambda params: -f(params)) if kwargs.get("maximize") else f


def torch_step(f, kwargs, params, slots):
    """One step of torch as a pure function: (params, state of the first parameter) -> the same."""
    leaves = {path: p.clone().requires_grad_() for path, p in tree.flatten_dict(params).items()}
    optimizer = torch.optim.LBFGS(leaves.values(), **kwargs)
    first = next(iter(leaves.values()))
    optimizer.state[first] = copy.deepcopy(slots)

    def closure():
        optimizer.zero_grad()
        loss = f(tree.unflatten_dict(leaves))
        loss.backward()
        return loss

    optimizer.step(closure)
    return tree.map(torch.Tensor.detach, tree.unflatten_dict(leaves)), dict(optimizer.state[first])


SLOTS = ("d", "t", "old_dirs", "old_stps", "ro", "H_diag", "prev_flat_grad", "prev_loss")


def same_slots(state, slots):
    expected = _lbfgs_from_torch(slots, tree.map(torch.zeros_like, state))
    for name in ("n_iter", "func_evals", "num_old"):
        assert getattr(state, name) == getattr(expected, name), name
    for name in SLOTS:
        got, wanted = getattr(state, name), getattr(expected, name)
        close(got, wanted, rtol=1e-6, atol=1e-6 * wanted.abs().max().item() + 1e-12)


# ------------------------------------------------------------------------------ against torch


@pytest.mark.slow
@each_problem
@pytest.mark.parametrize("kwargs", [*CONFIGS.values(), *MORE.values()], ids=[*CONFIGS, *MORE])
def test_every_update_equals_torch(f, kwargs):
    rtol = 1e-8 if f is rosenbrock and "line_search_fn" not in kwargs else 1e-10
    f = oriented(f, kwargs)
    opt, params, slots = optim.lbfgs(**kwargs), begin(), {}
    for _ in range(8):
        state = _lbfgs_from_torch(slots, opt.init(params))
        got, state = step(f, opt, params, state)
        expected, slots = torch_step(f, kwargs, params, slots)
        assert moved(got, expected) <= rtol * moved(expected, params)
        same_slots(state, slots)
        params = expected
    assert moved(params, begin()) > 0.01


@pytest.mark.slow
@each_problem
@each_config
def test_a_run_parts_from_torch_no_sooner_than_torch_from_itself(f, kwargs):
    benign, f = f is quadratic, oriented(f, kwargs)
    opt, takes = optim.lbfgs(**kwargs), partial(torch_step, f, kwargs)
    nudged = [
        tree.map(lambda p, s=s: p * (1 + 2.3e-16 * draw(s, *p.shape).sign()), begin())
        for s in (31, 32, 33)
    ]
    twins = [(params, {}) for params in (begin(), *nudged)]
    params, state, spread = begin(), opt.init(begin()), 0.0
    for _ in range(20):
        params, state = step(f, opt, params, state)
        twins = [takes(*twin) for twin in twins]
        (expected, slots), far = twins[0], moved(twins[0][0], begin())
        spread = max([spread, *(moved(twin, expected) / far for twin, _ in twins)])
        if spread > 1e-7:  # torch has lost its own way
            assert not benign
            break
        assert moved(params, expected) / far <= max(1e-10, 30 * spread)
        assert (state.n_iter, state.func_evals) == (slots["n_iter"], slots["func_evals"])


def wavy(seed):
    """A function with hills and dales, whose searches meet every case."""
    waves, phases, heights = draw(3 * seed, 6, 3), draw(3 * seed + 1, 6), draw(3 * seed + 2, 6)
    return lambda p: heights @ torch.sin(2 * waves @ p["x"] + phases) + p["x"].square().sum() / 10


@pytest.mark.slow
@pytest.mark.parametrize("lr", [1e-3, 0.3, 5.0, 50.0])
@pytest.mark.parametrize("max_eval", [1, 2, 3, 4, 7, 12])
def test_searches_of_every_shape_equal_torch(max_eval, lr):
    kwargs = {"lr": lr, "max_iter": 3, "max_eval": max_eval, "tolerance_change": 1e-3, **SEARCH}
    opt, compared = optim.lbfgs(**kwargs), 0
    for seed in range(40, 52):
        f, params, slots = wavy(seed), {"x": draw(seed, 3)}, {}
        for _ in range(4):
            nudged = {"x": params["x"] * (1 + 2.3e-16)}
            expected, new_slots = torch_step(f, kwargs, params, slots)
            other, _ = torch_step(f, kwargs, nudged, slots)
            if moved(other, expected) < 1e-12:  # else rounding decides
                got, state = step(f, opt, params, _lbfgs_from_torch(slots, opt.init(params)))
                assert moved(got, expected) < 1e-9
                same_slots(state, new_slots)
                compared += 1
            params, slots = expected, new_slots
    assert compared > 30


@pytest.mark.slow
def test_a_search_equals_torch_until_it_leaves_the_domain_and_stays_in_it():
    """Where a value is NaN torch goes there; here it counts as too high."""
    waves, compared, left = draw(60, 3, 3), 0, 0
    kwargs = {"lr": 1.0, "max_iter": 5, "max_eval": 4, **SEARCH}
    opt = optim.lbfgs(**kwargs)
    seen = []

    def f(p):
        value = 1.5 * p["x"].sum() - p["x"].log().sum() + 0.1 * torch.sin(3 * waves @ p["x"]).sum()
        seen.append(bool(value.isfinite()))
        return value

    for seed in range(60, 100):
        params, slots = {"x": draw(seed, 3).abs() + 0.05}, {}
        for _ in range(3):
            seen.clear()
            try:
                expected, new_slots = torch_step(f, kwargs, params, slots)
            except IndexError:  # where torch looks for the second of one trial
                break
            got, state = step(f, opt, params, _lbfgs_from_torch(slots, opt.init(params)))
            assert f(got).isfinite()
            if not all(seen):
                left += 1
                break
            assert moved(got, expected) < 1e-9
            same_slots(state, new_slots)
            params, slots, compared = expected, new_slots, compared + 1
    assert compared > 20 and left > 5


DOMAINS = {  # the function, the least value
    "root": (lambda w: (w * w.sqrt() - w).sum(), -4 / 27 * 3),
    "logarithm": (lambda w: (w - w.log()).sum(), 3.0),
    "power": (lambda w: (w**1.5 + 1 / w.sqrt()).sum(), 3 * (3**-0.75 + 3**0.25)),
    "barrier": (lambda w: -(w - 1).log().sum() - (5 - w).log().sum(), -6 * math.log(2)),
    "entropy": (lambda w: (w * w.log()).sum(), -3 / math.e),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DOMAINS)
def test_a_search_finds_the_minimum_of_a_function_with_a_domain(name):
    f, least = DOMAINS[name]
    opt = optim.lbfgs(max_iter=50, line_search_fn="strong_wolfe")
    for seed in range(20):
        low, high = (1.0, 5.0) if name == "barrier" else (0.0, 20.0)
        start = low + (high - low) * draw(seed, 3).sigmoid()
        params, value_fn = {"w": start}, lambda p: f(p["w"])
        state = opt.init(params)
        for _ in range(3):
            params, state = step(value_fn, opt, params, state)
            assert torch.isfinite(params["w"]).all(), (seed, params)
        close(value_fn(params), torch.tensor(least).double(), rtol=1e-6)


def test_one_update_from_9_reaches_the_minimum_or_stays_in_the_domain():
    opt, params = optim.lbfgs(line_search_fn="strong_wolfe"), {"w": torch.tensor([9.0]).double()}
    params, _ = step(
        lambda p: (p["w"] * p["w"].sqrt() - p["w"]).sum(), opt, params, opt.init(params)
    )
    close(params["w"], torch.tensor([4 / 9]).double(), rtol=1e-4)


@pytest.mark.parametrize("start", [math.nan, -1.0])
def test_from_outside_of_the_domain_the_parameters_stay(start):
    opt, params = optim.lbfgs(line_search_fn="strong_wolfe"), {"w": torch.tensor([start, 4.0])}
    after, _ = step(lambda p: (p["w"] * p["w"].sqrt()).sum(), opt, params, opt.init(params))
    assert equal_bits(after["w"], params["w"])


def test_a_straight_line_is_followed_as_far_as_allowed():
    """In numbers without rounding, since the cubic has no curvature to divide by."""
    kwargs = {"max_eval": 4, **SEARCH}
    begun, slope = {"x": torch.zeros(2, dtype=torch.float64)}, torch.tensor([-0.5, 0.25]).double()
    opt = optim.lbfgs(**kwargs)
    after, state = step(lambda p: slope @ p["x"], opt, begun, opt.init(begun))
    expected, _ = torch_step(lambda p: slope @ p["x"], kwargs, begun, {})
    assert torch.equal(after["x"], expected["x"]) and state.t == 1000


def test_what_a_search_accepts():
    """The edges that no run is likely to meet, from an origin of value 0 and slope −1."""

    def number(x):
        return torch.tensor(x, dtype=torch.float64)

    def judged(search, t, f, slope):
        new = Point(number(t), number(f), number(slope), torch.zeros(1))
        no = torch.tensor(False)
        search, ended, best, _ = judge(search, new, width=number(1.0), last=no)
        return search, bool(ended), float(best.t)

    fresh = start(number(0.0), number(-1.0), torch.zeros(1))
    assert judged(fresh, 1.0, -1.1e-4, 0.0)[1:] == (True, 1.0)  # sufficient decrease
    assert not judged(fresh, 1.0, -0.9e-4, 0.0)[1]
    assert judged(fresh, 1.0, -0.5, -0.89)[1] and judged(fresh, 1.0, -0.5, 0.89)[1]  # curvature
    assert not judged(fresh, 1.0, -0.5, -0.91)[1] and not judged(fresh, 1.0, -0.5, 0.91)[1]
    once, *_ = judged(fresh, 1.0, -0.5, -0.95)
    assert judged(once, 2.0, -0.4, 0.5)[1:] == (True, 2.0)  # torch lets the second trial rise
    twice, *_ = judged(once, 2.0, -0.6, -0.95)
    assert not judged(twice, 3.0, -0.5, 0.5)[1]
    tied, *_ = judged(fresh, 1.0, 0.0, 1.0)
    assert tied.zooming and not tied.low_is_b
    lower, *_ = judged(fresh, 1.0, -1e-5, 1.0)
    assert lower.zooming and lower.low_is_b


def test_a_tolerance_ends_an_update():
    minimum = {"x": torch.zeros(3, dtype=torch.float64)}
    opt = optim.lbfgs()
    after, state = step(lambda p: p["x"].square().sum(), opt, minimum, opt.init(minimum))
    assert tree.diff(after, minimum) == []
    assert tree.diff(opt.init(minimum)[1:], state[1:]) == ["9: 1 of 1 values differ, by at most 1"]
    opt.update(minimum, state, minimum, value=minimum["x"].sum(), value_fn=pytest.fail)  # unasked
    steep = {"lr": 0.005, "tolerance_change": 0.01}  # the value changes by much more
    expected, slots = torch_step(lambda p: 1000 * quadratic(p), steep, begin(), {})
    opt = optim.lbfgs(**steep)
    _, state = step(lambda p: 1000 * quadratic(p), opt, begin(), opt.init(begin()))
    assert state.n_iter == slots["n_iter"] == 1
    for kwargs in ({"tolerance_grad": 0.5}, {"tolerance_change": 0.01}):
        kwargs = kwargs | {"lr": 0.1, "max_iter": 100}
        opt = optim.lbfgs(**kwargs)
        after, state = step(quadratic, opt, begin(), opt.init(begin()))
        expected, slots = torch_step(quadratic, kwargs, begin(), {})
        assert 2 < state.n_iter == slots["n_iter"] < 60
        assert moved(after, expected) < 1e-10
    assert torch.func.grad(quadratic)(after)["scalar"].abs() > 1e-3


@either_search
def test_without_progress_only_the_memory_changes(kwargs):
    """The gradient is above its tolerance, but the slope, its square, is not."""
    f, begun = (lambda p: 1e-6 * p["x"].sum()), {"x": draw(1, 3)}
    opt = optim.lbfgs(**kwargs)
    params, state, slots = begun, opt.init(begun), {}
    for call in range(1, 4):
        params, state = step(f, opt, params, state)
        _, slots = torch_step(f, kwargs, begun, slots)
        assert tree.diff(params, begun) == []
        assert state.n_iter == state.func_evals == call
        same_slots(state, slots)


def test_rosenbrock_in_two_dimensions_is_solved_in_one_update():
    begun = {"x": torch.tensor([-1.2, 1.0], dtype=torch.float64)}
    opt = optim.lbfgs(max_iter=100, tolerance_change=1e-16, **SEARCH)
    after, state = step(rosenbrock, opt, begun, opt.init(begun))
    close(after["x"], torch.ones(2, dtype=torch.float64), rtol=1e-7)
    assert 30 < state.num_old < state.n_iter < state.func_evals < 60


@pytest.mark.slow
@pytest.mark.parametrize("order", ["torch first", "ours first"])
@pytest.mark.parametrize("kwargs", [SEARCH, {"history_size": 3, "max_iter": 2}, {"lr": 0.01}])
def test_a_run_may_change_hands(kwargs, order):
    f, opt = quadratic, optim.lbfgs(**kwargs)
    theirs, ours = partial(torch_step, f, kwargs), partial(step, f, opt)
    like, expected, params = opt.init(begin()), begin(), begin()
    slots, state, reference = {}, like, {}
    for turn in range(3):
        for _ in range(10):
            expected, reference = theirs(expected, reference)
        if (turn % 2 == 0) == (order == "torch first"):
            slots = _lbfgs_to_torch(state)
            for _ in range(10):
                params, slots = theirs(params, slots)
            state = _lbfgs_from_torch(slots, like)
            again = _lbfgs_to_torch(state)
            for name in again:
                pairs = zip(
                    *(x[name] if isinstance(x[name], list) else [x[name]] for x in (slots, again)),
                    strict=True,
                )
                for one, other in pairs:
                    assert equal_bits(
                        *(torch.as_tensor(x, dtype=torch.float64) for x in (one, other))
                    )
        else:
            for _ in range(10):
                params, state = ours(params, state)
            back = _lbfgs_from_torch(_lbfgs_to_torch(state), like)
            for one, other in zip(tree.leaves(state[1:]), tree.leaves(back[1:]), strict=True):
                assert equal_bits(one, other)
    assert moved(params, expected) <= 1e-10 * moved(expected, begin())
    assert state.num_old == len(reference["ro"]) and state.n_iter == reference["n_iter"]


def test_a_state_of_torch_that_does_not_fit_raises():
    _, slots = torch_step(quadratic, {"max_iter": 5}, begin(), {})
    with pytest.raises(ValueError, match=r"history_size must be at least 4, the pairs .* got 2"):
        _lbfgs_from_torch(slots, optim.lbfgs(history_size=2).init(begin()))
    with pytest.raises(ValueError, match=r"must have 3 elements like params, got 18"):
        _lbfgs_from_torch(slots, optim.lbfgs().init({"x": torch.zeros(3)}))
