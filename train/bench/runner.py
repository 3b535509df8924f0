"""What a runner of training has to offer to be measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np

from train.bench.task import Array, Task

__all__ = ["CALLS", "Loop", "Runner", "Trajectory"]

CALLS = 2  # calls in a trajectory: what one hands to the next is checked as well


class Trajectory(NamedTuple):
    """Where training went from the initial weights."""

    losses: Array  # float64 [steps], of each batch before its update
    params: dict[str, Array]


class Runner(ABC):
    """One runner to train a task; nothing is computed or compiled before the first call."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.steps = task.steps  # in one call of `epoch`

    @abstractmethod
    def reset(self) -> None:
        """Go back to the initial weights."""

    @abstractmethod
    def epoch(self) -> Any:
        """Train on the rows of the task, from where the last call ended; may return early.

        Returns:
            The losses in the runner's own form, for `wait` and `losses`.
        """

    @abstractmethod
    def params(self) -> dict[str, Array]:
        """Read the parameters."""

    def first(self) -> int:
        """Make the smallest call that trains, and wait for it; return its number of steps."""
        self.wait(self.epoch())
        return self.steps

    def wait(self, losses: Any) -> None:  # noqa: B027, nothing to wait for unless it says so
        """Wait until the call that returned `losses` is done."""

    def losses(self, losses: Any) -> list[float]:
        """Read what `epoch` returned."""
        return [float(loss) for loss in losses]

    def memory(self) -> int | None:
        """Say how many bytes are taken on the device; None if that is the host."""
        return None

    def peak(self) -> int | None:
        """Say how many bytes were ever taken on the device; None if that is the host."""
        return None

    def trajectory(self) -> Trajectory:
        """Train `CALLS` calls from the initial weights."""
        self.reset()
        losses = [loss for _ in range(CALLS) for loss in self.losses(self.epoch())]
        return Trajectory(np.array(losses), self.params())


class Loop(Runner):
    """A runner whose loop over the steps is written in Python."""

    @abstractmethod
    def step(self, i: int) -> Any:
        """Train on row i of the task and return the loss in the runner's own form."""

    def epoch(self) -> list[Any]:
        """Loop over the rows."""
        return [self.step(i) for i in range(self.steps)]

    def first(self) -> int:
        """Make one step."""
        self.wait([self.step(0)])
        return 1
