"""CUDA graphs of programs: with a stand-in on the CPU, and, marked `cuda`, on a GPU."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fdl import debug, jit, scan, tree
from fdl._compiler import _cuda_graphs, _inductor
from tests.conftest import StandIn
from tests.support.asserts import close, draw, unchanged

pytestmark = pytest.mark.usefixtures("real_loops")

needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Counted(StandIn):
    """Counts captures and replays on a GPU."""

    device = "cuda"
    real = staticmethod(_cuda_graphs._capture)

    def capture(self, *args: Any) -> _cuda_graphs._Graph:
        graph = self.real(*args)
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            graph.replay()

        return graph._replace(replay=replay)


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=needs_cuda)])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The stand-in for the GPU, which counts."""
    if request.param == "stand-in":
        return request.getfixturevalue("stand_in")
    counted = Counted()
    monkeypatch.setattr(_cuda_graphs, "_capture", counted.capture)
    return counted


def epoch(state: Any, xs: Tensor) -> Any:
    def step(state: Any, x: Tensor) -> Any:
        w = state["w"] * 0.9 + x
        return {"w": w, "n": state["n"] + 1, "rate": state["rate"]}, {"norm": w.norm()}

    return scan(step, state, xs)


def start(device: str) -> dict[str, Tensor]:
    return {
        "w": draw(1, 3).to(device),
        "n": torch.tensor(0, device=device),
        "rate": torch.tensor(0.1, device=device),
    }


def rows(device: str, steps: int = 6) -> Tensor:
    return draw(2, steps, 3).to(device)


def only_report(jitted: Any) -> Any:
    (report,) = jitted.report()
    return report


# ----------------------------------------------------------------------------- what goes in and out


def test_an_epoch_is_one_graph(gpu: StandIn) -> None:
    jitted, xs = jit(epoch, strict=True), rows(gpu.device)
    state, results = start(gpu.device), []
    expected = state
    for i in range(4):
        with unchanged(state, xs):
            state, metrics = jitted(state, xs + i)
        expected, wanted = epoch(expected, xs + i)
        close((state, metrics), (expected, wanted))
        results.append((metrics, tree.map(torch.clone, metrics)))
    for got, at_once in results:
        assert not tree.diff(at_once, got)  # no later replay wrote over it
    assert (gpu.recorded, gpu.replayed) == (1, 4)
    report = only_report(jitted)
    assert (report.route, report.graphs, report.fallbacks) == ("CUDA graph", 1, ())
    # The arguments and the results, at the least.
    assert report.memory >= xs.nbytes + 2 * sum(leaf.nbytes for leaf in tree.leaves(state))


def test_the_state_of_a_loop_is_read_and_written_in_place(gpu: StandIn) -> None:
    jitted, xs = jit(epoch, donate_argnums=0, strict=True), rows(gpu.device)
    state, expected = start(gpu.device), start(gpu.device)
    before = [leaf.data_ptr() for leaf in tree.leaves(state)]
    for _ in range(3):
        state, _ = jitted(state, xs)
        expected, _ = epoch(expected, xs)
        close(state, expected)
    assert [leaf.data_ptr() for leaf in tree.leaves(state)] == before
    assert (gpu.recorded, gpu.replayed) == (1, 3)


def test_states_at_other_addresses(gpu: StandIn) -> None:
    """Two at once, each used again and again; a copy; one whose memory is seen elsewhere."""
    jitted, xs = jit(epoch, donate_argnums=0, strict=True), rows(gpu.device)
    states, expected = [start(gpu.device) for _ in range(2)], [start(gpu.device) for _ in range(2)]
    views = []
    for call, i in enumerate((0, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0)):
        if call < 3:
            views.append((states[i]["w"].detach(), expected[i]["w"].clone()))
        elif call == 5:
            states[i] = tree.map(torch.clone, states[i])
        states[i], _ = jitted(states[i], xs)
        expected[i], _ = epoch(expected[i], xs)
        close(states, expected)
    for view, value in views:
        close(view, value)
    assert 2 < gpu.recorded <= _cuda_graphs.MOST + 2


def test_donated_memory_is_written_to(gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda_graphs, "LARGE", 1)  # donated arguments are never read in place
    jitted, xs = jit(epoch, donate_argnums=0, strict=True), rows(gpu.device)
    state = start(gpu.device)
    expected = tree.map(torch.clone, state)
    addresses = [leaf.data_ptr() for leaf in state.values()]
    for _ in range(3):
        given = state
        state, metrics = jitted(given, xs)
        expected, wanted = epoch(expected, xs)
        close((state, metrics), (expected, wanted))
        assert [leaf.data_ptr() for leaf in state.values()] == addresses
        with pytest.raises(RuntimeError, match="was donated to a jitted function"):
            given["w"] + 1
    assert gpu.recorded == 1


