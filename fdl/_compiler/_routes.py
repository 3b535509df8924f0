"""How a traced function is run: the fastest way that works, and what was in the way of others."""

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
from fdl._compiler._donation import find_homes
from fdl._compiler._graph import nodes_of, results_of
from fdl._compiler._inductor import Compiled
from fdl._compiler._settings import as_written, current_settings, is_plain, use_settings
from fdl._compiler._signature import flatten, unflatten
from fdl._compiler._trace import Traced, trace, unshared
from fdl.tree import Tree

aten = torch.ops.aten
NO_FAKE = "no fake impl registered"  # the error of an operation made by torch.library.custom_op
EAGER = "it runs eagerly"


class Refused(RuntimeError):
    """A slower way was to be taken, and `strict`; nothing has been written."""


class Route:
    """The way in which a program runs, and why it runs in no faster way."""

    def __init__(self, fn: Callable[..., Any], strict: bool) -> None:
        self.fn, self.strict = fn, strict
        self.name = ""  # set before a fallback is noted
        self.fallbacks: list[str] = []

    def fall_back(self, instead: str, reason: str) -> None:
        """Note that a slower way is taken, and warn of it, or raise."""
        message = f"{reason}; {instead}, which is slower"
        if self.strict:
            raise Refused(f"jit(strict=True): {self.fn!r}: {message}")
        self.fallbacks.append(message)
        warnings.warn(f"jit: {self.fn!r}: {message}", stacklevel=2)

    def refused(self, instead: str, error: Exception) -> None:
        """Fall back since torch's compiler failed."""
        self.fall_back(instead, f"torch's compiler refused it ({_first_line(error)})")


class Program(NamedTuple):
    """A function of the flat list of arguments, and of what the traced function closes over."""

    run: Callable[[list[Tensor], Sequence[Tensor]], Tree]
    constants: Sequence[Tensor] = ()  # what the function closed over when it was traced
    writes: bool = False  # into the memory of donated arguments
    kept_graphs: Callable[[], tuple[int, int]] = lambda: (0, 0)  # CUDA graphs, and their bytes


def build(
    fn: Callable[..., Any],
    leaves: Sequence[Tensor],
    spec: Hashable,
    donated: Sequence[int],
    route: Route,
) -> Program:
    """Make the program of `fn` for one form of arguments."""
    state = current_settings()
    eager = Program(_eagerly(fn, spec))
    try:
        traced = trace(fn, leaves, spec)
    except Exception as error:
        if not (isinstance(error, UnsupportedOperatorException) or NO_FAKE in str(error)):
            raise
        route.name = "eager"
        route.fall_back(EAGER, f"an operation cannot be traced ({_first_line(error)})")
        return eager

    def again() -> Traced:  # for when the first graph was written to
        with use_settings(state):
            return trace(fn, leaves, spec)

    homes = find_homes(leaves, donated, traced.results)
    with nullcontext() if is_plain(state) else as_written():
        if any(_on_gpu(x) for x in [*leaves, *traced.constants, *traced.results]):
            program = _for_cuda(traced, again, leaves, homes, route)
        else:
            program = _for_cpu(traced, again, eager, homes, route)
    if is_plain(state) or route.name == "eager":
        return program
    return program._replace(
        run=as_written()(program.run)
    )  # what was to be cast is cast by the graph


def _for_cpu(
    traced: Traced,
    again: Callable[[], Traced],
    eager: Program,
    homes: dict[int, int],
    route: Route,
) -> Program:
    """Compile all of it as one program; or else the bodies of its loops; or nothing."""
    eager = eager._replace(constants=traced.constants)
    missing = _inductor.missing_compiler()
    if missing:
        route.name = "eager"
        route.fall_back(EAGER, missing)
        return eager
    try:
        program = _write_home(traced, homes)
        route.name = "one program"
        run = partial(_run_at_home, program, traced, homes)
        return Program(run, traced.constants, bool(homes))
    except Exception as error:  # the function is sound, or tracing would have said so
        reason = error
    if _interpreter.longest_loop(traced):
        traced = again()
        try:
            program = _interpreter.compile_bodies(traced)
        except Exception:
            pass  # the first reason is the one to tell
        else:
            route.name = "compiled loop bodies"
            route.refused("the body of each loop is compiled, and run in a Python loop", reason)
            return Program(partial(_run, program, traced), traced.constants)
    route.name = "eager"
    route.refused(EAGER, reason)
    return eager


