"""What every runner is given: the same weights, examples and batches, as NumPy arrays in one file.

Nothing here imports torch or JAX, so that each worker loads only what its own runner needs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Array", "Task", "load", "save", "save_arrays", "split_params"]

Array = np.ndarray[Any, Any]


class Task(NamedTuple):
    """One workload on one device."""

    model: str  # "linreg", "softmax", "mlp", "dropout" or "lenet"
    lr: float
    momentum: float
    weight_decay: float
    rates: tuple[float, ...]  # of dropout, none if empty
    steps: int  # in one call of `epoch`
    device: str
    x: Array  # uint8 [n, 28, 28], or float32 [n, features]
    y: Array  # int64 [n], or float32 [n, 1]
    batches: Array  # int64 [at least `steps`, batch]: the rows of x in each of an epoch
    key: Array  # uint32 [2], the run's key: step k draws from fold_in(key, k)
    params: dict[str, Array]  # float32, by the paths of `named_parameters()`

    @property
    def rows(self) -> Array:
        """The batches of one call, `[steps, batch]`."""
        return self.batches[: self.steps]

    @property
    def images(self) -> bool:
        """Say whether x holds images, which a step turns into floats in [0, 1]."""
        return self.x.dtype == np.uint8


def save(task: Task, path: Path) -> None:
    """Write a task to one .npz file."""
    options = {k: v for k, v in task._asdict().items() if not isinstance(v, np.ndarray | dict)}
    arrays = {k: v for k, v in task._asdict().items() if isinstance(v, np.ndarray)}
    arrays |= {f"params/{name}": value for name, value in task.params.items()}
    save_arrays(path, options=np.array(json.dumps(options, allow_nan=False)), **arrays)


def load(path: Path) -> Task:
    """Read what `save` wrote."""
    with np.load(path) as file:
        found: dict[str, Any] = {name: file[name] for name in file.files}
    options = json.loads(str(found.pop("options")))
    options["rates"] = tuple(options["rates"])
    params, rest = split_params(found)
    return Task(**options, **rest, params=params)


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write arrays under names of any kind."""
    np.savez(path, **arrays)


def split_params(arrays: dict[str, Any]) -> tuple[dict[str, Array], dict[str, Any]]:
    """Take out what is stored as parameters."""
    prefix = "params/"
    params = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    return params, {k: v for k, v in arrays.items() if not k.startswith(prefix)}