def test_large_arguments_are_read_where_they_are_until_they_move(
    gpu: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cuda_graphs, "LARGE", 100)
    closed_over = draw(5, 40).to(gpu.device)

    def fn(small: Tensor, one: Tensor, two: Tensor) -> Tensor:
        return small * (one.sum() + 10 * two.sum() + closed_over.sum())

    jitted = jit(fn, strict=True)
    one, two = rows(gpu.device, 20), rows(gpu.device, 30)

    def check(one: Tensor, two: Tensor, recorded: int, copied: list[Tensor]) -> None:
        small = draw(3, 2).to(gpu.device)
        close(jitted(small, one, two), fn(small, one, two))
        assert gpu.recorded == recorded
        least = sum(leaf.nbytes for leaf in [small, *copied])
        if gpu.device == "cpu":  # a GPU keeps intermediate values, too
            assert only_report(jitted).memory == least + small.nbytes

    for _ in range(3):
        check(one, two, 1, [])
        one.add_(1), closed_over.mul_(2)  # read anew, though not copied
    for i in range(3):
        check(one.clone() + i, two, 2, [one])
    check(one, two, 2, [one])
    closed_over.data = closed_over.clone()
    check(one, two, 3, [one, closed_over])
    kept = [two.clone() for _ in range(2)]  # both alive, so that addresses differ
    for leaf in kept:
        check(one, leaf, 4, [one, closed_over, two])


def test_arguments_of_any_strides(gpu: StandIn) -> None:
    base = draw(4, 4, 6).to(gpu.device)
    forms = {
        "every other": lambda x: x[:, ::2],
        "transposed": lambda x: x[:3, :4].T,
        "expanded": lambda x: x[0, :3].expand(4, 3),
        "expanded twice": lambda x: x[0, 0].expand(4, 3),
        "a row in many": lambda x: x[:, 1:2].expand(4, 3),
        "windows": lambda x: x[0].unfold(0, 3, 1),
    }
    jitted = jit(
        lambda x: (x.exp(), x.sum(0), scan(lambda c, row: (c + row, c), x[0], x)), strict=True
    )
    for make in forms.values():
        for shift in (0, 1):  # the second time the program is replayed
            x = make(base + shift)
            with unchanged(x):
                close(jitted(x)[0], x.exp())
                close(jitted(x)[1:], (x.sum(0), (x.sum(0) + x[0], (x.cumsum(0) - x + x[0]))))
    assert gpu.recorded == len(forms)


def test_programs_that_take_turns_do_not_disturb_each_other(gpu: StandIn) -> None:
    one, two = jit(epoch, donate_argnums=0, strict=True), jit(epoch, strict=True)
    short, long = rows(gpu.device, 3), rows(gpu.device, 5)
    first, second, third = (start(gpu.device) for _ in range(3))
    expected = [tree.map(torch.clone, first), second, third]
    for _ in range(3):
        first, metrics = one(first, short)
        second, others = two(second, long)
        third, _ = two(third, short)
        for i, xs in enumerate([short, long, short]):
            expected[i], wanted = epoch(expected[i], xs)
            if i == 0:
                close(metrics, wanted)
            if i == 1:
                close(others, wanted)
    close([first, second, third], expected)
    assert gpu.recorded == 3


def test_results_of_all_kinds_share_no_memory(gpu: StandIn) -> None:
    closed_over = draw(3, 3).to(gpu.device)

    def fn(x: Tensor) -> list[Any]:
        fresh = x + 1
        zeros = torch.zeros((), device=x.device, dtype=x.dtype)
        return [x, x[1:], fresh, fresh, fresh[:2], closed_over, zeros.expand(3), zeros[None][:0]]

    jitted, x = jit(fn, strict=True), draw(1, 3).to(gpu.device)
    for _ in range(2):
        got = jitted(x)
        close(got, fn(x))
        for leaf in got:
            before = [other.clone() for other in got if other is not leaf]
            leaf.add_(100)
            close([other for other in got if other is not leaf], before)
    none = jit(lambda: torch.arange(3, device=gpu.device), strict=True)
    for _ in range(2):
        assert none().tolist() == [0, 1, 2]
    assert gpu.recorded == 2