def _for_cuda(
    traced: Traced,
    again: Callable[[], Traced],
    leaves: Sequence[Tensor],
    homes: dict[int, int],
    route: Route,
) -> Program:
    """Record all of it, compiled where possible, as one CUDA graph; or else its long loops."""
    tensors = [*leaves, *traced.constants, *traced.results]
    gpu = next(x.device for x in tensors if _on_gpu(x))
    elsewhere = sum(not _on_gpu(x) or x.device != gpu for x in tensors)
    steps, longest = _interpreter.longest_loop(traced), _cuda_graphs.LONGEST
    chunks = _cuda_graphs.Chunks(longest, gpu, route.fall_back)
    loop: _interpreter.Loop = _interpreter.loop_in_python
    route.name = "CUDA graph"
    if elsewhere:
        route.name = "compiled"
        route.fall_back(
            "kernels are launched one by one",
            f"{elsewhere} arguments or results are not on {gpu}; fdl.tree.to moves them there",
        )
    elif steps > longest:
        route.name, loop = "CUDA graphs of loops", chunks
        route.fall_back(
            "only such loops are recorded, and not what surrounds them",
            f"a loop of {steps} steps is too long for one CUDA graph (at most {longest})",
        )
    try:
        program = (
            _interpreter.compile_bodies(traced, loop)
            if steps
            else _inductor.lower(traced.graph, traced.mode, _inputs(traced))
        )
    except Exception as error:
        route.name += " of single operations"
        route.refused("operations run one by one", error)
        traced = again()
        program = _interpreter.uncompiled(traced, loop)
    if elsewhere or steps > longest:
        run = partial(_run, program, traced)
        return Program(run, traced.constants, kept_graphs=chunks.kept_graphs)
    donated = set(homes.values())
    kept = [i for i in range(len(leaves) + len(traced.constants)) if i not in donated]
    recorded = _cuda_graphs.Recorded(program, kept, gpu, route.fall_back)
    run = partial(_run_recorded, recorded, traced, homes)
    return Program(run, traced.constants, bool(homes), recorded.kept_graphs)


def _on_gpu(leaf: Tensor) -> bool:
    return leaf.is_cuda


def _inputs(traced: Traced) -> list[Tensor]:
    return [node.meta["val"] for node in nodes_of(traced.graph.graph, "placeholder")]


def _eagerly(fn: Callable[..., Any], spec: Hashable) -> Callable[..., Tree]:
    def run(leaves: list[Tensor], _: Sequence[Tensor]) -> Tree:
        args, kwargs = unflatten(leaves, spec)
        results, out_spec = flatten(fn(*args, **kwargs))
        return unflatten(unshared(results, leaves), out_spec)

    return run


def _run(
    program: Compiled, traced: Traced, leaves: list[Tensor], constants: Sequence[Tensor]
) -> Tree:
    return unflatten(program([*leaves, *constants]), traced.spec)


def _run_at_home(
    program: Compiled,
    traced: Traced,
    homes: dict[int, int],
    leaves: list[Tensor],
    constants: Sequence[Tensor],
) -> Tree:
    fresh = iter(program([*leaves, *constants]))
    results = [
        leaves[homes[out]] if out in homes else next(fresh) for out in range(len(traced.results))
    ]
    return unflatten(results, traced.spec)


def _run_recorded(
    recorded: _cuda_graphs.Recorded,
    traced: Traced,
    homes: dict[int, int],
    leaves: list[Tensor],
    constants: Sequence[Tensor],
) -> Tree:
    memory = {out: leaves[i].detach() for out, i in homes.items()}
    return unflatten(recorded([*leaves, *constants], memory), traced.spec)


def _write_home(traced: Traced, homes: dict[int, int]) -> Compiled:
    """Compile a program that writes results where donated leaves were, computed right there."""
    graph = traced.graph.graph
    arguments, results = nodes_of(graph, "placeholder"), results_of(graph)
    (output,) = nodes_of(graph, "output")
    with graph.inserting_before(output):
        for out, i in homes.items():
            copy = graph.call_function(aten.copy_.default, (arguments[i], results[out]))
            copy.meta["val"] = arguments[i].meta["val"]
    output.args = ([node for out, node in enumerate(results) if out not in homes],)
    traced.graph.recompile()
    return _inductor.lower(traced.graph, traced.mode, _inputs(traced))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
