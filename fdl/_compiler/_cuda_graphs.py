"""Programs recorded as CUDA graphs: launched by one call, however many kernels they have.

A recorded program reads and writes fixed addresses. So its arguments are copied into tensors that
the program owns and its results out of them; large arguments, a data set say, are read where they
are, for as long as they stay there.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fdl._compiler._inductor import Compiled
from fdl._compiler._interpreter import loop_in_python

LARGE = 2**20  # bytes from which on an argument is not copied
LONGEST = 2000  # steps in one graph: recording takes about 0.1 ms a step, and memory

FallBack = Callable[[str, str], None]  # takes what is done instead, and why; may raise


class _Graph(NamedTuple):
    replay: Callable[[], None]
    results: list[Tensor]  # where each replay leaves them
    memory: Callable[[], int]  # bytes that it keeps for results and what comes in between


class Recorded:
    """A program that is recorded when it is first called, and again once a large argument moved."""

    def __init__(
        self,
        program: Compiled,
        kept: Collection[int],
        device: torch.device,
        fall_back: FallBack,
    ) -> None:
        """Take a pure program.

        Args:
            program: what to record; it is run once more beforehand.
            kept: inputs that the caller keeps, so that they may be read where they are.
            device: the one device of all inputs and results.
            fall_back: told when the program cannot be recorded; it is run as it is from then on.
        """
        self.program, self.kept, self.device, self.fall_back = program, kept, device, fall_back
        self.graph: _Graph | None = None
        self.own: dict[int, Tensor] = {}  # inputs that are copied here
        self.addresses: dict[int, int] = {}  # of inputs that are read where they are
        self.refused = False

    def __call__(
        self, inputs: list[Tensor], homes: dict[int, Tensor] | None = None
    ) -> list[Tensor]:
        """Run the program; some results may be written to memory that is given for them."""
        if self.refused:
            return self.program(inputs)
        with _one_at_a_time(self.device):
            moved = [i for i, there in self.addresses.items() if inputs[i].data_ptr() != there]
            if moved:  # from now on they are copied
                self.kept, self.graph = self.addresses.keys() - moved, None
            if self.graph is None:
                try:
                    self.graph = self._record(inputs)
                except RuntimeError as error:
                    self.own, self.addresses = {}, {}
                    reason = f"recording a CUDA graph failed: {error}".splitlines()[0]
                    self.fall_back("kernels are launched one by one", reason)
                    self.refused = True
                    return self.program(inputs)
            else:
                _copy(list(self.own.values()), [inputs[i] for i in self.own])
            self.graph.replay()
            found = self.graph.results
            homes = homes or {}
            results = [homes[i] if i in homes else torch.empty_like(x) for i, x in enumerate(found)]
            _copy(results, found)
            return results

    def kept_graphs(self) -> tuple[int, int]:
        """Count its graphs, and the bytes that are kept from one call to the next."""
        copies = sum(x.untyped_storage().nbytes() for x in self.own.values())
        return (1, copies + self.graph.memory()) if self.graph else (0, 0)

    def _record(self, inputs: list[Tensor]) -> _Graph:
        self.addresses = {i: inputs[i].data_ptr() for i in self.kept if inputs[i].nbytes >= LARGE}
        self.own = {
            i: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            for i, x in enumerate(inputs)
            if i not in self.addresses
        }
        _copy(list(self.own.values()), [inputs[i] for i in self.own])
        static = [self.own.get(i, x) for i, x in enumerate(inputs)]
        return _capture(lambda: self.program(list(static)))


class Chunks:
    """A loop that launches so many recorded steps at a time; for one too long for one graph.

    Only such loops are recorded then, not what surrounds them.
    """

    def __init__(self, steps: int, device: torch.device, fall_back: FallBack) -> None:
        self.steps, self.device, self.fall_back = steps, device, fall_back
        self.recorded: dict[tuple[int, int], Recorded] = {}

    def __call__(
        self, body: Compiled, init: list[Tensor], xs: list[Tensor], constants: list[Tensor]
    ) -> list[Tensor]:
        """Run `[*carry, *row, *constants] -> [*carry, *y]` over the rows of xs; stack the ys."""
        n, m = len(init), len(xs)

        def chunk(inputs: list[Tensor]) -> list[Tensor]:
            return loop_in_python(body, inputs[:n], inputs[n : n + m], inputs[n + m :])

        carry, parts = init, []
        for rows in zip(*(x.split(self.steps) for x in xs), strict=True):
            key = (id(body), len(rows[0]))  # the last chunk may be shorter
            if key not in self.recorded:
                kept = range(n + m, n + m + len(constants))
                self.recorded[key] = Recorded(chunk, kept, self.device, self.fall_back)
            out = self.recorded[key]([*carry, *rows, *constants])
            carry = out[:n]
            parts.append(out[n:])
        return [*carry, *(torch.cat(ys) for ys in zip(*parts, strict=True))]

    def kept_graphs(self) -> tuple[int, int]:
        """Count its graphs, and the bytes that they keep."""
        counts = [recorded.kept_graphs() for recorded in self.recorded.values()]
        return sum(graphs for graphs, _ in counts), sum(memory for _, memory in counts)


def _capture(run: Callable[[], list[Tensor]]) -> _Graph:
    """Record what `run` launches."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # kernels are loaded and libraries set up at the first run, which is not recorded
    torch.cuda.current_stream().wait_stream(stream)
    # Each graph gets workspaces of cuBLAS in its own memory, since those of another may be freed.
    torch._C._cuda_clearCublasWorkspaces()
    try:
        # The outer context puts the stream back, which torch 2.11 does not where recording fails;
        # another thread may use CUDA meanwhile ("thread_local").
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            warnings.catch_warnings(),
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            # It is where recording fails, of which more is said than that.
            warnings.filterwarnings("ignore", "The CUDA Graph is empty", UserWarning)
            results = run()
    finally:
        torch._C._cuda_clearCublasWorkspaces()

    def memory() -> int:
        segments = torch.cuda.memory_snapshot(graph.pool(), include_traces=False)
        return sum(segment["total_size"] for segment in segments)

    return _Graph(graph.replay, results, memory)


_last: dict[torch.device, torch.cuda.Stream] = {}


@contextmanager
def _one_at_a_time(device: torch.device) -> Iterator[None]:
    """Let recorded programs of a device wait for each other, on whatever streams they are called.

    Each has memory of its own that its next run would overwrite.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream()
        last = _last.get(device)
        if last is not None and last != stream:
            stream.wait_stream(last)
        _last[device] = stream
        yield


def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    """Copy lists of tensors, those of one dtype in one launch."""
    groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for a, b in zip(to, source, strict=True):
        if 0 in a.stride():  # expanded: one of the repetitions is enough, and all that can be
            once = tuple(slice(None if stride else 1) for stride in a.stride())
            a, b = a[once], b[once]
        targets, sources = groups[a.dtype]
        targets.append(a)
        sources.append(b)
    for targets, sources in groups.values():
        torch._foreach_copy_(targets, sources)