def test_backward_runs_recorded_programs(gpu: StandIn) -> None:
    w, xs = draw(1, 3).to(gpu.device).requires_grad_(), rows(gpu.device)
    jitted = jit(lambda w, xs: scan(lambda c, x: ((c * x).sin(), ()), w, xs)[0].sum(), strict=True)
    for _ in range(3):
        (got,) = torch.autograd.grad(jitted(w, xs), w)
    with torch.enable_grad():
        c = w
        for x in xs:
            c = (c * x).sin()
    close(got, torch.autograd.grad(c.sum(), w)[0])
    assert gpu.recorded == 2 and [r.route for r in jitted.report()] == ["CUDA graph"] * 2


@pytest.mark.slow
def test_a_thousand_replays_keep_no_memory(gpu: StandIn) -> None:
    jitted, xs, state = (
        jit(epoch, donate_argnums=0, strict=True),
        rows(gpu.device, 2),
        start(gpu.device),
    )

    def run(times: int) -> int:
        nonlocal state
        for _ in range(times):
            state, _ = jitted(state, xs)
        gc.collect()
        if gpu.device == "cuda":
            return torch.cuda.memory_allocated()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    few = run(10)
    assert run(1000) <= few
    assert (gpu.recorded, gpu.replayed) == (1, 1010)


# -------------------------------------------------------------------------- what cannot be recorded


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda_graphs, "LONGEST", 4)


