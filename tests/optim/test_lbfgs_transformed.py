"""L-BFGS under vmap, grad and jit; what it leaves alone, and what it refuses."""

from functools import partial

import pytest
import torch
from torch.func import grad, vmap

import fdl
from fdl import losses, nn, optim, random, tree
from tests.support.asserts import close, draw, unchanged
from tests.support.lbfgs_problems import (
    SEARCH,
    begin,
    either_search,
    flat,
    logistic,
    quadratic,
    run,
    step,
)


def twice(kwargs, f=logistic):
    """Two updates as a function of parameters and rate, and all there is to show for them."""
    opt = optim.lbfgs(**kwargs)

    def take(params, lr):
        state = optim.with_hyperparams(opt.init(params), lr=lr)
        return run(partial(step, f, opt), params, state, 2)

    return take


def rate(value):
    return torch.tensor(value, dtype=torch.float64)


@either_search
def test_vmap_over_starts_and_rates_equals_separate_runs(kwargs):
    take = twice({"max_iter": 6, "history_size": 3} | kwargs)
    starts = [tree.map(lambda p, k=k: k * p, begin()) for k in (0.5, 1.0, -1.0, 2.0)]
    rates = [rate(lr) for lr in (1.0, 0.1, 0.5, 2.0)]
    together = vmap(take)(tree.stack(starts), torch.stack(rates))
    apart = [take(*pair) for pair in zip(starts, rates, strict=True)]
    assert tree.diff(tree.stack(apart), together, rtol=1e-7, atol=1e-9) == []
    evals = {int(state.func_evals) for _, state in apart}
    assert len(evals) > 1 or kwargs == {}, "the searches should differ"


@either_search
def test_vmap_stops_each_start_on_its_own(kwargs):
    opt = optim.lbfgs(max_iter=15, **kwargs)
    starts = {"x": torch.stack([torch.zeros(3).double(), draw(4, 3), 1e-3 * draw(5, 3)])}

    def f(p):
        squares = p["x"].square()
        return squares @ torch.tensor([1.0, 2.0, 4.0]).double() + squares.square().sum()

    together = vmap(lambda p: step(f, opt, p, opt.init(p)))(starts)
    apart = [step(f, opt, p, opt.init(p)) for p in tree.unstack(starts)]
    assert tree.diff(tree.stack(apart), together, rtol=1e-7, atol=1e-9) == []
    evals = together[1].func_evals
    assert evals[0] == 1 < evals[2] < evals[1] < 15


@either_search
def test_gradients_of_an_update_equal_finite_differences(kwargs):
    take = twice({"max_iter": 2} | kwargs)

    def end(params, lr):
        after, state = take(params, lr)
        return flat(after).sin().sum() + state.prev_loss + state.old_dirs.sum()

    start, direction, eps = begin(), tree.map(torch.cos, begin()), 1e-5
    inputs = (start, rate(0.3))
    slopes = grad(end, argnums=(0, 1))(*inputs)
    ahead, behind = (tree.map(lambda p, v, k=k: p + k * eps * v, start, direction) for k in (1, -1))
    along = sum(
        (g * v).sum() for g, v in zip(*map(tree.leaves, (slopes[0], direction)), strict=True)
    )
    expected = (end(ahead, inputs[1]) - end(behind, inputs[1])) / (2 * eps)
    close(along, expected, rtol=1e-6)
    expected = (end(start, rate(0.3 + eps)) - end(start, rate(0.3 - eps))) / (2 * eps)
    close(slopes[1], expected, rtol=1e-6)
    assert slopes[1].abs() > 1e-3 and along.abs() > 1e-3

    leaves = tree.map(lambda p: p.clone().requires_grad_(), inputs)
    end(*leaves).backward()
    close(tree.map(lambda p: p.grad, leaves), slopes)


