"""CUDA graphs of programs: one launch, however many kernels they have.

A graph reads and writes fixed addresses. So the arguments are copied into static tensors of the
program, and the results out of them. Large arguments, such as a data set, are read in place as long
as they do not move.
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

LARGE = 2**20  # bytes; an argument of this size or more is read in place
LONGEST = 2000  # steps in one graph: capture takes about 0.1 ms and some memory per step

FallBack = Callable[[str, str], None]  # (what happens instead, reason); may raise


class _Graph(NamedTuple):
    replay: Callable[[], None]
    results: list[Tensor]  # every replay overwrites them
    memory: Callable[[], int]  # bytes kept for results and intermediate values


class GraphedProgram:
    """A program that runs as a CUDA graph: captured at the first call.

    It is captured again if an input that it reads in place has moved.
    """

    def __init__(
        self,
        program: Compiled,
        kept: Collection[int],
        device: torch.device,
        fall_back: FallBack,
    ) -> None:
        """Wrap a pure program.

        Args:
            program: the program to capture; it runs once before that.
            kept: indices of inputs that the caller keeps, which may be read in place.
            device: the one device of all inputs and results.
            fall_back: called if capture fails; the program then runs without a graph.
        """
        self.program, self.kept, self.device, self.fall_back = program, kept, device, fall_back
        self.graph: _Graph | None = None
        self.static: dict[int, Tensor] = {}  # copies of inputs, which the graph reads
        self.addresses: dict[int, int] = {}  # of inputs that it reads in place
        self.failed = False

    def __call__(
        self, inputs: list[Tensor], buffers: dict[int, Tensor] | None = None
    ) -> list[Tensor]:
        """Run the program; the results in `buffers`, by index, are written to the given memory."""
        if self.failed:
            return self.program(inputs)
        with _one_at_a_time(self.device):
            moved = [i for i, old in self.addresses.items() if inputs[i].data_ptr() != old]
            if moved:  # copy these from now on
                self.kept, self.graph = self.addresses.keys() - moved, None
            if self.graph is None:
                try:
                    self.graph = self._capture(inputs)
                except RuntimeError as error:
                    self.static, self.addresses = {}, {}
                    reason = f"capturing a CUDA graph failed: {error}".splitlines()[0]
                    self.fall_back("kernels are launched one by one", reason)
                    self.failed = True
                    return self.program(inputs)
            else:
                _copy(list(self.static.values()), [inputs[i] for i in self.static])
            self.graph.replay()
            buffers = buffers or {}
            results = [
                buffers[i] if i in buffers else torch.empty_like(x)
                for i, x in enumerate(self.graph.results)
            ]
            _copy(results, self.graph.results)
            return results

    def kept_graphs(self) -> tuple[int, int]:
        """Return the number of graphs, and the bytes kept between calls."""
        copies = sum(x.untyped_storage().nbytes() for x in self.static.values())
        return (1, copies + self.graph.memory()) if self.graph else (0, 0)

    def _capture(self, inputs: list[Tensor]) -> _Graph:
        self.addresses = {i: inputs[i].data_ptr() for i in self.kept if inputs[i].nbytes >= LARGE}
        self.static = {
            i: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            for i, x in enumerate(inputs)
            if i not in self.addresses
        }
        _copy(list(self.static.values()), [inputs[i] for i in self.static])
        graph_inputs = [self.static.get(i, x) for i, x in enumerate(inputs)]
        return _capture(lambda: self.program(list(graph_inputs)))


class ChunkedLoop:
    """Run a loop that is too long for one CUDA graph as graphs of `steps` steps each."""

    def __init__(self, steps: int, device: torch.device, fall_back: FallBack) -> None:
        self.steps, self.device, self.fall_back = steps, device, fall_back
        self.chunks: dict[tuple[int, int], GraphedProgram] = {}

    def __call__(
        self, body: Compiled, init: list[Tensor], xs: list[Tensor], constants: list[Tensor]
    ) -> list[Tensor]:
        """Run `[*carry, *row, *constants] -> [*carry, *y]` over the rows of `xs`; stack the ys."""
        n, m = len(init), len(xs)

        def chunk(inputs: list[Tensor]) -> list[Tensor]:
            return loop_in_python(body, inputs[:n], inputs[n : n + m], inputs[n + m :])

        carry, parts = init, []
        for rows in zip(*(x.split(self.steps) for x in xs), strict=True):
            key = (id(body), len(rows[0]))  # the last chunk may be shorter
            if key not in self.chunks:
                kept = range(n + m, n + m + len(constants))
                self.chunks[key] = GraphedProgram(chunk, kept, self.device, self.fall_back)
            out = self.chunks[key]([*carry, *rows, *constants])
            carry = out[:n]
            parts.append(out[n:])
        return [*carry, *(torch.cat(ys) for ys in zip(*parts, strict=True))]

    def kept_graphs(self) -> tuple[int, int]:
        """Return the number of graphs, and the bytes kept between calls."""
        counts = [chunk.kept_graphs() for chunk in self.chunks.values()]
        return sum(graphs for graphs, _ in counts), sum(memory for _, memory in counts)


def _capture(run: Callable[[], list[Tensor]]) -> _Graph:
    """Capture the kernels that `run` launches."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # not captured: the first run loads kernels and sets up libraries
    torch.cuda.current_stream().wait_stream(stream)
    # Give each graph its own cuBLAS workspaces: those of another graph may be freed.
    torch._C._cuda_clearCublasWorkspaces()
    try:
        # The outer context restores the stream, which torch 2.11 does not do if capture fails.
        # "thread_local" lets other threads use CUDA meanwhile.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            warnings.catch_warnings(),
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            # torch also warns when capture fails; our own message says more.
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
    """Serialise the graphs of a device, on whatever streams they are called.

    The next run of a graph overwrites its static tensors.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream()
        last = _last.get(device)
        if last is not None and last != stream:
            stream.wait_stream(last)
        _last[device] = stream
        yield


def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    """Copy tensors to tensors, with one launch per dtype."""
    groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for a, b in zip(to, source, strict=True):
        if 0 in a.stride():  # expanded: copy one of the repetitions, which share their memory
            once = tuple(slice(None if stride else 1) for stride in a.stride())
            a, b = a[once], b[once]
        targets, sources = groups[a.dtype]
        targets.append(a)
        sources.append(b)
    for targets, sources in groups.values():
        torch._foreach_copy_(targets, sources)
