"""Choose the fastest way to run a traced function that works, and record why not a faster one."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

from fdl._compiler import _cuda_graphs, _inductor, _interpreter
from fdl._compiler._block_pass import Regions, count_regions
from fdl._compiler._cache_key import name as cache_name
from fdl._compiler._callbacks import calls_back
from fdl._compiler._decompose import decompose
from fdl._compiler._digest import digest
from fdl._compiler._donation import match_buffers
from fdl._compiler._graph import may_be_view, nodes_of, operations, results_of
from fdl._compiler._inductor import Compiled, kernels_written
from fdl._compiler._memory import keep_memory
from fdl._compiler._pieces import AnotherShape, NothingCompiles, compile_pieces
from fdl._compiler._program import Program, eagerly, program_of, reordered
from fdl._compiler._refusals import Refusal, describe, first_line, write_log
from fdl._compiler._settings import (
    Settings,
    as_written,
    current_settings,
    is_plain,
    use_settings,
)
from fdl._compiler._stored import Stored
from fdl._compiler._trace import Traced, trace
from fdl._compiler._unknown_ops import CannotTrace, trace_unknown
from fdl.tree import Tree

aten = torch.ops.aten
ONE = "one program"
EAGER = "it runs eagerly"

# Called with the number of operations of a program before it is compiled.
about_to_compile: ContextVar[Callable[[int], None]] = ContextVar(
    "fdl_about_to_compile", default=lambda operations: None
)
about_to_build: list[Callable[[], None]] = []  # called for each program, before it is traced
Attempt = tuple[str, Exception]  # what was tried, and the error


class Refused(RuntimeError):
    """A slower way would be taken, but `strict` is set; nothing has been written."""

    fdl_arguments_are_intact = True


class Times(NamedTuple):
    """Seconds of the parts of a first call."""

    trace: float = 0.0
    compile: float = 0.0
    load: float = 0.0  # from the cache on disk
    run: float = 0.0


class Route:
    """The way in which a program runs, and why it does not run in a faster one."""

    def __init__(self, fn: Callable[..., Any], strict: bool) -> None:
        self.fn, self.strict = fn, strict
        self.name = ""  # set before fall_back is called
        self.fallbacks: list[str] = []
        self.kernels = 0  # that Inductor generated, also in attempts that failed
        self.stored = False  # it was found in the cache on disk
        self.times = Times()
        self.regions = Regions()
        self._lap = time.perf_counter()

    def lap(self, part: str) -> None:
        """Add the time since the last lap to a part of `times`."""
        now = time.perf_counter()
        self.times = self.times._replace(**{part: getattr(self.times, part) + now - self._lap})
        self._lap = now

    def fall_back(self, instead: str, reason: str, log: Path | None = None) -> None:
        """Record that a slower way is taken, and warn; raise if `strict`."""
        message = f"{reason}; {instead}, which is slower"
        if log:
            message += f" (full log: {log})"
        if self.strict:
            raise Refused(f"jit(strict=True): {describe(self.fn)}: {message}")
        self.fallbacks.append(message)
        warnings.warn(f"jit: {describe(self.fn)}: {message}", stacklevel=2)

    def compiler_failed(self, instead: str, traced: Traced, attempts: list[Attempt]) -> None:
        """Fall back because torch's compiler failed; write a log of all attempts."""
        reason = f"torch's compiler refused it ({first_line(attempts[0][1])})"
        self.fall_back(instead, reason, write_log(self.fn, traced, attempts))