def test_gradients_stay_finite_where_nothing_is_selected():
    """Of a start that is done at once, one whose pairs and brackets are degenerate, and an end.

    Another step of the last one's length would lead out of the domain of the root.
    """
    circle = twice(
        {"tolerance_change": 1.1, "max_iter": 3}, lambda p: -(1 - p["x"] ** 2).sqrt().sum()
    )
    begun = {"x": torch.tensor([0.9], dtype=torch.float64)}
    assert -0.2 < circle(begun, rate(1.0))[0]["x"] < 0.2
    assert grad(lambda p: circle(p, rate(1.0))[0]["x"].sum())(begun)["x"].isfinite()
    for f in (lambda p: p["x"].square().sum(), lambda p: p["x"].sum() * 1e-3):
        for kwargs in ({}, SEARCH):
            take = twice({"max_iter": 2} | kwargs, f)
            start = {"x": torch.zeros(3, dtype=torch.float64)}
            slopes = grad(lambda p, take=take: take(p, rate(1.0))[0]["x"].sum())(start)
            assert slopes["x"].isfinite().all()


@pytest.mark.slow
@either_search
def test_compiled_once_equals_eager(kwargs, plain_backend, count_programs):
    opt = optim.lbfgs(**{"max_iter": 3, "history_size": 4} | kwargs)
    take = partial(step, logistic, opt)
    graphs = count_programs()
    compiled = fdl.jit(take)
    got = expected = (begin(), opt.init(begin()))
    for lr in (1.0, 0.5, 0.7):
        got, expected = (
            (params, optim.with_hyperparams(state, lr=lr)) for params, state in (got, expected)
        )
        got, expected = compiled(*got), take(*expected)
        assert tree.diff(expected, got, rtol=1e-7, atol=1e-9) == []
    assert graphs.count == 1
    assert expected[1].n_iter >= 6 and expected[1].num_old == 4


@pytest.mark.slow
def test_compiled_gradients_equal_eager(plain_backend):
    take = twice({"max_iter": 1, "history_size": 2, **SEARCH})
    slopes = []
    for f in (take, fdl.jit(take)):
        inputs = tree.map(lambda p: p.clone().requires_grad_(), (begin(), rate(0.3)))
        flat(f(*inputs)[0]).sin().sum().backward()
        slopes.append(tree.map(lambda p: p.grad, inputs))
    close(slopes[1], slopes[0])


def regression():
    """Least squares, for which two updates are enough."""
    x, model = draw(7, 20, 3).float(), nn.linear(3, 1)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.7
    return fdl.supervised(model, losses.mse), model, (x, y)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_train_step_solves_a_regression(backend, request):
    if backend == "aot_eager":
        request.getfixturevalue("plain_backend")
    loss, model, batch = regression()
    opt = optim.lbfgs(max_iter=12, history_size=5, **({} if backend == "inductor" else SEARCH))
    state = fdl.TrainState.create(model, opt, key=random.key(0))
    step = fdl.train_step(loss, opt)
    step = step if backend == "eager" else fdl.jit(step)
    state, first = step(state, batch)
    state, metrics = step(state, batch)
    assert metrics["loss"].value < 1e-6 < first["loss"].value and state.opt_state.n_iter > 6
    close(state.params["weight"], torch.tensor([[1.0, -2.0, 0.5]]), rtol=1e-3)
    close(state.params["bias"], torch.tensor([0.7]), rtol=1e-3)


# ------------------------------------------------------------------------------ the rest


@either_search
def test_inputs_are_never_mutated(kwargs):
    opt, params = optim.lbfgs(max_iter=4, history_size=2, **kwargs), begin()
    state = opt.init(params)
    for _ in range(2):
        grads = grad(logistic)(params)
        with unchanged(params, grads, state):
            updates, new_state = opt.update(grads, state, params, value_fn=logistic)
        params, state = optim.apply_updates(params, updates), new_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_and_forms_stay(dtype):
    params = tree.cast(begin(), dtype)
    opt = optim.lbfgs(optim.schedules.step(1.0, 1, gamma=0.5), max_iter=3, **SEARCH)
    state = opt.init(params)
    for lr in (1.0, 0.5):
        close(optim.hyperparams(state)["lr"].item(), lr)
        after, new_state = step(lambda p: flat(p).square().sum(), opt, params, state)
        assert tree.diff(params, after, values=False) == []
        assert tree.diff(state, new_state, values=False) == []
        # With values of eight bits a search knows little of how far to go.
        far = 0.5 if dtype == torch.float32 else 0.6
        assert flat(after).norm() < far * flat(params).norm() or lr < 1
        params, state = after, new_state


