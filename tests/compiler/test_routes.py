"""Programs of jitted functions: how often they are compiled, what they keep, their fallbacks."""

import gc
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import fdl
from fdl import data, jit, losses, nn, optim, random, scan, tree
from fdl._compiler import _inductor
from fdl._compiler._graph import LOOP
from tests.support.asserts import assert_equal, unchanged

# ------------------------------------------------------------------- Proof 4: compiles only once

DATASET = tree.cast(
    data.synthetic_linear(random.key(1), [2.0, -3.4], 4.2, n=50, noise=0.01), torch.float64
)

pytestmark = pytest.mark.usefixtures("real_loops")


def training(opt: optim.Optimizer) -> tuple[fdl.TrainState, Callable[..., Any]]:
    model = nn.sequential(nn.linear(2, 4), nn.tanh, nn.linear(4, 1))
    state = fdl.TrainState.create(model, opt, key=random.key(0))
    params = tree.cast(state.params, torch.float64)
    state = state._replace(params=params, opt_state=opt.init(params))
    step = fdl.train_step(fdl.supervised(model, losses.mse), opt)

    def epoch(state: fdl.TrainState, dataset: Any, indices: Any) -> Any:
        return scan(lambda s, row: step(s, data.batch(dataset, row)), state, indices)

    return state, epoch


