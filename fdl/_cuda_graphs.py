"""Programs recorded as CUDA graphs: launched by one call, however many kernels they have.

A recorded program reads and writes fixed addresses. So its arguments are copied into tensors that
the program owns and its results out of them; large arguments, a data set say, are read where they
are, for as long as they stay there.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fdl._inductor import Compiled
from fdl._loops import Loop, loop_in_python

__all__ = ["LONGEST", "Recorded", "loop_in_chunks", "record"]

LARGE = 2**20  # bytes from which on an argument is not copied
LONGEST = 2000  # steps in one graph: recording takes about 0.1 ms a step, and memory


class Recorded(NamedTuple):
    """A recorded program."""

    run: Callable[[list[Tensor], dict[int, Tensor] | None], list[Tensor]]
    # of inputs, and of the memory to write some of the results to
    memory: Callable[[], int]  # bytes that it owns


def _capture(run: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
    """Record what `run` launches: a function that launches it again, and where results will be."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # kernels are loaded and libraries set up at the first run, which is not recorded
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph.replay, results


def record(program: Compiled, kept: Sequence[int]) -> Recorded:
    """Record a program at its first call.

    Args:
        program: what to record; pure, so that running it to warm up changes nothing.
        kept: inputs that the caller keeps, so that they may be read where they are.
    """
    static: list[Tensor] = []
    results: list[Tensor] = []
    in_place: list[int] = []  # inputs read where the caller has them
    replay: Callable[[], None] = lambda: None  # noqa: E731
    owned = 0

    def prepare(inputs: list[Tensor]) -> None:
        nonlocal replay, results, static, in_place, owned
        if static:  # an input that was read in place came from elsewhere: from now on copy it
            in_place = [i for i in in_place if inputs[i].data_ptr() == static[i].data_ptr()]
        else:
            in_place = [i for i in kept if inputs[i].nbytes >= LARGE]
        before = _allocated(inputs)
        replay, results, static = lambda: None, [], []  # free the old ones
        static = [x if i in in_place else x.clone() for i, x in enumerate(inputs)]
        replay, results = _capture(lambda: program(list(static)))
        owned = _allocated(inputs) - before

    def run(inputs: list[Tensor], homes: dict[int, Tensor] | None) -> list[Tensor]:
        if not static or any(inputs[i].data_ptr() != static[i].data_ptr() for i in in_place):
            prepare(inputs)
        copied = [i for i in range(len(inputs)) if i not in in_place]
        _copy([static[i] for i in copied], [inputs[i] for i in copied])
        replay()
        homes = homes or {}
        outs = [homes[i] if i in homes else torch.empty_like(r) for i, r in enumerate(results)]
        _copy(outs, results)
        return outs

    return Recorded(run, lambda: owned)


def loop_in_chunks(steps: int) -> Loop:
    """Make a loop that launches `steps` recorded steps at a time; for loops too long for one graph.

    Only such loops are recorded then, not what surrounds them.
    """
    recorded: dict[tuple[int, int], Recorded] = {}

    def loop(
        body: Compiled, init: list[Tensor], xs: list[Tensor], constants: list[Tensor]
    ) -> list[Tensor]:
        n, m = len(init), len(xs)

        def chunk(inputs: list[Tensor]) -> list[Tensor]:
            return loop_in_python(body, inputs[:n], inputs[n : n + m], inputs[n + m :])

        carry, parts = init, []
        for rows in zip(*(x.split(steps) for x in xs), strict=True):
            key = (id(body), len(rows[0]))  # the last chunk may be shorter
            if key not in recorded:
                recorded[key] = record(chunk, range(n + m, n + m + len(constants)))
            out = recorded[key].run([*carry, *rows, *constants], None)
            carry = out[:n]
            parts.append(out[n:])
        return [*carry, *(torch.cat(ys) for ys in zip(*parts, strict=True))]

    return loop


def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    """Copy lists of tensors, those of one dtype in one launch."""
    for dtype in {x.dtype for x in to}:
        pairs = [(a, b) for a, b in zip(to, source, strict=True) if a.dtype == dtype]
        torch._foreach_copy_([a for a, _ in pairs], [b for _, b in pairs])


def _allocated(inputs: list[Tensor]) -> int:
    return torch.cuda.memory_allocated(inputs[0].device) if inputs[0].is_cuda else 0
