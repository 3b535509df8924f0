"""Choose the fastest way to run a traced function that works, and record why not a faster one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import UnsupportedOperatorException

from fdl._compiler import _cuda_graphs, _inductor, _interpreter
from fdl._compiler._donation import match_buffers
from fdl._compiler._graph import nodes_of, results_of
from fdl._compiler._inductor import Compiled
from fdl._compiler._settings import as_written, current_settings, is_plain, use_settings
from fdl._compiler._signature import flatten, unflatten
from fdl._compiler._trace import Traced, copy_aliases, trace
from fdl.tree import Tree

aten = torch.ops.aten
NO_FAKE = "no fake impl registered"  # torch's error for a custom_op without register_fake
EAGER = "it runs eagerly"


class Refused(RuntimeError):
    """A slower way would be taken, but `strict` is set; nothing has been written."""


class Route:
    """The way in which a program runs, and why it does not run in a faster one."""

    def __init__(self, fn: Callable[..., Any], strict: bool) -> None:
        self.fn, self.strict = fn, strict
        self.name = ""  # set before fall_back is called
        self.fallbacks: list[str] = []

    def fall_back(self, instead: str, reason: str) -> None:
        """Record that a slower way is taken, and warn; raise if `strict`."""
        message = f"{reason}; {instead}, which is slower"
        if self.strict:
            raise Refused(f"jit(strict=True): {self.fn!r}: {message}")
        self.fallbacks.append(message)
        warnings.warn(f"jit: {self.fn!r}: {message}", stacklevel=2)

    def compiler_failed(self, instead: str, error: Exception) -> None:
        """Fall back because torch's compiler failed."""
        self.fall_back(instead, f"torch's compiler refused it ({_first_line(error)})")


class Program(NamedTuple):
    """A compiled function of the leaves of the arguments and of the closed-over tensors."""

    run: Callable[[list[Tensor], Sequence[Tensor]], Tree]
    constants: Sequence[Tensor] = ()  # the tensors closed over when it was traced
    writes: bool = False  # to the memory of donated arguments
    kept_graphs: Callable[[], tuple[int, int]] = lambda: (0, 0)  # number of CUDA graphs, bytes


def build(
    fn: Callable[..., Any],
    leaves: Sequence[Tensor],
    spec: Hashable,
    donated: Sequence[int],
    route: Route,
) -> Program:
    """Compile `fn` for arguments with the structure `spec` and the signature of `leaves`."""
    settings = current_settings()
    eager = Program(_eagerly(fn, spec))
    try:
        traced = trace(fn, leaves, spec)
    except Exception as error:
        if not (isinstance(error, UnsupportedOperatorException) or NO_FAKE in str(error)):
            raise
        route.name = "eager"
        route.fall_back(EAGER, f"an operation cannot be traced ({_first_line(error)})")
        return eager

    for steps, why in traced.unrolled:
        route.fall_back(
            f"its {steps} steps are unrolled", f"a scan is not compiled as a loop: {why}"
        )

    def retrace() -> Traced:  # after a failed compilation, which may have changed the graph
        with use_settings(settings):
            return trace(fn, leaves, spec)

    aliases = match_buffers(leaves, donated, traced.results)
    with nullcontext() if is_plain(settings) else as_written():
        if any(_on_gpu(x) for x in [*leaves, *traced.constants, *traced.results]):
            program = _for_cuda(traced, retrace, leaves, aliases, route)
        else:
            program = _for_cpu(traced, retrace, eager, aliases, route)
    if is_plain(settings) or route.name == "eager":
        return program
    return program._replace(run=as_written()(program.run))  # the graph contains the casts


def _for_cpu(
    traced: Traced,
    retrace: Callable[[], Traced],
    eager: Program,
    aliases: dict[int, int],
    route: Route,
) -> Program:
    """Compile everything as one program, or else only loop bodies, or else nothing."""
    eager = eager._replace(constants=traced.constants)
    missing = _inductor.missing_compiler()
    if missing:
        route.name = "eager"
        route.fall_back(EAGER, missing)
        return eager
    try:
        program = _write_in_place(traced, aliases)
        route.name = "one program"
        run = partial(_run_in_place, program, traced, aliases)
        return Program(run, traced.constants, bool(aliases))
    except Exception as error:  # of the compiler: a fault of the function would fail in tracing
        reason = error
    if _interpreter.longest_loop(traced):
        traced = retrace()
        try:
            program = _interpreter.compile_bodies(traced)
        except Exception:
            pass  # report the first reason
        else:
            route.name = "compiled loop bodies"
            route.compiler_failed(
                "the body of each loop is compiled, and run in a Python loop", reason
            )
            return Program(partial(_run, program, traced), traced.constants)
    route.name = "eager"
    route.compiler_failed(EAGER, reason)
    return eager


