"""Time what a call costs besides its work: `python -m train.bench.speed_calls`.

A step adds 1 to every leaf of a state, of layers `{"w": [8, 8], "b": [8]}`, and is called in a
Python loop. Rounds are interleaved in one process; the ratios are those of medians, to `jax.jit`.
Microseconds a call; the first call is in seconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import fdl

State = dict[str, dict[str, Any]]


def layers(leaves: int, zeros: Callable[[tuple[int, ...]], Any]) -> State:
    """Return a state of pairs of leaves."""
    return {f"layer{i}": {"w": zeros((8, 8)), "b": zeros((8,))} for i in range(leaves // 2)}


def step(state: State) -> State:
    """Do as little as a step can."""
    return {name: {key: x + 1 for key, x in layer.items()} for name, layer in state.items()}


def ways(leaves: int) -> dict[str, tuple[Callable[[State], State], State]]:
    """Return the step by each library, and the state it starts from."""
    by_way: dict[str, tuple[Callable[[State], State], State]] = {
        "fdl.jit, donated": (fdl.jit(step, donate_argnums=0), layers(leaves, torch.zeros)),
        "fdl.jit": (fdl.jit(step), layers(leaves, torch.zeros)),
        "torch.compile": (torch.compile(step), layers(leaves, torch.zeros)),
    }
    try:
        import jax
    except ImportError:
        return by_way
    return by_way | {
        "jax.jit, donated": (jax.jit(step, donate_argnums=0), layers(leaves, jax.numpy.zeros)),
        "jax.jit": (jax.jit(step), layers(leaves, jax.numpy.zeros)),
    }


def measure(leaves: int, rounds: int, calls: int) -> None:
    """Print the time of a call with a state of so many leaves."""
    torch._dynamo.reset()
    runs = ways(leaves)
    states = {way: state for way, (_, state) in runs.items()}
    first, times = {}, {way: list[float]() for way in runs}
    for way, (run, _) in runs.items():
        began = time.perf_counter()
        states[way] = run(states[way])
        first[way] = time.perf_counter() - began
    for _ in range(rounds):
        for way, (run, _) in runs.items():
            state = run(states[way])
            began = time.perf_counter()
            for _ in range(calls):
                state = run(state)
            float(state["layer0"]["b"][0])  # waits for the last
            times[way].append(1e6 * (time.perf_counter() - began) / calls)
            states[way] = state
    medians = {way: statistics.median(ts) for way, ts in times.items()}
    for way, median in medians.items():
        ratio = median / medians.get("jax.jit, donated" if "donated" in way else "jax.jit", median)
        print(f"| {leaves} | {way} | {median:.1f} | {ratio:.2f} | {first[way]:.1f} |", flush=True)


def main() -> None:
    """Measure states of the given sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--calls", type=int, default=100, help="calls in a round")
    parser.add_argument("leaves", nargs="*", type=int, default=[2, 20, 200, 1000])
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ratios to jax.jit")
    print("\n| leaves | | µs a call | ratio | first call, s |\n|---:|---|---:|---:|---:|")
    for leaves in args.leaves:
        measure(leaves, args.rounds, args.calls)


if __name__ == "__main__":
    main()
