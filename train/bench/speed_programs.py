"""Time the steps of the programs in `tests/programs`: `python -m train.bench.speed_programs`.

Each program runs eagerly, by `torch.compile` and by `fdl.jit` as a loop of steps, and as one jitted
`fdl.scan`. Rounds are interleaved in one process; the ratios are those of medians, to
`torch.compile`. Results are compared with eager Python's before anything is timed; a way that fails
or differs has the time inf.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

import fdl
from fdl import tree
from tests.support.programs import (
    NAMES,
    Program,
    check_equal,
    leave_forward_mode,
    load,
    loop,
)

Step = Callable[[Any, Any], tuple[Any, Any]]


def measure(name: str, rounds: int, repeats: int) -> None:
    """Print the time of a step of one program, by each way."""
    program = load(name)
    state, xs = program.init(), program.xs()
    xs = tree.map(lambda leaf: torch.cat([leaf] * repeats), xs)

    def looped(step: Step) -> Callable[[], Any]:
        return lambda: loop(step, state, xs)

    scan = fdl.jit(lambda state, xs: fdl.scan(program.step, state, xs))
    ways: dict[str, Callable[[], Any]] = {
        "eager": looped(program.step),
        "torch.compile": looped(torch.compile(program.step)),
        "jit": looped(fdl.jit(program.step)),
        "scan": lambda: scan(state, xs),
    }
    torch._dynamo.reset()
    expected = ways["eager"]()
    first = {way: _first_call(program, run, expected) for way, run in ways.items()}
    for thread in threading.enumerate():
        if thread.name == "fdl-dispatch":  # compiles what makes calls fast, once a machine
            thread.join()
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in [way for way in ways if first[way] < math.inf]:
            began = time.perf_counter()
            ways[way]()
            times[way].append(1e6 * (time.perf_counter() - began) / len(tree.leaves(xs)[0]))
    median = {way: statistics.median(ts or [math.inf]) for way, ts in times.items()}
    cells = [f"{median[way]:.0f}" for way in ways]
    ratios = [f"{median[way] / median['torch.compile']:.2f}" for way in ("jit", "scan")]
    firsts = [f"{first[way]:.1f}" for way in ("torch.compile", "jit", "scan")]
    print(f"| {name} | {' | '.join([*cells, *ratios, *firsts])} |", flush=True)


def _first_call(program: Program, run: Callable[[], Any], expected: Any) -> float:
    """Return the seconds of the first call, or inf if it fails or gives other results."""
    began = time.perf_counter()
    try:
        _, ys = run()
        seconds = time.perf_counter() - began
        # Rounding grows along a chaotic trajectory: only the first rows are compared.
        check_equal(program, *(tree.map(lambda leaf: leaf[:4], part) for part in (ys, expected[1])))
    except Exception as error:
        print(f"{type(error).__name__}: {error}".partition("\n")[0][:120], file=sys.stderr)
        leave_forward_mode()
        return math.inf
    return seconds


def main() -> None:
    """Measure every program, or those that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--repeats", type=int, default=10, help="times that the rows are repeated")
    parser.add_argument("programs", nargs="*", default=NAMES, help="of these")
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; microseconds a step, "
        "ratios to torch.compile, seconds of the first call\n\n"
        "| | eager | torch.compile | jit | scan | jit / | scan / | first | jit | scan |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    for name in args.programs:
        measure(name, args.rounds, args.repeats)


if __name__ == "__main__":
    main()
