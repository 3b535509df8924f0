"""What is compiled, how often, and in which order; no test measures a time."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor
from torch.fx import Graph
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from fdl import jit, optim, tree
from fdl._compiler import _compile_time, _dispatch, _inductor
from tests.support.asserts import assert_equal

WIDTH = 16
TIMEOUT = 60  # seconds, after which a compiler that waits for another one gives up


def mlp_step(depth: int) -> tuple[Any, Any, Any]:
    """Return a training step of `depth` equal layers, its state and a batch."""
    generator = torch.Generator().manual_seed(depth)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    params = [{"w": normal(WIDTH, WIDTH) * 0.3, "b": normal(WIDTH)} for _ in range(depth)]
    optimizer = optim.adam(1e-2)

    def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
        for layer in params:
            x = torch.relu(x @ layer["w"] + layer["b"])
        return ((x - y) ** 2).mean()

    def step(state: Any, batch: Any) -> Any:
        params, memory = state
        grads, value = torch.func.grad_and_value(loss)(params, *batch)
        updates, memory = optimizer.update(grads, memory, params)
        return (optim.apply_updates(params, updates), memory), value

    return step, (params, optimizer.init(params)), (normal(32, WIDTH), normal(32, WIDTH))


class Compiler:
    """Records the commands of the C++ compiler, and the files that it is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from torch._inductor import cpp_builder

        run = cpp_builder.run_compile_cmd
        self.commands: list[list[str]] = []
        self.sources: dict[str, str] = {}  # by their last suffixes

        def record(command: str, cwd: str) -> None:
            words = command.split()
            self.commands.append(words)
            for path in map(Path, words):
                if path.suffix == ".cpp":
                    self.sources["".join(path.suffixes)] = path.read_text()
            self.wait(words)
            run(command, cwd)

        monkeypatch.setattr(cpp_builder, "run_compile_cmd", record)

    def wait(self, words: list[str]) -> None:
        """Do something before a command runs."""


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiler:
    """The compiler on a machine where nothing has been compiled."""
    _dispatch._extension().result()
    _inductor.import_inductor()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return Compiler(monkeypatch)


needs_wrapper = pytest.mark.skipif(not _inductor.HAS_CPP_WRAPPER, reason="torch 2.11")


@needs_wrapper
@pytest.mark.slow
def test_a_program_is_two_files_that_are_compiled_at_the_same_time_and_linked(
    compiler: Compiler,
) -> None:
    together = Barrier(2)
    compiler.wait = lambda words: together.wait(TIMEOUT) if "-c" in words else None  # type: ignore[method-assign,assignment,func-returns-value]
    fn = jit(lambda x: torch.sin(x) + 0.125)
    x = torch.arange(5.0)
    torch.testing.assert_close(fn(x), torch.sin(x) + 0.125)
    *parts, link = compiler.commands
    assert ["-c" in words for words in (*parts, link)] == [True, True, False]
    # No header is compiled before them.
    assert not any({"-include", "c++-header"} & {*words} for words in compiler.commands)


@needs_wrapper
@pytest.mark.slow
def test_kernels_of_short_vectors_do_not_include_those_of_long_ones(compiler: Compiler) -> None:
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    x = torch.arange(40.0)
    torch.testing.assert_close(jit(lambda x: torch.cos(x) * 0.625)(x), torch.cos(x) * 0.625)
    command = next(words for words in compiler.commands if any("optimized" in w for w in words))
    source = next(word for word in command if word.endswith(".optimized.cpp"))
    words = [word for word in command if word not in ("-c", "-o") and not word.endswith(".o")]
    files = subprocess.run([*words, "-M"], capture_output=True, text=True, check=True).stdout
    assert "torch/csrc/inductor/cpp_prefix.h" in files and source in files
    if str(pick_vec_isa()) == "avx2":
        assert "avx2intrin.h" in files and "avx512" not in files


@needs_wrapper
@pytest.mark.slow
def test_equal_layers_add_no_kernel_and_long_wrappers_are_not_optimized(
    compiler: Compiler,
) -> None:
    kernels: list[set[str]] = []
    optimized: list[bool] = []
    for depth in (4, 24):
        step, state, batch = mlp_step(depth)
        expected = step(state, batch)
        assert not tree.diff(expected, jit(step)(state, batch), rtol=1e-3, atol=1e-5)
        lines = compiler.sources[".optimized.cpp"].splitlines()
        kernels.append({line for line in lines if line.startswith('extern "C"')})
        optimized.append("O0" not in compiler.sources[".main.cpp"])
    assert len(kernels[0]) == len(kernels[1])
    assert optimized == [True, False]


