"""How a traced function is run: the fastest way that works, and what was in the way of others."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fdl import _cuda_graphs, _inductor, _loops
from fdl._donation import find_homes
from fdl._inductor import Compiled
from fdl._trace import Traced, nodes_of, results_of, trace, unshared
from fdl.tree import Tree

__all__ = ["Program", "build"]

aten = torch.ops.aten


class Program(NamedTuple):
    """A function of the flat list of arguments."""

    run: Callable[[list[Tensor]], Tree]
    route: str
    recorded: _cuda_graphs.Recorded | None = None
    fallbacks: tuple[str, ...] = ()


def build(
    fn: Callable[..., Any], leaves: Sequence[Tensor], spec: pytree.TreeSpec, donated: Sequence[int]
) -> Program:
    """Make the program of `fn` for one form of arguments."""
    if any(leaf.is_cuda for leaf in leaves):
        return _on_cuda(fn, leaves, spec, donated)
    return _on_cpu(fn, leaves, spec, donated)


def _on_cpu(
    fn: Callable[..., Any], leaves: Sequence[Tensor], spec: pytree.TreeSpec, donated: Sequence[int]
) -> Program:
    """Compile all of `fn` as one program; or else the bodies of its loops; or nothing."""
    if not _inductor.finds_compiler():
        return Program(_eagerly(fn, spec), "eager", fallbacks=("no C++ compiler",))
    traced = trace(fn, leaves, spec)
    loops = _loops.longest_loop(traced) > 0
    homes = find_homes(leaves, donated, traced.results)
    try:
        program = _write_home(traced, homes)
        return Program(partial(_run_at_home, program, traced, homes), "one program")
    except Exception as error:  # the function is sound, or tracing would have said so
        reason = _first_line(error)
    if loops:
        instead = "the body of each loop is compiled, and run in a Python loop"
        _warn(fn, reason, instead)
        traced = trace(fn, leaves, spec)  # the first graph was written to
        program = _loops.compile_bodies(traced)
        return Program(partial(_run, program, traced), "compiled loop bodies", None, (reason,))
    _warn(fn, reason, "it runs eagerly")
    return Program(_eagerly(fn, spec), "eager", None, (reason,))


def _on_cuda(
    fn: Callable[..., Any], leaves: Sequence[Tensor], spec: pytree.TreeSpec, donated: Sequence[int]
) -> Program:
    """Record all of `fn`, compiled where possible, as one CUDA graph; or else its long loops."""
    traced = trace(fn, leaves, spec)
    homes = find_homes(leaves, donated, traced.results)
    steps, fallbacks = _loops.longest_loop(traced), []
    loop: _loops.Loop = _loops.loop_in_python
    if steps > _cuda_graphs.LONGEST:
        loop = _cuda_graphs.loop_in_chunks(_cuda_graphs.LONGEST)
        fallbacks.append(
            f"a loop of {steps} steps is too long for one graph (at most {_cuda_graphs.LONGEST}); "
            "what surrounds it runs outside a graph"
        )
    try:
        program = (
            _loops.compile_bodies(traced, loop)
            if steps
            else _inductor.lower(traced.graph, traced.mode, _inputs(traced))
        )
    except Exception as error:
        fallbacks.append(_first_line(error))
        _warn(fn, fallbacks[-1], "its operations run one by one")
        traced = trace(fn, leaves, spec)
        program = _loops.uncompiled(traced, loop)
    elsewhere = [leaf for leaf in leaves if not leaf.is_cuda]
    if elsewhere:
        fallbacks.append(f"{len(elsewhere)} arguments are not on the GPU; move them with tree.to")
    if fallbacks and (elsewhere or steps > _cuda_graphs.LONGEST):
        return Program(partial(_run, program, traced), "compiled", None, tuple(fallbacks))
    count = len(leaves) + len(traced.constants)
    recorded = _cuda_graphs.record(program, [i for i in range(count) if i not in donated])
    run = partial(_run_recorded, recorded, traced, homes)
    return Program(run, "CUDA graph", recorded, tuple(fallbacks))


def _inputs(traced: Traced) -> list[Tensor]:
    return [node.meta["val"] for node in nodes_of(traced.graph.graph, "placeholder")]


def _eagerly(fn: Callable[..., Any], spec: pytree.TreeSpec) -> Callable[[list[Tensor]], Tree]:
    def run(leaves: list[Tensor]) -> Tree:
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        results, out_spec = pytree.tree_flatten(fn(*args, **kwargs))
        return pytree.tree_unflatten(unshared(results, leaves), out_spec)

    return run


def _run(program: Compiled, traced: Traced, leaves: list[Tensor]) -> Tree:
    return pytree.tree_unflatten(program([*leaves, *traced.constants]), traced.spec)


def _run_at_home(
    program: Compiled, traced: Traced, homes: dict[int, int], leaves: list[Tensor]
) -> Tree:
    fresh = iter(program([*leaves, *traced.constants]))
    results = [
        leaves[homes[out]].detach() if out in homes else next(fresh)
        for out in range(len(traced.results))
    ]
    return pytree.tree_unflatten(results, traced.spec)


def _run_recorded(
    recorded: _cuda_graphs.Recorded, traced: Traced, homes: dict[int, int], leaves: list[Tensor]
) -> Tree:
    memory = {out: leaves[i].detach() for out, i in homes.items()}
    return pytree.tree_unflatten(recorded.run([*leaves, *traced.constants], memory), traced.spec)


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


def _warn(fn: Callable[..., Any], reason: str, instead: str) -> None:
    warnings.warn(
        f"jit: torch's compiler refused {fn!r}; {instead}, which is slower. "
        f"The reason was: {reason}",
        stacklevel=2,
    )