OPTIMIZERS = {
    "momentum": lambda: optim.sgd(0.1, momentum=0.9, weight_decay=0.01),
    "schedule": lambda: optim.sgd(
        optim.schedules.step(0.1, step_size=4), momentum=0.9, nesterov=True
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, donate", [("momentum", ()), ("schedule", (0,))], ids=["kept", "donated"]
)
def test_a_run_compiles_once(name: str, donate: Any, plain_backend: None, count_programs) -> None:
    state, epoch = training(OPTIMIZERS[name]())
    compiled, graphs, expected = (
        jit(epoch, donate_argnums=donate),
        count_programs(),
        tree.map(torch.clone, state),
    )
    for e in range(4):
        dataset = tree.map(lambda leaf, e=e: leaf + 0.1 * e, DATASET)
        indices = data.epoch_indices(random.fold_in(random.key(3), e), 50, 8)
        if name == "momentum":  # the rate is set from outside, else it follows a schedule
            new = optim.with_hyperparams(state.opt_state, lr=0.1 / (e + 1))
            expected = expected._replace(opt_state=tree.map(torch.clone, new))
            state = state._replace(opt_state=new)
        given, before = state, tree.map(torch.clone, state)
        state, _ = compiled(state, dataset, indices)
        expected, _ = epoch(expected, dataset, indices)
        if not donate:
            assert not tree.diff(before, given)  # bit for bit what it was
    assert graphs.count == 1
    assert_equal(state, expected, rtol=1e-10)
    assert state.step == 28


def test_another_signature_compiles_again(plain_backend: None, count_programs) -> None:
    fn, graphs = jit(lambda x: x * 2), count_programs()
    for x in (torch.ones(2), torch.ones(3), torch.ones(2).double(), torch.ones(4)[::2]):
        fn(x), fn(x + 1)
    # x + 1 of the strided one is contiguous, so that it shares the first program.
    assert graphs.count == 4


@pytest.mark.slow
def test_populations_equal_their_members_trained_alone(plain_backend: None) -> None:
    indices = data.epoch_indices(random.key(3), 50, 8)
    rates = torch.tensor([0.01, 0.05, 0.2], dtype=torch.float64)
    base, epoch = training(optim.sgd(0.1, momentum=0.9))
    states = [
        base._replace(opt_state=optim.with_hyperparams(base.opt_state, lr=rate)) for rate in rates
    ]
    model = nn.sequential(nn.linear(2, 4), nn.tanh, nn.linear(4, 1))
    step = fdl.train_step(fdl.supervised(model, losses.mse), optim.sgd(0.1, momentum=0.9))

    @jit
    def population(states: Any, dataset: Any, indices: Any) -> Any:
        return scan(
            lambda s, row: vmap(step, (0, None))(s, data.batch(dataset, row)), states, indices
        )

    got, metrics = population(tree.stack(states), DATASET, indices)
    for member, state in zip(tree.unstack(got), states, strict=True):
        assert_equal(member, epoch(state, DATASET, indices)[0], rtol=1e-10)
    assert metrics["loss"].total.shape == (7, 3)
    weights = got.params["0"]["weight"]
    assert (weights[0] - weights[2]).abs().max() > 1e-3  # the rates told


def test_twenty_functions_and_twenty_shapes_live_together(
    plain_backend: None, count_programs
) -> None:
    def factory(n: int) -> Any:
        return jit(lambda x: scan(lambda c, z: (c + n * z, c * z), x[0], x))

    functions = [factory(n) for n in range(20)]
    for _ in range(2):
        for n, fn in enumerate(functions):
            x = torch.arange(3.0)
            assert fn(x)[0] == n * 3 and fn(x)[1].tolist() == [0, 0, n * 2]
    assert [len(fn.report()) for fn in functions] == [1] * 20
    fn, graphs = functions[1], count_programs()
    for _ in range(2):
        for size in range(1, 21):
            assert fn(torch.ones(size))[0] == 1 + size
    assert graphs.count == 19 and len(fn.report()) == 20  # size 3 was there


@pytest.mark.slow
def test_functions_that_take_turns_do_not_disturb_each_other(plain_backend: None) -> None:
    """With the same code, with donation, and with swapped states."""
    first, epoch = training(optim.sgd(0.1, momentum=0.9))
    second, other = training(optim.adam(0.05))
    runs = [jit(epoch, donate_argnums=0), jit(other, donate_argnums=0), jit(epoch)]
    states: list[Any] = [tree.map(torch.clone, s) for s in (first, second, first)]
    expected: list[Any] = [first, second, first]
    for e in range(3):
        rows = data.epoch_indices(random.fold_in(random.key(3), e), 50, 8)
        for i, (run, eager) in enumerate(zip(runs, (epoch, other, epoch), strict=True)):
            states[i], _ = run(states[i], DATASET, rows)
            expected[i], _ = eager(expected[i], DATASET, rows)
    assert_equal(states, expected, rtol=1e-10)


# ------------------------------------------------------------------------------ errors and memory


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("donate", [(), (0,)], ids=["kept", "donated"])
def test_an_error_inside_a_scan_leaves_the_state_as_it_was(
    jitted: bool, donate: Any, plain_backend: None
) -> None:
    calls = 0

    def step(state: Any, x: Tensor) -> Any:
        nonlocal calls
        calls += 1
        if calls == (1 if jitted else 3):  # traced once, or run for the third time
            raise ArithmeticError("in the middle")
        return tree.map(lambda leaf: leaf * 2 + x, state), ()

    def epoch(state: Any, xs: Tensor) -> Any:
        return scan(step, state, xs)

    state, xs = {"w": torch.ones(3), "b": torch.zeros(())}, torch.ones(4, 1)
    state["b"] = state["b"].view(1)
    run = jit(epoch, donate_argnums=donate) if jitted else epoch
    with unchanged(state, xs), pytest.raises(ArithmeticError, match="in the middle"):
        run(state, xs)
    assert torch.equal(run(state, xs)[0]["w"], torch.full((3,), 31.0))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["kept", "donated", "backward"])
def test_a_thousand_calls_keep_no_memory(way: str) -> None:
    """Neither tensors in Python nor other memory of the process; a state is 256 KB."""
    jitted = jit(lambda w, x: w * 0.5 + x, donate_argnums=0 if way == "donated" else ())
    w, x = torch.zeros(256, 256), torch.ones(256, 256)
    w.requires_grad_(way == "backward")

    def run(times: int) -> tuple[int, int]:
        nonlocal w
        for _ in range(times):
            if way == "backward":
                jitted(w, x).sum().backward()
                w.grad = None
            else:
                w = jitted(w, x)
        gc.collect()
        tensors = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
        return tensors, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    (before, peak), (after, later) = run(10), run(1000)
    assert after == before
    assert later - peak < 64 * 1024  # in KB: a leaf that leaked would come to 256 MB


