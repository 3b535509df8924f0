"""The interface that a way of training offers to be measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np

from train.bench.task import Array, Task

__all__ = ["CALLS", "Loop", "Runner", "Trajectory"]

CALLS = 2  # calls in a trajectory, so that the state passed between them is checked as well


class Trajectory(NamedTuple):
    """The losses, final parameters and running statistics of training from the initial weights."""

    losses: Array  # float64 [steps], of each batch before its update
    params: dict[str, Array]


class Runner(ABC):
    """One way to train a task; nothing is computed or compiled before the first call."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.steps = task.steps  # in one call of `epoch`

    @abstractmethod
    def reset(self) -> None:
        """Restore the initial weights."""

    @abstractmethod
    def epoch(self) -> Any:
        """Train on the rows of the task, from where the last call ended; may be asynchronous.

        Returns:
            The losses, of a type that `wait` and `losses` take.
        """

    @abstractmethod
    def params(self) -> dict[str, Array]:
        """Copy the parameters and the running statistics to NumPy, by path."""

    def first(self) -> int:
        """Make the shortest call that trains, wait for it, and return its number of steps."""
        self.wait(self.epoch())
        return self.steps

    def wait(self, losses: Any) -> None:  # noqa: B027, synchronous by default
        """Wait until the call that returned `losses` is done."""

    def losses(self, losses: Any) -> list[float]:
        """Convert the result of `epoch` to numbers."""
        return [float(loss) for loss in losses]

    def memory(self) -> int | None:
        """Return the bytes allocated on the device; None if that is the host."""
        return None

    def peak(self) -> int | None:
        """Return the most bytes ever allocated on the device; None if that is the host."""
        return None

    def trajectory(self) -> Trajectory:
        """Train `CALLS` calls from the initial weights."""
        self.reset()
        losses = [loss for _ in range(CALLS) for loss in self.losses(self.epoch())]
        return Trajectory(np.array(losses), self.params())


class Loop(Runner):
    """A runner with a Python loop over the steps."""

    @abstractmethod
    def step(self, i: int) -> Any:
        """Train on row i of the task and return the loss."""

    def epoch(self) -> list[Any]:
        """Loop over the rows."""
        return [self.step(i) for i in range(self.steps)]

    def first(self) -> int:
        """Make one step."""
        self.wait([self.step(0)])
        return 1