def test_a_value_may_be_left_out_and_counts_once():
    opt, calls = optim.lbfgs(max_iter=2), []

    def counted(p):
        calls.append(p)
        return quadratic(p)

    params, grads = begin(), grad(quadratic)(begin())
    state = opt.init(params)
    without, one = opt.update(grads, state, params, value_fn=counted)
    given, two = opt.update(grads, state, params, value=quadratic(params), value_fn=counted)
    assert tree.diff((without, one), (given, two)) == []
    assert len(calls) == 3 and one.func_evals == 2


@either_search
def test_without_a_gradient_a_leaf_is_held(kwargs):
    """As if it were no parameter, though the state remembers it from before."""
    opt, params = optim.lbfgs(max_iter=3, **kwargs), begin()
    params, state = step(logistic, opt, params, opt.init(params))
    grads = grad(logistic)(params)
    grads["nested"]["kernel"] = None
    updates, state = opt.update(grads, state, params, value_fn=logistic)
    assert updates["nested"]["kernel"] is None and updates["vector"].abs().min() > 0
    assert state.d[-8:].count_nonzero() == 0 and state.old_stps[-1, -8:].count_nonzero() == 0

    kernel, fewer = (
        params["nested"]["kernel"],
        {
            "scalar": params["scalar"],
            "vector": params["vector"],
            "matrix": params["nested"]["matrix"],
        },
    )

    def held(p):
        nested = {"matrix": p["matrix"], "kernel": kernel}
        return logistic({"scalar": p["scalar"], "vector": p["vector"], "nested": nested})

    alone, _ = step(held, opt, fewer, opt.init(fewer))
    grads = grad(logistic)(params)
    grads["nested"]["kernel"] = None
    updates, _ = opt.update(grads, opt.init(params), params, value_fn=logistic)
    close(optim.apply_updates(params, updates)["nested"]["matrix"], alone["matrix"])


ERRORS = {
    r"lr must be finite and at least 0, got -1": {"lr": -1},
    r"max_iter must be an int of at least 1, got 0": {"max_iter": 0},
    r"max_eval must be an int of at least 1, got 0": {"max_eval": 0},
    r"history_size must be an int of at least 1, got 2\.5": {"history_size": 2.5},
    r"tolerance_grad must be at least 0, got -1": {"tolerance_grad": -1},
    r"tolerance_change must be at least 0, got nan": {"tolerance_change": float("nan")},
    r'line_search_fn must be "strong_wolfe" or None, got \'wolfe\'': {"line_search_fn": "wolfe"},
}


@pytest.mark.parametrize("message", ERRORS)
def test_a_value_out_of_range_raises_when_built(message):
    with pytest.raises(ValueError, match=f"^lbfgs: {message}"):
        optim.lbfgs(**ERRORS[message])


def test_what_cannot_be_minimised_raises():
    opt, params = optim.lbfgs(), begin()
    with pytest.raises(
        ValueError, match=r"lbfgs: update needs the loss as a function, .*value_fn="
    ):
        opt.update(params, opt.init(params), params)
    mixed = {"a": torch.zeros(1), "b": {"c": torch.zeros(1, dtype=torch.float64)}}
    with pytest.raises(
        ValueError, match=r"must share one floating dtype.*\n  a: float32\n  b\.c: float64"
    ):
        opt.init(mixed)
    with pytest.raises(ValueError, match=r"one floating dtype.*\n  n: int64"):
        opt.init({"n": torch.zeros(1, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"params must have at least one element, got none"):
        opt.init({})
    with pytest.raises(ValueError, match=r"lbfgs: grads: [^$]*vector: missing"):
        opt.update({"scalar": params["scalar"]}, opt.init(params), params, value_fn=logistic)
