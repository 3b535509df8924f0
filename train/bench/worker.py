"""The process that one runner runs in: `python -m train.bench.worker RUNNER TASK`.

Each line on standard input is a command in JSON, each line on standard output its answer. It ends
with its input, so it does not outlive the coordinator.
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

__all__ = ["Worker", "main"]


class Worker:
    """Answers commands about one runner; each method is one."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.resident = memory("VmRSS") if runner.memory() is None else runner.memory()
        self.idle = time.perf_counter(), time.process_time()

    def first(self) -> dict[str, Any]:
        """Time the first call: what was not computed or compiled before is part of it."""
        start = time.perf_counter()
        steps = self.runner.first()
        return {"seconds": time.perf_counter() - start, "steps": steps}

    def trajectory(self, out: str) -> dict[str, Any]:
        """Write where training goes from the initial weights."""
        found = self.runner.trajectory()
        params = {f"params/{k}": p for k, p in found.params.items()}
        task.save_arrays(Path(out), losses=found.losses, **params)
        return {}

    def calibrate(self, seconds: float) -> dict[str, Any]:
        """Choose how many calls make a round of so many seconds."""
        took = self._time(1)
        calls = max(1, math.ceil(seconds / took))
        if calls > 1:  # the one call was short: a few are a better guess
            few = min(calls, 10)
            calls = max(1, math.ceil(seconds / (self._time(few) / few)))
        self.calls = calls
        return {"calls": calls, "steps": calls * self.runner.steps}

    def round(self) -> dict[str, Any]:
        """Time one round, from the initial weights; say how busy this process was before it."""
        since, used = self.idle
        idle = (time.process_time() - used) / (time.perf_counter() - since)
        seconds = self._time(self.calls)
        return {"us": seconds / (self.calls * self.runner.steps) * 1e6, "idle_cpu": idle}

    def peak(self) -> dict[str, Any]:
        """Say how much memory was taken at most, and before the first call."""
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
    """Read how many bytes of this process are resident (VmRSS), or were at most (VmHWM).

    The `ru_maxrss` of a new process starts, on Linux, at that of the process it was forked from.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    except OSError:  # not Linux
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def hear_warnings() -> list[str]:
    """Collect the user's warnings from here on: fdl says by one that it fell back to a loop."""
    heard: list[str] = []

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        said = str(message).strip().splitlines()[0][:300]
        if issubclass(category, UserWarning) and said not in heard:
            heard.append(said)

    warnings.showwarning = show
    return heard


def answer(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Turn an exception into an answer: one bad runner is one line of the table."""
    try:
        return call()
    except Exception as error:
        said = str(error).strip().splitlines()
        return {"error": f"{type(error).__name__}: {said[0] if said else ''}"[:200]}


def main(name: Any, path: Path) -> None:
    """Serve one runner until the input ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed belongs with the errors
    worker: Worker | None = None

    def prepare() -> dict[str, Any]:
        nonlocal worker
        worker = Worker(registry.build(name, task.load(path)))
        return {}

    warned = hear_warnings()
    print(json.dumps(answer(prepare), allow_nan=False), file=replies)
    for line in sys.stdin:
        command = json.loads(line)
        call = getattr(worker, command.pop("do"))
        print(
            json.dumps(answer(partial(call, **command)) | {"warned": warned}, allow_nan=False),
            file=replies,
        )
        if worker is not None:
            worker.idle = time.perf_counter(), time.process_time()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
