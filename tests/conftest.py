"""What all test files share."""

import ctypes
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

# One thread for each process, before torch asks, and for all that tests start: threads of several
# processes on a few cores mostly wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch
from torch import Tensor

import fdl
from fdl._compiler import (
    _cache,
    _cache_key,
    _cuda_graphs,
    _dispatch,
    _headers,
    _inductor,
    _routes,
)
from fdl._modes import disabled
from fdl.testing import Programs
from tests.support.programs import turn
from train import recipes

# Tests and the processes that they start share a cache of their own; its extension is kept there.
if place := _cache.folder():
    os.environ["FDL_CACHE"] = str(place.with_name("fdl-tests"))
torch.set_num_threads(1)  # should a plugin have imported it before
hypothesis.settings.register_profile("untimed", deadline=None)  # the machine may be busy
hypothesis.settings.load_profile("untimed")
IN_TURN = 8  # of the tests that are slow or compile
QUICK_IN_TURN = 3  # of all others, with --quick


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="leave out what is marked slow")
    parser.addoption(
        "--in-turn",
        action="store_true",
        help=f"run one in {IN_TURN} of the tests that are slow or compile, or with --quick one in "
        f"{QUICK_IN_TURN} of the others; not the same when fdl changes",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--quick"):
        _skip_what_takes_long()
    elif config.getoption("--in-turn"):
        inductor = torch._TorchCompileInductorWrapper
        for place, name in ((_inductor, "lower"), (inductor, "__call__")):
            _guard(place, name, "compiles, and another turn has it", getattr(place, name), _waits)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    quick, in_turn = config.getoption("--quick"), config.getoption("--in-turn")
    left_out = set()
    for item in items:
        if item.get_closest_marker("slow"):
            waits = quick or (in_turn and _waits(item.nodeid))
        else:
            waits = quick and in_turn and _waits(item.nodeid, QUICK_IN_TURN)
        if waits:
            left_out.add(item)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def _waits(test: str, rounds: int = IN_TURN) -> bool:
    """Return True if it is not the turn of a test."""
    return (zlib.crc32(test.encode()) + turn()) % rounds > 0


def _guard(
    place: Any,
    name: str,
    why: str,
    otherwise: Callable[..., Any],
    waits: Callable[[str], bool] = lambda test: True,
) -> None:
    """Skip a test where it calls a function: none can forget to say that it takes long.

    An example in a docstring is no such test; it calls `otherwise`.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
        if test.startswith("tests/") and waits(test):
            pytest.skip(why)
        return otherwise(*args, **kwargs)

    setattr(place, name, call)


def _skip_what_takes_long() -> None:
    """Skip a test where it starts a process or compiles with Inductor.

    An example in a docstring may compile: its graph is run without Inductor.
    """
    compiles = "compiles, which make quick does not"
    starts = "starts a process, which make quick does not"
    _inductor.missing_compiler()  # asks for its version, in a process
    _dispatch._build = lambda name: None  # calls are dispatched in Python, unless it is cached
    inductor = torch._TorchCompileInductorWrapper
    _guard(_inductor, "lower", compiles, lambda graph, *_: lambda leaves: graph(*leaves))
    _guard(inductor, "__call__", compiles, inductor.__call__)
    _guard(subprocess.Popen, "__init__", starts, subprocess.Popen.__init__)
    _guard(os, "fork", starts, os.fork)


@pytest.fixture(autouse=True)
def unchanged_process() -> Iterator[None]:
    """Fail a test that leaves a setting of the process other than it found it."""
    before = _settings()
    yield
    assert _settings() == before


def _settings() -> dict[str, Any]:
    """Return the settings of the process that change what a test computes."""
    jax = sys.modules.get("jax")
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "eager": disabled.get(),
        "float64 of JAX": jax is not None and jax.config.read("jax_enable_x64"),
        "folder": os.getcwd(),
    }


@pytest.fixture(autouse=True, scope="session")
def no_program_cache() -> Iterator[None]:
    """Let `jit` compile in this process: a test may have changed the compiler, or count its work.

    Programs of other processes, and of tests with `program_cache`, come from the cache.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(_routes, "cache_name", lambda *_: None)
        yield


@pytest.fixture
def program_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let `jit` use a cache of the test's own; return its folder."""
    monkeypatch.setattr(_routes, "cache_name", _cache_key.name)
    monkeypatch.setenv("FDL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_headers, "HEADERS", ())  # it would take long to read them for one test
    _cache._warn_once.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def plain_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `jit` trace as always, and run the graph without Inductor: breadth at a low price."""
    monkeypatch.setattr(_inductor, "lower", lambda graph, *_: lambda leaves: graph(*leaves))


def borrow(leaf: Tensor) -> Tensor:
    """Return a tensor at the same address, which does not own the memory, as in a CUDA graph."""
    span = sum((n - 1) * s for n, s in zip(leaf.shape, leaf.stride(), strict=True)) + 1
    if not leaf.numel():
        return torch.empty_like(leaf)
    memory = (ctypes.c_byte * (span * leaf.itemsize)).from_address(leaf.data_ptr())
    return torch.frombuffer(memory, dtype=leaf.dtype).as_strided(leaf.shape, leaf.stride())


class StandIn:
    """Records on the CPU what a CUDA graph would: the same memory is read and written each time."""

    device = "cpu"

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def capture(
        self,
        program: Callable[[list[Tensor]], list[Tensor]],
        inputs: list[Tensor],
        into: dict[int, Tensor],
    ) -> _cuda_graphs._Graph:
        self.recorded += 1
        owners = {id(leaf) for leaf in into.values()}
        inputs = [borrow(leaf) if id(leaf) in owners else leaf for leaf in inputs]
        targets = {out: borrow(leaf) for out, leaf in into.items()}
        program(list(inputs))
        results = program(list(inputs))
        _cuda_graphs._copy(
            results, [torch.full_like(leaf, -77) for leaf in results]
        )  # not computed

        def replay() -> None:
            self.replayed += 1
            _cuda_graphs._copy(results, program(list(inputs)))
            _cuda_graphs._copy(list(targets.values()), [results[out] for out in targets])

        kept = [None if out in into else leaf for out, leaf in enumerate(results)]
        return _cuda_graphs._Graph(replay, kept, lambda: sum(leaf.nbytes for leaf in results))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, plain_backend: None) -> StandIn:
    """Let `jit` take the CPU for a GPU, int16 tensors aside, which stay on the CPU."""
    graphs = StandIn()
    monkeypatch.setattr(_cuda_graphs, "_capture", graphs.capture)
    monkeypatch.setattr(_cuda_graphs, "_one_at_a_time", lambda device: nullcontext())
    monkeypatch.setattr(_routes, "_on_gpu", lambda leaf: leaf.dtype != torch.int16)
    return graphs


@pytest.fixture
def count_programs() -> Iterator[Callable[[], Programs]]:
    """Count the programs that `jit` builds from a call until the end of the test."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(fdl.testing.count_programs())


@pytest.fixture
def one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an epoch on the sample of Fashion-MNIST be one pass, as on the whole set, not ten."""
    monkeypatch.setattr(recipes, "EXAMPLES", 6_000)


@pytest.fixture
def real_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep loops of a few tiny steps, as tests have them, from being written out."""
    monkeypatch.setattr("fdl._compiler._scan_traced.MAX_UNROLL", 1)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run a command of `train` in a folder of its own; return its exit code, output and errors."""
    from train.__main__ import main

    monkeypatch.chdir(tmp_path)
    # The oldest tyro remembers an unknown option for the next call in one process.
    remembered = "tyro._argparse_formatter.global_unrecognized_arg_and_prog"

    def call(*args: object) -> tuple[int, str, str]:
        if "tyro._argparse_formatter" in sys.modules:
            monkeypatch.setattr(remembered, [], raising=False)
        monkeypatch.setattr(sys, "argv", ["python -m train", *map(str, args)])
        try:
            code = main()
        except SystemExit as stop:  # tyro's way out
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call
