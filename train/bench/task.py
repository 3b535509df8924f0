"""The input of every runner: weights, examples and batches as NumPy arrays in one file.

This module imports neither torch nor JAX, so that each worker loads only what its runner needs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train.records import to_json

__all__ = ["Array", "Task", "load", "save", "save_arrays", "take"]

Array = np.ndarray[Any, Any]


class Task(NamedTuple):
    """One workload on one device."""

    model: str  # name of the model, as in `models.torch_modules.make`
    lr: float
    momentum: float
    weight_decay: float
    adam: bool  # Adam instead of SGD with momentum and weight decay
    rates: tuple[float, ...]  # of dropout, () without it
    steps: int  # in one call of `epoch`
    device: str
    x: Array  # uint8 [n, 28, 28], or float32 [n, features]
    y: Array  # int64 [n], or float32 [n, 1]
    batches: Array  # int64 [at least `steps`, batch]: the rows of x in each batch of an epoch
    key: Array  # uint32 [2]: step k draws from fold_in(key, k)
    params: dict[str, Array]  # float32, by the paths of `named_parameters()`
    buffers: dict[str, Array]  # of batch norms, by the paths of `named_buffers()`

    @property
    def rows(self) -> Array:
        """The batches of one call, `[steps, batch]`."""
        return self.batches[: self.steps]

    @property
    def images(self) -> bool:
        """True if x holds images, which a step converts to floats in [0, 1]."""
        return self.x.dtype == np.uint8


def save(task: Task, path: Path) -> None:
    """Write a task to one .npz file."""
    options = {k: v for k, v in task._asdict().items() if not isinstance(v, np.ndarray | dict)}
    arrays = {k: v for k, v in task._asdict().items() if isinstance(v, np.ndarray)}
    arrays |= {f"params/{name}": value for name, value in task.params.items()}
    arrays |= {f"buffers/{name}": value for name, value in task.buffers.items()}
    save_arrays(path, options=np.array(to_json(options)), **arrays)


def load(path: Path) -> Task:
    """Read what `save` wrote."""
    with np.load(path) as file:
        arrays: dict[str, Any] = {name: file[name] for name in file.files}
    options = json.loads(str(arrays.pop("options")))
    options["rates"] = tuple(options["rates"])
    params, buffers = take(arrays, "params/"), take(arrays, "buffers/")
    return Task(**options, **arrays, params=params, buffers=buffers)


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write arrays under any names."""
    np.savez(path, **arrays)


def take(arrays: dict[str, Any], prefix: str) -> dict[str, Array]:
    """Remove the arrays whose names begin with a prefix, and return them by the rest of the name.

    >>> arrays = {"params/w": 1, "losses": 2}
    >>> take(arrays, "params/"), arrays
    ({'w': 1}, {'losses': 2})
    """
    names = [name for name in arrays if name.startswith(prefix)]
    return {name.removeprefix(prefix): arrays.pop(name) for name in names}