def build(
    fn: Callable[..., Any],
    leaves: Sequence[Tensor],
    spec: Hashable,
    donated: Sequence[int],
    route: Route,
    others: Sequence[tuple[Hashable, Program]] = (),
) -> Program:
    """Compile `fn` for arguments with the structure `spec` and the signature of `leaves`.

    If it computes the same as one of the `others`, whose arguments have the keys of their dicts in
    another order, that program is used, and `route` has no name.
    """
    for call in tuple(about_to_build):
        call()
    settings, kernels = current_settings(), kernels_written()
    eager = Program(eagerly(fn, spec))

    def without_unrolling() -> Traced:
        with use_settings(settings):
            return decompose(trace(fn, leaves, spec, False))

    with ExitStack() as stack:
        stack.enter_context(_use_lazy_graph_module(True))  # no Python code for each change of one
        try:
            traced, unknown = trace_unknown(fn, leaves, spec, stack)
        except CannotTrace as error:
            route.name = "eager"
            route.lap("trace")
            route.fall_back(EAGER, f"{error}; register one with torch.library.register_fake")
            return eager
        for steps, why in traced.unrolled:
            route.fall_back(
                f"its {steps} steps are unrolled", f"a scan is not compiled as a loop: {why}"
            )
        eager = eager._replace(constants=traced.constants)
        computes = digest(traced.graph, spec, traced.spec, traced.constants)
        for structure, other in others:
            if computes is not None and computes == other.digest and other.direct is not None:
                return reordered(other, other.direct, structure, spec, traced.spec)
        on_gpu = any(map(_on_gpu, [*leaves, *traced.constants, *traced.results]))
        stored = Stored(None if unknown or on_gpu else cache_name(traced.graph, donated, settings))
        route.lap("trace")
        keep_memory()
        stack.enter_context(stored.lock())
        found = stored.find(traced)
        route.lap("load")
        if found is not None:
            program, route.kernels, route.regions = found
            route.name, route.stored = ONE, True
            return _as_traced(program._replace(digest=computes), settings, route)
        about_to_compile.get()(len(operations(traced.graph)))
        if stored.is_kept():
            stack.enter_context(_inductor.without_cache())
        stack.enter_context(count_regions(route))
        traced = decompose(traced)
        # Inductor would write a view of a computed value before it has read all that it needs.
        places = [
            None if may_be_view(node) else traced.results[out]
            for out, node in enumerate(results_of(traced.graph.graph))
        ]
        aliases = match_buffers(leaves, donated, places)
        if not is_plain(settings):
            stack.enter_context(as_written())
        if unknown:
            program = _around_unknown(traced, unknown, eager, route)
        elif on_gpu:
            program = _for_cuda(traced, leaves, aliases, route)
        else:
            slower = len(route.fallbacks)
            program = _for_cpu(traced, without_unrolling, eager, aliases, route)
            if len(route.fallbacks) == slower:
                stored.keep(program, kernels_written() - kernels, route.regions)
    route.kernels = kernels_written() - kernels
    return _as_traced(program._replace(digest=computes), settings, route)


def _as_traced(program: Program, settings: Settings, route: Route) -> Program:
    """Run a compiled graph, which contains the casts, without autocast or a default device."""
    if is_plain(settings) or route.name == "eager":
        return program
    return program._replace(run=as_written()(program.run), direct=None)


def _around_unknown(
    traced: Traced, operations: list[OpOverload], eager: Program, route: Route
) -> Program:
    """Compile in pieces around operations that have been traced without a fake implementation.

    They run by themselves, so that a result of another shape than on zeros is noticed.
    """
    names = ", ".join(str(op) for op in operations)
    reason = f"no fake implementation of {names} is registered (torch.library.register_fake)"
    try:
        compiled, refused = compile_pieces(traced, Refusal([str(op) for op in operations]))
    except NothingCompiles:
        route.name = "eager"
        route.fall_back(EAGER, reason)
        return eager
    route.name = "compiled pieces"
    route.fall_back(_around(refused), reason)
    pieces = program_of(compiled, traced)

    def run(leaves: list[Tensor], constants: Sequence[Tensor]) -> Tree:
        if route.name != "eager":
            try:
                return pieces.run(leaves, constants)
            except AnotherShape as error:
                route.name = "eager"
                route.fall_back(EAGER, str(error))
        return eager.run(leaves, constants)

    return Program(run, traced.constants)


def _for_cpu(
    traced: Traced,
    without_unrolling: Callable[[], Traced],
    eager: Program,
    aliases: dict[int, int],
    route: Route,
) -> Program:
    """Compile everything as one program, or else as much as can be compiled."""
    missing = _inductor.missing_compiler()
    if missing:
        route.name = "eager"
        route.fall_back(EAGER, missing)
        return eager
    attempts: list[Attempt] = []
    for rung in _rungs(traced, without_unrolling, aliases, attempts):
        try:
            program, instead = rung.build()
        except Exception as error:  # of the compiler: a fault of the function would fail in tracing
            attempts.append((f"{rung.route}: {rung.attempt}", error))
            continue
        route.name = rung.route
        if attempts:
            route.compiler_failed(instead, traced, attempts)
        return program
    route.name = "eager"
    route.compiler_failed(EAGER, traced, attempts)
    return eager


class _Rung(NamedTuple):
    """One way to run a program, tried if those before it fail."""

    route: str
    attempt: str  # how it differs from the others, for the log
    build: Callable[[], tuple[Program, str]]  # the program, and what it does, for the report


