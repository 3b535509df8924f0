"""Processes that are killed at random moments.

`python -m tests.workers.kill_worker saving|training FOLDER KILLS`.

One process imports torch once and forks those that work, so that hundreds of deaths take seconds.
Prints what it saw as JSON; whatever is wrong raises.
"""

import contextlib
import io
import json
import os
import random as numbers
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fdl import TrainState, optim, random
from fdl.checkpointing import Checkpointer, restore
from train import planning
from train.__main__ import main

SIZE = 100_000  # of a leaf: writing takes some milliseconds


def make(step: int) -> TrainState:
    """A state in which every number tells the step."""
    params = {name: torch.full((SIZE,), float(step)) for name in "abc"}
    moments = {name: torch.full((SIZE,), -float(step)) for name in "abc"}
    return TrainState(params, {"moments": moments}, (), random.key(step), torch.tensor(step))


def check(state: TrainState) -> int:
    step = int(state.step)
    leaves = [*state.params.values(), *(-leaf for leaf in state.buffers["moments"].values())]
    assert len(leaves) == 6 and all((leaf == step).all() for leaf in leaves)
    assert state.key.tolist() == random.key(step).tolist()
    return step


def fork(work: Callable[[int], Any]) -> tuple[int, int]:
    """Start a process, and give its number and the end of a pipe on which it reports."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            work(writing)
        finally:
            os._exit(1)
    os.close(writing)
    return child, reading


def seconds_of_a_save(folder: Path) -> float:
    """What it takes at present: other work on this machine slows it down."""
    start = time.perf_counter()
    with Checkpointer(folder, keep=2) as checkpointer:
        for step in range(10):
            checkpointer.save(make(step))
    return (time.perf_counter() - start) / 10


def saving(folder: Path, kills: int) -> dict[str, Any]:
    """Kill a process that saves again and again; what it has reported as saved is there."""
    longest = 3 * seconds_of_a_save(folder.with_name("pace"))

    def work(report: int) -> None:
        with Checkpointer(folder, keep=2) as checkpointer:
            found = checkpointer.restore()
            step = int(found.state.step) if found else 0
            while True:
                step += 1
                checkpointer.save(make(step))
                os.write(report, step.to_bytes(8, "little"))  # those before it are on the disk

    draw, halves, fresh, last = numbers.Random(0), 0, 0, 0
    for _ in range(kills):
        child, reading = fork(work)
        os.read(reading, 8)
        time.sleep(draw.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(reading, "rb") as pipe:
            reported = pipe.read()
        halves += any(folder.glob(".*.safetensors.*"))
        found = restore(folder)
        step = check(found.state) if found else 0
        begun = int.from_bytes(reported[-8:], "little") if reported else step
        assert step >= last and begun - 1 <= step <= begun + 1, (last, begun, step)
        fresh += step > last
        last = step
    return {"kills": kills, "in the middle of a file": halves, "new states": fresh, "step": last}


def training(folder: Path, kills: int) -> dict[str, Any]:
    """Kill and resume `python -m train`; then let it finish."""
    planning.CHUNK_SECONDS = 0.005
    options = ["linreg", "--epochs", "12", "--compile", "off", "--momentum", "0.9"]
    draw, alive, killed = numbers.Random(1), None, 0
    for arguments in (["--out", str(folder / "whole")], ["--out", str(folder / "cut")]):
        begin = [*options, *arguments, "--save-every", "0"]
        alive = begin
        while True:
            child, reading = fork(lambda report, given=alive: command(given))
            os.close(reading)
            if arguments[1].endswith("cut") and killed < kills:
                time.sleep(draw.uniform(0.02, 0.25))
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            if status == 0:
                break
            assert os.WIFSIGNALED(status), status
            killed += 1
            if (folder / "cut" / "config.json").exists():
                alive = ["linreg", "--resume", str(folder / "cut"), "--save-every", "0"]
    return {"kills": killed}


def command(arguments: list[str]) -> None:
    sys.argv = ["python -m train", *arguments]
    with contextlib.redirect_stdout(io.StringIO()):
        code = main()
    os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    optim.sgd(0.1)  # nothing is imported in a child
    kind, where, count = sys.argv[1:]
    print(json.dumps({"saving": saving, "training": training}[kind](Path(where), int(count))))