@pytest.mark.slow
def test_graphs_are_not_written_as_python_code(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    python_code = Graph.python_code

    def record(self: Graph, *args: Any, **kwargs: Any) -> Any:
        written.append(len(self.nodes))
        return python_code(self, *args, **kwargs)

    monkeypatch.setattr(Graph, "python_code", record)
    step, state, batch = mlp_step(6)
    jit(step)(state, batch)
    assert len(set(written)) <= 1  # torch writes what it lowers, for its log


@pytest.mark.parametrize(("release", "known"), [(12, True), (11, False)])
def test_instruction_sets_are_tried_only_with_compilers_that_may_not_know_them(
    release: int, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _inductor.import_inductor()
    from torch._inductor.cpp_builder import CppBuilder
    from torch._inductor.cpu_vec_isa import VecAMX, VecAVX512, VecISA

    def refuse(self: Any) -> None:
        raise RuntimeError("a program is compiled")

    monkeypatch.setattr(CppBuilder, "build", refuse)
    monkeypatch.setattr(_compile_time, "_release", lambda: release)
    isa = VecAVX512()
    assert isa.check_build(VecISA._avx_code)
    assert isa.check_build(VecAMX._amx_code + "// new") is known
    assert not isa.check_build(VecAMX._amx_fp16_code + "// new") or known


def test_the_release_of_the_compiler_is_known() -> None:
    assert _compile_time._release() > 4


@pytest.mark.skipif(torch.accelerator.is_available(), reason="Triton is used")
def test_the_sources_of_triton_are_not_read() -> None:
    _inductor.import_inductor()
    from torch._inductor import codecache

    assert codecache.triton_key() == getattr(sys.modules.get("triton"), "__version__", None)


x, y = sympy.Symbol("x", integer=True, nonnegative=True), sympy.Symbol("y", integer=True)


@pytest.mark.parametrize(
    "index",
    [
        3 * x + y,
        y + 1,
        FloorDiv(x, 2),
        FloorDiv(2 * x, 2) + y,
        FloorDiv(y, 3) + 7 * x,
        28 * FloorDiv(x, 2) + sympy.Min(5, 1 + FloorDiv(x, 2)),
        sympy.Min(FloorDiv(x, 2), FloorDiv(x, 2) + 1),
        ModularIndexing(x, 1, 8) + FloorDiv(x, 64),
    ],
)
def test_strides_are_those_of_torch(index: Any) -> None:
    """One that is a number is the same; one that varies depends on the variable."""
    _inductor.import_inductor()
    from torch._inductor.codegen.cpp import stride_at_vec_range

    expected = sympy.simplify(index.xreplace({x: x + 1}) - index)
    stride = stride_at_vec_range(index, x)
    assert (stride == expected) or (stride.has(x) and expected.has(x))


class Unbuilt:
    """The extension while it is being built, and then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ready = _dispatch._extension().result()
        if self.ready is None:
            pytest.skip("there is no extension; test_dispatch.py fails if there should be")
        self.future: Future[Any] = Future()
        monkeypatch.setattr(_dispatch, "_extension", lambda: self.future)

    def finish(self) -> None:
        self.future.set_result(self.ready)


def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """List for each later call whether it is dispatched in C++."""
    calls, call = list[bool](), _dispatch.call_known

    def record(*args: Any) -> Any:
        result = call(*args)
        calls.append(result is not NotImplemented)
        return result

    monkeypatch.setattr(_dispatch, "call_known", record)
    return calls


@pytest.mark.parametrize("donate", [(), 0])
def test_first_calls_do_not_wait_for_the_extension(
    donate: Any, monkeypatch: pytest.MonkeyPatch, plain_backend: None
) -> None:
    extension, calls = Unbuilt(monkeypatch), dispatched(monkeypatch)
    fn, state = jit(lambda s: {"n": s["n"] + 1}, donate_argnums=donate), {"n": torch.zeros(2)}
    for _ in range(3):
        state = fn(state)
    extension.finish()
    for _ in range(3):
        state = fn(state)
    assert_equal(state, {"n": torch.full([2], 6.0)})
    assert calls == [False] * 4 + [True] * 2
    assert len(fn.report()) == 1


def test_programs_that_close_over_something_else_are_tried_in_their_order(
    monkeypatch: pytest.MonkeyPatch, plain_backend: None
) -> None:
    extension, calls = Unbuilt(monkeypatch), dispatched(monkeypatch)
    closed_over = {"w": torch.ones(2)}
    fn = jit(lambda x: x + closed_over["w"].sum())
    for size in (2, 3):
        closed_over["w"] = torch.ones(size)
        assert fn(torch.zeros(1)).item() == size
    extension.finish()
    for size in (3, 3, 2, 2, 3, 3):
        closed_over["w"] = torch.ones(size)
        assert fn(torch.zeros(1)).item() == size
    assert len(fn.report()) == 2 and calls[:2] == [False, False]


def test_without_the_extension_programs_run_from_python(
    monkeypatch: pytest.MonkeyPatch, plain_backend: None
) -> None:
    extension, calls = Unbuilt(monkeypatch), dispatched(monkeypatch)
    extension.ready = None
    fn = jit(lambda x: x * 2)
    assert fn(torch.ones(1)).item() == 2
    extension.finish()
    assert [fn(torch.ones(1)).item() for _ in range(2)] == [2, 2]
    assert calls == [False] * 3


@needs_wrapper
def test_a_program_from_the_cache_does_not_wait_for_the_extension(
    monkeypatch: pytest.MonkeyPatch, program_cache: Path
) -> None:
    def fn(x: Tensor) -> dict[str, Tensor]:
        return {"s": torch.sin(x), "n": x.sum()}

    x = torch.linspace(-1, 1, 10)
    expected = jit(fn)(x)
    Unbuilt(monkeypatch)
    monkeypatch.setattr(_dispatch, "_loaded", [])
    monkeypatch.setattr(_dispatch, "_is_kept", lambda: False)
    again = jit(fn)
    for _ in range(3):
        assert_equal(again(x), expected)
    assert again.report()[0].cached and again.report()[0].route == "one program"
