"""The process of one runner: `python -m train.bench.worker RUNNER TASK`.

Each line of standard input is a command in JSON, each line of standard output its answer. The
process ends with its input, so it does not outlive the coordinator.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from train.bench import registry, task
from train.bench.runner import Runner
from train.records import to_json

__all__ = ["Worker", "main"]


class Worker:
    """Answer commands about one runner; each method is a command."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.resident = memory("VmRSS") if runner.memory() is None else runner.memory()
        self.idle = time.perf_counter(), time.process_time()

    def first(self) -> dict[str, Any]:
        """Time the first call, which includes compiling."""
        start = time.perf_counter()
        steps = self.runner.first()
        return {"seconds": time.perf_counter() - start, "steps": steps}

    def trajectory(self, out: str) -> dict[str, Any]:
        """Train from the initial weights and write losses and parameters to a file."""
        result = self.runner.trajectory()
        params = {f"params/{k}": p for k, p in result.params.items()}
        task.save_arrays(Path(out), losses=result.losses, **params)
        return {}

    def calibrate(self, seconds: float) -> dict[str, Any]:
        """Choose how many calls make a round of at least `seconds`."""
        took = self._time(1)
        calls = max(1, math.ceil(seconds / took))
        if calls > 1:  # one short call is a poor estimate
            few = min(calls, 10)
            calls = max(1, math.ceil(seconds / (self._time(few) / few)))
        self.calls = calls
        return {"calls": calls, "steps": calls * self.runner.steps}

    def round(self) -> dict[str, Any]:
        """Time one round from the initial weights; report how busy this process was before."""
        since, used = self.idle
        idle = (time.process_time() - used) / (time.perf_counter() - since)
        seconds = self._time(self.calls)
        return {"us": seconds / (self.calls * self.runner.steps) * 1e6, "idle_cpu": idle}

    def peak(self) -> dict[str, Any]:
        """Report the most memory taken, and the memory before the first call."""
        peak = self.runner.peak()
        return {"peak": memory("VmHWM") if peak is None else peak, "start": self.resident}

    def _time(self, calls: int) -> float:
        self.runner.reset()
        self.runner.wait(())
        start = time.perf_counter()
        for _ in range(calls):
            losses = self.runner.epoch()
        self.runner.wait(losses)
        return time.perf_counter() - start


def memory(field: str) -> int:
    """Return the bytes of this process that are resident (VmRSS), or were at most (VmHWM).

    On Linux the `ru_maxrss` of a new process starts at that of the process it was forked from.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    except OSError:  # not Linux
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def collect_warnings() -> list[str]:
    """Collect warnings from here on: fdl warns if it falls back to a slower route."""
    collected: list[str] = []

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        line = str(message).strip().splitlines()[0][:300]
        if issubclass(category, UserWarning) and line not in collected:
            collected.append(line)

    warnings.showwarning = show
    return collected


def answer(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Convert an exception to an answer, so that a failed runner is one row of the table."""
    try:
        return call()
    except Exception as error:
        lines = str(error).strip().splitlines()
        return {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]}


def main(name: Any, path: Path) -> None:
    """Serve one runner until the input ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # other output goes to the errors
    worker: Worker | None = None

    def prepare() -> dict[str, Any]:
        nonlocal worker
        worker = Worker(registry.build(name, task.load(path)))
        return {}

    warned = collect_warnings()
    print(to_json(answer(prepare)), file=replies)
    for line in sys.stdin:
        command = json.loads(line)
        call = getattr(worker, command.pop("do"))
        print(to_json(answer(partial(call, **command)) | {"warned": warned}), file=replies)
        if worker is not None:
            worker.idle = time.perf_counter(), time.process_time()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
