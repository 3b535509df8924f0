"""Continue a run: its options, the environment it began in, and its progress as JSON."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fdl
from fdl.metrics import Mean
from train.config import Recipe
from train.loop import Progress
from train.options import read
from train.run_folder import Saved, SavedSweep

__all__ = [
    "SWEEP_MAY_CHANGE",
    "differences",
    "environment",
    "progress_from_json",
    "progress_to_json",
    "resumed_options",
]

MAY_CHANGE = ("epochs", "patience", "device", "data", "log", "save_every", "resume")
SWEEP_MAY_CHANGE = ("device", "data", "memory", "resume")


def resumed_options(
    recipe: str,
    folder: Path,
    saved: Saved | SavedSweep,
    arguments: Sequence[str],
    may_change: Sequence[str] = MAY_CHANGE,
) -> Recipe:
    """Combine the options of a run with those on the command line.

    Args:
        recipe: name of the recipe on the command line.
        folder: folder of the run.
        saved: the record in this folder.
        arguments: the command line after the name of the recipe.
        may_change: options that a resumed run may change.

    Raises:
        ValueError: the run has another recipe, or an option differs that may not change.
    """
    if saved.recipe != recipe:
        raise ValueError(f"--resume {folder} is a run of {saved.recipe}, got {recipe}")
    default: Any = saved.config
    grid = {"grid": default.grid} if hasattr(default, "grid") else {}
    if grid:  # the command line would append to it
        default = dataclasses.replace(default, **dict.fromkeys(grid, ()))
    command = f"sweep {recipe}" if grid else recipe
    config: Any = read(type(default), command, arguments, default)
    if grid and not config.grid:
        config = dataclasses.replace(config, **grid)
    for field in dataclasses.fields(config):
        was, now = getattr(saved.config, field.name), getattr(config, field.name)
        if field.name == "out" and now == folder:
            continue  # the command that began the run, repeated
        if field.name not in may_change and was != now:
            option = "--" + field.name.replace("_", "-")
            raise ValueError(
                f"{option} is {was} in {folder}, got {now}; a resumed run cannot change it: "
                f"leave {option} out, or start another run"
            )
    resumed: Recipe = dataclasses.replace(config, resume=folder, out=None)
    return resumed


def environment(device: torch.device) -> dict[str, Any]:
    """Record what, besides the options, the bits of a result may depend on.

    >>> environment(torch.device("cpu"))["torch"] == torch.__version__
    True
    """
    on_cuda = device.type == "cuda"
    return {
        "fdl": fdl.__version__,
        "torch": torch.__version__,
        "device": device.type,
        "processor": torch.cuda.get_device_name(device)
        if on_cuda
        else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "float32 products": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "python": platform.python_version(),
    }


def differences(began: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """List the differences between two environments that may change the bits of a result.

    >>> differences({"torch": "2.11.0", "threads": 1}, {"torch": "2.15.0", "threads": 1})
    'torch 2.15.0, was 2.11.0'
    """
    return "; ".join(
        f"{name} {now[name]}, was {began.get(name)}"
        for name in now
        if name != "python" and now[name] != began.get(name)
    )


def progress_to_json(progress: Progress) -> dict[str, Any]:
    """Convert a `Progress` to JSON, which keeps every bit of a float64.

    >>> total = {"loss": Mean(torch.tensor(0.1).double(), torch.tensor(3.0).double())}
    >>> progress_to_json(Progress(2, 5, total, 1.5))["total"]
    {'loss': [0.10000000149011612, 3.0]}
    """
    total = {name: [mean.total.item(), mean.count.item()] for name, mean in progress.total.items()}
    return progress._asdict() | {"total": total}


def progress_from_json(record: Mapping[str, Any], device: torch.device) -> Progress:
    """Convert the result of `progress_to_json` back.

    >>> record = {"epoch": 2, "done": 5, "total": {"loss": [0.5, 3.0]}, "seconds": 1.5}
    >>> progress_to_json(progress_from_json(record, torch.device("cpu"))) == record
    True
    """

    def tensor(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=device)

    total = {
        name: Mean(tensor(total), tensor(count)) for name, (total, count) in record["total"].items()
    }
    return Progress(record["epoch"], record["done"], total, record["seconds"])
