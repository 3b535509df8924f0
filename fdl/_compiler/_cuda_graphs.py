"""CUDA graphs of programs: one launch, however many kernels they have.

A graph reads and writes fixed addresses. So the arguments are copied into static tensors of the
program, and the results out of them. Large arguments, such as a data set, are read in place as long
as they do not move. Donated arguments are read and written in place if they are the results of the
last call, as in a loop of steps: then nothing of the state is copied.
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
MOST = 8  # captures of a program for donated arguments at other addresses
LONGEST = 2000  # steps in one graph: capture takes about 0.1 ms and some memory per step

FallBack = Callable[[str, str], None]  # (what happens instead, reason); may raise


class _Graph(NamedTuple):
    replay: Callable[[], None]
    results: list[Tensor | None]  # every replay overwrites them; None: written to an argument
    memory: Callable[[], int]  # bytes kept for results and intermediate values


class GraphedProgram:
    """A program that runs as a CUDA graph: captured at the first call.

    It is captured again if an input that it reads or writes in place has moved.
    """

    def __init__(
        self,
        program: Compiled,
        kept: Collection[int],
        device: torch.device,
        fall_back: FallBack,
        aliases: dict[int, int] | None = None,
    ) -> None:
        """Wrap a pure program.

        Args:
            program: the program to capture; it runs once before that.
            kept: indices of inputs that the caller keeps, which may be read in place.
            device: the one device of all inputs and results.
            fall_back: called if capture fails; the program then runs without a graph.
            aliases: results that are written to the memory of donated inputs, and these.
        """
        self.program, self.kept, self.device, self.fall_back = program, kept, device, fall_back
        self.aliases = aliases or {}
        self.graph: _Graph | None = None
        self.static: dict[int, Tensor] = {}  # copies of inputs, which the graph reads
        self.addresses: dict[int, int] = {}  # of inputs that it reads in place
        self.written: dict[int, int] = {}  # addresses of inputs that it writes in place
        self.donated: dict[int, int] = {}  # addresses of donated inputs in the last call
        self.captures = 0
        self.failed = False

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        """Run the program; the results in `aliases` are written to the memory of these inputs."""
        if self.failed:
            return self.program(inputs)
        with _one_at_a_time(self.device):
            donated = {i: inputs[i].data_ptr() for i in self.aliases.values()}
            moved = [i for i, old in self.addresses.items() if inputs[i].data_ptr() != old]
            if moved:  # copy these from now on
                self.kept, self.graph = self.addresses.keys() - moved, None
            # The results of the last call come again, or come for the first time.
            again = donated == self.donated or not self.captures
            in_place = again and self.captures < MOST
            if self.written not in ({}, donated) or (in_place and self.written != donated):
                self.graph = None
            self.donated = donated
            if self.graph is None:
                try:
                    self.graph = self._capture(inputs, donated if in_place else {})
                except RuntimeError as error:
                    self.static, self.addresses, self.written = {}, {}, {}
                    reason = f"capturing a CUDA graph failed: {error}".splitlines()[0]
                    self.fall_back("kernels are launched one by one", reason)
                    self.failed = True
                    return self.program(inputs)
            else:
                _copy(list(self.static.values()), [inputs[i] for i in self.static])
            self.graph.replay()
            return self._take(self.graph, inputs)

    def _take(self, graph: _Graph, inputs: list[Tensor]) -> list[Tensor]:
        """Return the results of a replay, outside of the memory of the graph."""
        results = {out: inputs[i].detach() for out, i in self.aliases.items()}
        computed = {out: x for out, x in enumerate(graph.results) if x is not None}
        for out, x in computed.items():
            if out not in results:
                results[out] = torch.empty_like(x)
        _copy([results[out] for out in computed], list(computed.values()))
        return [results[out] for out in range(len(graph.results))]

    def kept_graphs(self) -> tuple[int, int]:
        """Return the number of graphs, and the bytes kept between calls."""
        copies = sum(x.untyped_storage().nbytes() for x in self.static.values())
        return (1, copies + self.graph.memory()) if self.graph else (0, 0)

    def _capture(self, inputs: list[Tensor], written: dict[int, int]) -> _Graph:
        self.captures += 1
        self.written = written
        self.addresses = {i: inputs[i].data_ptr() for i in self.kept if inputs[i].nbytes >= LARGE}
        self.static = {
            i: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            for i, x in enumerate(inputs)
            if i not in self.addresses and i not in written
        }
        _copy(list(self.static.values()), [inputs[i] for i in self.static])
        graph_inputs = [self.static.get(i, x) for i, x in enumerate(inputs)]
        into = {out: inputs[i] for out, i in self.aliases.items() if i in written}
        return _capture(self.program, graph_inputs, into)


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


def _capture(program: Compiled, inputs: list[Tensor], into: dict[int, Tensor]) -> _Graph:
    """Capture the kernels of a program.

    Args:
        program: the program.
        inputs: its inputs, whose memory each replay reads.
        into: inputs that replays also write to, by the index of the result.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        program(list(inputs))  # not captured: the first run loads kernels and sets up libraries
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
            computed = program(list(inputs))
            _copy(list(into.values()), [computed[out] for out in into])
            results = [None if out in into else x for out, x in enumerate(computed)]
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