# ------------------------------------------------------------------------------------- the report


def test_report_says_why_each_program_was_made(plain_backend: None) -> None:
    jitted = jit(lambda tree, scale: {"w": tree["w"].exp().sum() * scale})
    assert jitted.report() == ()
    w, scale = torch.ones(3), torch.tensor(2.0)
    threads = torch.get_num_threads()
    for _ in range(2):
        jitted({"w": w}, scale)
    jitted({"w": torch.ones(4)}, scale)
    jitted({"w": torch.ones(4).double()}, torch.ones(1))
    jitted({"w": torch.ones(4, 2).double()[:, 0]}, torch.ones(1))
    jitted({"w": w, "b": w}, scale)
    jitted({"w": w}, scale=scale)
    try:
        torch.set_num_threads(threads + 1)
        jitted({"w": w}, scale=scale)
    finally:
        torch.set_num_threads(threads)
    report = jitted.report()
    assert [r.why for r in report] == [
        "the first call",
        "0.0.w: float32[4], strides [1], cpu, was float32[3], strides [1], cpu",
        "0.0.w: float64[4], strides [1], cpu, was float32[4], strides [1], cpu; "
        "0.1: float32[1], strides [1], cpu, was float32[], strides [], cpu",
        "0.0.w: float64[4], strides [2], cpu, was float64[4], strides [1], cpu",
        "the arguments have another structure",
        "the arguments have another structure",
        f"threads: {threads + 1}, was {threads}",
    ]


def test_report_says_what_a_program_is() -> None:
    jitted = jit(lambda x: scan(lambda c, z: (c + z, c.exp()), x[0], x)[1].sum())
    jitted(torch.ones(50, 2)), jitted(torch.zeros(50, 2))
    (report,) = jitted.report()
    assert report.route == "one program" and 0.01 < report.seconds < 600
    assert 1 <= report.kernels <= 10  # of the body and the sum, whatever the number of steps
    assert (report.graphs, report.memory, report.fallbacks) == (0, 0, ())
    assert not report.cached and sum(report.times) == report.seconds
    assert all(seconds > 0 for seconds in report.times)


# ------------------------------------------------------------------------- what to do without it


@pytest.fixture
def no_loops(monkeypatch: pytest.MonkeyPatch, plain_backend: None) -> None:
    """A compiler that refuses graphs with a loop."""
    plain = _inductor.lower

    def lower(graph: Any, *rest: Any) -> Any:
        if any(node.target is LOOP for node in graph.graph.nodes):
            raise NotImplementedError("no loops here\nand a second line")
        return plain(graph, *rest)

    monkeypatch.setattr(_inductor, "lower", lower)


@pytest.fixture
def nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def lower(*_: Any) -> Any:
        raise NotImplementedError("not this one")

    monkeypatch.setattr(_inductor, "lower", lower)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def get_cpp_compiler() -> str:
        raise RuntimeError("no c++ here")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", get_cpp_compiler)
    _inductor.missing_compiler.cache_clear()
    yield
    _inductor.missing_compiler.cache_clear()


@torch.library.custom_op("fdltest::unknown", mutates_args=())
def unknown(x: Tensor) -> Tensor:
    """An operation without a fake implementation."""
    return x * 2