def _for_cuda(
    traced: Traced,
    retrace: Callable[[], Traced],
    leaves: Sequence[Tensor],
    aliases: dict[int, int],
    route: Route,
) -> Program:
    """Capture everything as one CUDA graph, or else only its long loops, or else nothing."""
    tensors = [*leaves, *traced.constants, *traced.results]
    gpu = next(x.device for x in tensors if _on_gpu(x))
    elsewhere = sum(not _on_gpu(x) or x.device != gpu for x in tensors)
    if elsewhere:
        route.name = "compiled"
        route.fall_back(
            "kernels are launched one by one",
            f"{elsewhere} arguments or results are not on {gpu}; fdl.tree.to moves them there",
        )
        program, traced = _compile_or_interpret(traced, retrace, route)
        return Program(partial(_run, program, traced), traced.constants)
    steps, longest = _interpreter.longest_loop(traced), _cuda_graphs.LONGEST
    if steps > longest:
        route.name = "CUDA graphs of loops"
        route.fall_back(
            "only the loops are captured, and other kernels are launched one by one",
            f"a loop of {steps} steps is too long for one CUDA graph (at most {longest})",
        )
        loop = _cuda_graphs.ChunkedLoop(longest, gpu, route.fall_back)
        program, traced = _compile_or_interpret(traced, retrace, route, loop)
        run = partial(_run, program, traced)
        return Program(run, traced.constants, kept_graphs=loop.kept_graphs)
    route.name = "CUDA graph"
    program, traced = _compile_or_interpret(traced, retrace, route)
    donated = set(aliases.values())
    kept = [i for i in range(len(leaves) + len(traced.constants)) if i not in donated]
    graphed = _cuda_graphs.GraphedProgram(program, kept, gpu, route.fall_back)
    run = partial(_run_graphed, graphed, traced, aliases)
    return Program(run, traced.constants, bool(aliases), graphed.kept_graphs)


def _compile_or_interpret(
    traced: Traced,
    retrace: Callable[[], Traced],
    route: Route,
    loop: _interpreter.Loop = _interpreter.loop_in_python,
) -> tuple[Compiled, Traced]:
    """Compile a program for CUDA, or else run its operations one by one.

    Returns:
        The program, and the trace that it was made from.
    """
    try:
        if _interpreter.longest_loop(traced):
            return _interpreter.compile_bodies(traced, loop), traced
        return _inductor.lower(traced.graph, traced.mode, _inputs(traced)), traced
    except Exception as error:
        route.name += " of single operations"
        route.compiler_failed("operations run one by one", error)
        traced = retrace()
        return _interpreter.interpret(traced, loop), traced


def _on_gpu(leaf: Tensor) -> bool:
    return leaf.is_cuda


def _inputs(traced: Traced) -> list[Tensor]:
    return [node.meta["val"] for node in nodes_of(traced.graph.graph, "placeholder")]


def _eagerly(fn: Callable[..., Any], spec: Hashable) -> Callable[..., Tree]:
    def run(leaves: list[Tensor], _: Sequence[Tensor]) -> Tree:
        args, kwargs = unflatten(leaves, spec)
        results, out_spec = flatten(fn(*args, **kwargs))
        return unflatten(copy_aliases(results, leaves), out_spec)

    return run


def _run(
    program: Compiled, traced: Traced, leaves: list[Tensor], constants: Sequence[Tensor]
) -> Tree:
    return unflatten(program([*leaves, *constants]), traced.spec)


def _run_in_place(
    program: Compiled,
    traced: Traced,
    aliases: dict[int, int],
    leaves: list[Tensor],
    constants: Sequence[Tensor],
) -> Tree:
    new = iter(program([*leaves, *constants]))
    results = [
        leaves[aliases[out]] if out in aliases else next(new) for out in range(len(traced.results))
    ]
    return unflatten(results, traced.spec)


def _run_graphed(
    graphed: _cuda_graphs.GraphedProgram,
    traced: Traced,
    aliases: dict[int, int],
    leaves: list[Tensor],
    constants: Sequence[Tensor],
) -> Tree:
    buffers = {out: leaves[i].detach() for out, i in aliases.items()}
    return unflatten(graphed([*leaves, *constants], buffers), traced.spec)


def _write_in_place(traced: Traced, aliases: dict[int, int]) -> Compiled:
    """Compile a program that computes some results in the memory of donated leaves."""
    graph = traced.graph.graph
    arguments, results = nodes_of(graph, "placeholder"), results_of(graph)
    (output,) = nodes_of(graph, "output")
    with graph.inserting_before(output):
        for out, i in aliases.items():
            copy = graph.call_function(aten.copy_.default, (arguments[i], results[out]))
            copy.meta["val"] = arguments[i].meta["val"]
    output.args = ([node for out, node in enumerate(results) if out not in aliases],)
    traced.graph.recompile()
    return _inductor.lower(traced.graph, traced.mode, _inputs(traced))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
