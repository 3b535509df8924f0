"""Programs: compiled functions of leaves, which build the trees of their results."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from fdl._compiler._digest import Digest
from fdl._compiler._dispatch import Direct
from fdl._compiler._inductor import Compiled
from fdl._compiler._signature import flatten, positions, unflatten
from fdl._compiler._trace import Traced, copy_aliases
from fdl.tree import Tree


class Program(NamedTuple):
    """A compiled function of the leaves of the arguments and of the closed-over tensors."""

    run: Callable[[list[Tensor], Sequence[Tensor]], Tree]
    constants: Sequence[Tensor] = ()  # the tensors closed over when it was traced
    writes: bool = False  # to the memory of donated arguments
    kept_graphs: Callable[[], tuple[int, int]] = lambda: (0, 0)  # number of CUDA graphs, bytes
    direct: Direct | None = None  # the same, for dispatch in C++
    digest: Digest | None = None  # what it computes


def eagerly(fn: Callable[..., Any], spec: Hashable) -> Callable[..., Tree]:
    def run(leaves: list[Tensor], _: Sequence[Tensor]) -> Tree:
        args, kwargs = unflatten(leaves, spec)
        results, out_spec = flatten(fn(*args, **kwargs))
        return unflatten(copy_aliases(results, leaves), out_spec)

    return run


def program_of(
    compiled: Compiled,
    traced: Traced,
    aliases: dict[int, int] | None = None,
    writes: bool = False,
) -> Program:
    """Make a program of a compiled graph.

    Args:
        compiled: the compiled graph; it does not return the results in `aliases`.
        traced: what it was compiled from.
        aliases: indices of the donated arguments that results are written to.
        writes: it writes to donated arguments in another way.
    """
    aliases = aliases or {}
    writes = writes or bool(aliases)
    direct = Direct(compiled, traced.spec, len(traced.results), aliases, writes)
    return Program(partial(_run, direct), traced.constants, writes, direct=direct)


def reordered(
    program: Program, direct: Direct, arguments: Hashable, new: Hashable, results: Hashable
) -> Program:
    """Make a program for arguments and results whose dicts have their keys in another order.

    Args:
        program: the program.
        direct: the same.
        arguments: structure of its arguments.
        new: structure of the arguments from now on.
        results: structure of the results from now on.
    """
    direct = direct._replace(
        spec=results,
        places=positions(arguments, new),
        result_places=positions(results, direct.spec),
    )
    return program._replace(run=partial(_run, direct), direct=direct)


def _run(direct: Direct, leaves: list[Tensor], constants: Sequence[Tensor]) -> Tree:
    inputs = [leaves[i] for i in direct.places] if direct.places else leaves
    new = iter(direct.run([*inputs, *constants]))
    results = [
        inputs[direct.aliases[out]] if out in direct.aliases else next(new)
        for out in range(direct.results)
    ]
    if direct.result_places:
        results = [results[i] for i in direct.result_places]
    return unflatten(results, direct.spec)