def _rungs(
    traced: Traced,
    without_unrolling: Callable[[], Traced],
    aliases: dict[int, int],
    attempts: list[Attempt],
) -> Iterator[_Rung]:
    """List the ways to compile for the CPU, fastest first; `attempts` are those that failed."""

    def whole(traced: Traced, cpp_wrapper: bool = True) -> Program:
        return program_of(_write_in_place(traced, aliases, cpp_wrapper), traced, aliases)

    def bodies() -> Program:
        return program_of(_interpreter.compile_bodies(traced), traced)

    def pieces(traced: Traced) -> tuple[Program, str]:
        compiled, refused = compile_pieces(traced, attempts[0][1])
        return program_of(compiled, traced), _around(refused)

    yield _Rung(ONE, "from C++", lambda: (whole(traced), ""))
    if _inductor.HAS_CPP_WRAPPER:
        instead = "its kernels are called from Python"
        yield _Rung(ONE, instead, lambda: (whole(traced, False), instead))
    rolled = traced
    if traced.several_steps:
        rolled, loops = without_unrolling(), "no loop is unrolled"
        yield _Rung(ONE, loops, lambda: (whole(rolled), loops))
    if _interpreter.longest_loop(traced):
        in_python = "the body of each loop is compiled, and run in a Python loop"
        yield _Rung("compiled loop bodies", in_python, lambda: (bodies(), in_python))
    yield _Rung("compiled pieces", "around what is refused", lambda: pieces(rolled))


def _around(refused: list[str]) -> str:
    names = ", ".join(refused[:4]) + ", …" * (len(refused) > 4)
    return f"it is compiled in pieces around {names}"


def _for_cuda(
    traced: Traced,
    leaves: Sequence[Tensor],
    aliases: dict[int, int],
    route: Route,
) -> Program:
    """Capture everything as one CUDA graph, or else only its long loops, or else nothing."""
    tensors = [*leaves, *traced.constants, *traced.results]
    gpu = next(x.device for x in tensors if _on_gpu(x))
    elsewhere = sum(not _on_gpu(x) or x.device != gpu for x in tensors)
    if elsewhere or calls_back(traced.graph):
        route.name = "compiled"
        route.fall_back(
            "kernels are launched one by one",
            f"{elsewhere} arguments or results are not on {gpu}; fdl.tree.to moves them there"
            if elsewhere
            else "a CUDA graph cannot call Python, as fdl.debug.print and fdl.debug.callback do",
        )
        return program_of(_compile_or_interpret(traced, route), traced)
    steps, longest = _interpreter.longest_loop(traced), _cuda_graphs.LONGEST
    if steps > longest:
        route.name = "CUDA graphs of loops"
        route.fall_back(
            "only the loops are captured, and other kernels are launched one by one",
            f"a loop of {steps} steps is too long for one CUDA graph (at most {longest})",
        )
        loop = _cuda_graphs.ChunkedLoop(longest, gpu, route.fall_back)
        program = program_of(_compile_or_interpret(traced, route, loop), traced)
        return program._replace(kept_graphs=loop.kept_graphs)
    route.name = "CUDA graph"
    compiled = _compile_or_interpret(traced, route)
    donated = set(aliases.values())
    kept = [i for i in range(len(leaves) + len(traced.constants)) if i not in donated]
    graphed = _cuda_graphs.GraphedProgram(compiled, kept, gpu, route.fall_back, aliases)
    program = program_of(graphed, traced, writes=bool(aliases))
    return program._replace(kept_graphs=graphed.kept_graphs)


def _compile_or_interpret(
    traced: Traced, route: Route, loop: _interpreter.Loop = _interpreter.loop_in_python
) -> Compiled:
    """Compile a program for CUDA, or else its pieces, or else run its operations one by one."""
    try:
        if _interpreter.longest_loop(traced):
            return _interpreter.compile_bodies(traced, loop)
        return _inductor.lower(traced.graph, traced.mode, _inputs(traced))
    except Exception as error:
        attempts: list[Attempt] = [("as a whole", error)]
    try:
        program, refused = compile_pieces(traced, attempts[0][1], loop)
    except Exception as error:
        attempts.append(("in pieces", error))
        route.name += " of single operations"
        route.compiler_failed("operations run one by one", traced, attempts)
        return _interpreter.interpret(traced, loop)
    route.name += " of compiled pieces"
    route.compiler_failed(_around(refused), traced, attempts)
    return program


def _on_gpu(leaf: Tensor) -> bool:
    return leaf.is_cuda


def _inputs(traced: Traced) -> list[Tensor]:
    return [node.meta["val"] for node in nodes_of(traced.graph.graph, "placeholder")]


def _write_in_place(traced: Traced, aliases: dict[int, int], cpp_wrapper: bool) -> Compiled:
    """Compile a program that computes some results in the memory of donated leaves."""
    graph = deepcopy(traced.graph.graph)
    arguments, results = nodes_of(graph, "placeholder"), results_of(graph)
    (output,) = nodes_of(graph, "output")
    with graph.inserting_before(output):
        for out, i in aliases.items():
            copy = graph.call_function(aten.copy_.default, (arguments[i], results[out]))
            copy.meta["val"] = arguments[i].meta["val"]
    output.args = ([node for out, node in enumerate(results) if out not in aliases],)
    # It shares the bodies of loops, which `lower` copies.
    module = _make_graph_module(traced.graph, graph)
    return _inductor.lower(module, traced.mode, _inputs(traced), cpp_wrapper)
