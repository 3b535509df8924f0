"""The input of every runner: weights, examples and batches as NumPy arrays in one file.

This module imports neither torch nor JAX, so that each worker loads only what its runner needs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train.records import to_json

__all__ = ["Array", "Task", "load", "save", "save_arrays", "split_params"]

Array = np.ndarray[Any, Any]


class Task(NamedTuple):
    """One workload on one device."""

    model: str  # "linreg", "softmax", "mlp", "dropout" or "lenet"
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
    save_arrays(path, options=np.array(to_json(options)), **arrays)


def load(path: Path) -> Task:
    """Read what `save` wrote."""
    with np.load(path) as file:
        found: dict[str, Any] = {name: file[name] for name in file.files}
    options = json.loads(str(found.pop("options")))
    options["rates"] = tuple(options["rates"])
    params, rest = split_params(found)
    return Task(**options, **rest, params=params)


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write arrays under any names."""
    np.savez(path, **arrays)


def split_params(arrays: dict[str, Any]) -> tuple[dict[str, Array], dict[str, Any]]:
    """Separate the parameters from the other arrays."""
    prefix = "params/"
    params = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    return params, {k: v for k, v in arrays.items() if not k.startswith(prefix)}