@pytest.mark.parametrize("steps, graphs", [(8, 1), (10, 2), (5, 2)])
def test_a_long_loop_is_recorded_in_chunks(
    steps: int, graphs: int, gpu: StandIn, short: None
) -> None:
    jitted, xs = jit(epoch), rows(gpu.device, steps)
    state = expected = start(gpu.device)
    with pytest.warns(UserWarning, match=rf"loop of {steps} steps is too long for one CUDA graph"):
        jitted(state, xs)
    for i in range(3):
        with unchanged(state, xs):
            state, metrics = jitted(state, xs + i)
        expected, wanted = epoch(expected, xs + i)
        close((state, metrics), (expected, wanted))
    assert gpu.recorded == graphs and gpu.replayed == 4 * -(-steps // 4)
    report = only_report(jitted)
    assert report.route == "CUDA graphs of loops" and report.graphs == graphs
    assert "too long" in report.fallbacks[0]
    assert report.memory > xs[:4].nbytes


@pytest.mark.slow
def test_a_long_loop_reads_its_data_set_in_place(
    gpu: StandIn, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cuda_graphs, "LARGE", 1000)
    dataset = draw(1, 200).to(gpu.device)
    jitted = jit(
        lambda dataset, index: scan(lambda c, i: (c + dataset[i[None]][0], c), dataset[0], index)
    )
    index = torch.arange(10, device=gpu.device)
    with pytest.warns(UserWarning, match="too long for one CUDA graph"):
        for _ in range(2):
            last, _ = jitted(dataset, index)
            close(last, dataset[0] + dataset[:10].sum())
            dataset.mul_(2)
    assert gpu.recorded == 2
    assert gpu.device == "cuda" or only_report(jitted).memory < 2 * dataset.nbytes


def elsewhere(gpu: StandIn) -> Tensor:
    """A tensor that is not on the GPU: for the stand-in, one of int16."""
    return torch.tensor(2, dtype=torch.int16)


def test_an_argument_on_the_cpu_is_a_reason_not_to_record(gpu: StandIn) -> None:
    jitted, w, number = jit(lambda w, n: w * n), draw(1, 3).to(gpu.device), elsewhere(gpu)
    with pytest.warns(UserWarning, match=r"1 arguments or results are not on .*fdl\.tree\.to"):
        close(jitted(w, number), w * 2)
    close(jitted(w, number + 1), w * 3)
    assert gpu.recorded == 0 and only_report(jitted).route == "compiled"


def test_a_closed_over_tensor_on_the_cpu_is_read_anew(gpu: StandIn) -> None:
    number, w = elsewhere(gpu), draw(1, 3).to(gpu.device)
    jitted = jit(lambda w: w * number)
    with pytest.warns(UserWarning, match="not on "):
        close(jitted(w), w * 2)
    number.add_(1)
    close(jitted(w), w * 3)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def lower(*_: Any) -> Any:
        raise RuntimeError("Cannot find a working triton installation\nmore")

    monkeypatch.setattr(_inductor, "lower", lower)


@pytest.mark.parametrize("fn", [epoch, lambda state, xs: state["w"] * xs], ids=["loop", "plain"])
def test_what_cannot_be_compiled_is_recorded_all_the_same(
    fn: Callable[..., Any], gpu: StandIn, no_compiler: None
) -> None:
    jitted, state, xs = jit(fn), start(gpu.device), rows(gpu.device)
    with pytest.warns(UserWarning, match=r"refused it \(RuntimeError: .*triton installation\); op"):
        close(jitted(state, xs), fn(state, xs))
    close(jitted(state, xs + 1), fn(state, xs + 1))
    assert (gpu.recorded, gpu.replayed) == (1, 2)
    assert only_report(jitted).route == "CUDA graph of single operations"


@torch.library.custom_op("fdltest::waits", mutates_args=())
def waits(x: Tensor) -> Tensor:
    """Wait for the GPU, which cannot be captured."""
    return x.cpu().to(x.device).clone()


waits.register_fake(torch.empty_like)


@pytest.fixture
def unrecordable(gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """An epoch whose capture fails."""
    if gpu.device == "cpu":

        def capture(program: Any, inputs: list[Tensor], into: Any) -> Any:
            program(list(inputs))
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        monkeypatch.setattr(_cuda_graphs, "_capture", capture)

    def fn(state: Any, xs: Tensor) -> Any:
        return epoch(state | {"w": waits(state["w"])}, xs)

    return fn


@pytest.mark.parametrize("donate", [(), (0,)], ids=["kept", "donated"])
def test_what_cannot_be_recorded_is_run_as_it_is(
    donate: Any, gpu: StandIn, unrecordable: Callable[..., Any]
) -> None:
    jitted, state, xs = (
        jit(unrecordable, donate_argnums=donate),
        start(gpu.device),
        rows(gpu.device),
    )
    expected = tree.map(torch.clone, state)
    with pytest.warns(UserWarning, match="capturing a CUDA graph failed: .*one by one") as caught:
        state, metrics = jitted(state, xs)
    assert len(caught) == 1
    for _ in range(2):
        expected, wanted = epoch(expected, xs)
        close((state, metrics), (expected, wanted))
        state, metrics = jitted(state, xs)
    report = only_report(jitted)
    assert len(report.fallbacks) == 1 and gpu.recorded == 0
    assert (report.graphs, report.memory) == (0, 0)


def test_a_chunk_that_cannot_be_recorded_is_run_as_it_is(
    gpu: StandIn, short: None, unrecordable: Callable[..., Any]
) -> None:
    jitted, state, xs = jit(lambda s, xs: scan(body, s, xs)), start(gpu.device), rows(gpu.device)
    with pytest.warns(UserWarning) as caught:
        close(jitted(state["w"], xs), scan(body, state["w"], xs))
    assert ["too long" in str(w.message) for w in caught] == [True, False, False]
    close(jitted(state["w"], xs), scan(body, state["w"], xs))


def body(w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return waits(w) * 0.5 + x, w


@pytest.mark.parametrize("why", ["too long", "elsewhere", "refused", "unrecordable"])
def test_strict_raises_and_takes_nothing(
    why: str, gpu: StandIn, request: pytest.FixtureRequest
) -> None:
    fn, state, xs = epoch, start(gpu.device), rows(gpu.device)
    if why == "too long":
        request.getfixturevalue("short")
    elif why == "refused":
        request.getfixturevalue("no_compiler")
    elif why == "unrecordable":
        fn = request.getfixturevalue("unrecordable")
    else:
        state["rate"] = elsewhere(gpu)
    jitted = jit(fn, donate_argnums=0, strict=True)
    for _ in range(2):
        with (
            unchanged(state, xs),
            pytest.raises(RuntimeError, match=r"jit\(strict=True\): .*which is slower"),
        ):
            jitted(state, xs)
    assert jitted.report() == ()


def test_a_program_that_calls_python_is_not_recorded(
    gpu: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    def fn(x: Tensor) -> Tensor:
        debug.print("{:.1f}", x.sum())
        return x + 1

    jitted = jit(fn)
    with pytest.warns(UserWarning, match=r"cannot call Python, as fdl\.debug\.print"):
        jitted(torch.ones(3, device=gpu.device))
    jitted(torch.zeros(3, device=gpu.device))
    assert capsys.readouterr().out.split() == ["3.0", "0.0"]
    assert jitted.report()[0].route == "compiled"