REFUSALS = {
    "no_loops": (
        r"compiler refused it \(NotImplementedError: no loops here\); the body of each loop is",
        "compiled loop bodies",
    ),
    "nothing_compiles": (r"refused it \(.*not this one\); it runs eagerly", "eager"),
    "no_compiler": (r"no C\+\+ compiler was found.*CXX \(no c\+\+ here\); it runs", "eager"),
    "unknown": (
        r"no fake implementation of fdltest.unknown.default is registered.*; it is compiled in",
        "compiled pieces",
    ),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_the_next_slower_way_is_taken_and_reported(
    why: str, request: pytest.FixtureRequest, count_programs
) -> None:
    def fn(state: Any, xs: Tensor, rate: Tensor) -> Any:
        def body(c: Tensor, x: Tensor) -> Any:
            c = unknown(c) / 2 if why == "unknown" else c
            return c + rate * x, {"c": c, "inner": scan(lambda d, z: (d + z, d), x[0], x)}

        return scan(body, state, xs)

    if why != "unknown":
        request.getfixturevalue(why)
    match, route = REFUSALS[why]
    xs, rate = torch.arange(12.0).view(4, 3), torch.tensor(0.5)
    given = state = torch.zeros(3)
    jitted, expected = jit(fn, donate_argnums=0), state.clone()
    with pytest.warns(UserWarning, match=match) as caught:
        state, ys = jitted(state, xs, rate)
    assert all("which is slower" in str(warning.message) for warning in caught)
    graphs = count_programs()
    for i in range(1, 4):
        expected, wanted = fn(expected, xs + i - 1, rate * i)
        assert_equal((state, ys), (expected, wanted))
        with pytest.raises(RuntimeError, match="donated"):
            given + 1
        given = state
        state, ys = jitted(state, xs + i, rate * (i + 1))  # other values, which are no constants
    assert graphs.count == 0
    (report,) = jitted.report()
    assert report.route == route
    assert all(str(w.message).endswith(f) for w, f in zip(caught, report.fallbacks, strict=True))


@pytest.mark.parametrize("why", REFUSALS)
def test_strict_raises_instead_and_takes_nothing(why: str, request: pytest.FixtureRequest) -> None:
    if why != "unknown":
        request.getfixturevalue(why)
    op = unknown if why == "unknown" else torch.exp
    jitted = jit(
        lambda w, xs: scan(lambda c, x: (op(c) + x, x), w, xs), donate_argnums=0, strict=True
    )
    w, xs = torch.ones(3), torch.ones(2, 3)
    for _ in range(2):
        with (
            unchanged(w, xs),
            pytest.raises(RuntimeError, match=r"jit\(strict=True\): .*" + REFUSALS[why][0]),
        ):
            jitted(w, xs)
    assert jitted.report() == ()


@pytest.mark.slow
def test_a_refused_training_run_compiles_its_step_once(no_loops: None, count_programs) -> None:
    state, epoch = training(optim.sgd(0.1, momentum=0.9))
    compiled, expected = jit(epoch, donate_argnums=0), tree.map(torch.clone, state)
    indices = [data.epoch_indices(random.fold_in(random.key(3), e), 50, 8) for e in range(3)]
    with pytest.warns(UserWarning, match="the body of each loop is compiled"):
        state, _ = compiled(state, DATASET, indices[0])
    graphs = count_programs()
    for rows in indices[1:]:
        state, _ = compiled(state, DATASET, rows)
    assert graphs.count == 0
    for rows in indices:
        expected, _ = epoch(expected, DATASET, rows)
    assert_equal(state, expected, rtol=1e-10)


def test_a_library_that_a_killed_compiler_left_is_compiled_again(monkeypatch) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    library = Path(cache_dir()) / "damaged.so"
    library.touch()
    attempts = []
    lower = _inductor._lower

    def fails_first(*args: Any) -> Any:
        attempts.append(library.exists())
        if library.exists():
            raise ImportError(f"{library}: file too short")
        return lower(*args)

    monkeypatch.setattr(_inductor, "_lower", fails_first)
    fn = jit(lambda x: x * 3 + 0.25, strict=True)
    assert torch.equal(fn(torch.ones(3)), torch.full((3,), 3.25))
    assert attempts == [True, False]
