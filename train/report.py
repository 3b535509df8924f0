"""What a run leaves behind: a folder with its configuration, metrics, curves and parameters."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import torch

import fdl
from fdl._files import atomic_write
from fdl.data import LABELS, Dataset
from train.config import Recipe
from train.loop import Plan
from train.recipes import Problem
from train.records import from_json, to_json

__all__ = [
    "append_metrics",
    "cut_metrics",
    "draw_curves",
    "draw_images",
    "environment",
    "open_run",
    "sync_metrics",
    "write_config",
    "write_sweep",
]


PARTS = {
    "": "train, mean over the epoch",
    "validation_": "validation, after it",
    "test_": "test, after it",
}
"""What begins the name of a metric, and how a legend says on which data it was measured."""


def open_run(out: Path | None, recipe: str) -> Path:
    """Make the folder of a new run: `out`, or `runs/RECIPE/TIME`.

    Raises:
        ValueError: `out` holds a run already, which would be overwritten.
        OSError: the folder cannot be made.
    """
    if out is None:
        return _own_folder(Path("runs") / recipe)
    folder = out
    marks = ("config.json", "sweep.json")
    if any((folder / mark).exists() for mark in marks) or any(
        folder.glob("checkpoints/*.safetensors")
    ):
        raise ValueError(f"--out {folder} holds a run already; choose another folder or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _own_folder(runs: Path) -> Path:
    """Make a folder named by the time; by microseconds too where another run began this second."""
    runs.mkdir(parents=True, exist_ok=True)
    now = datetime.now()
    for form in ("%Y-%m-%d-%H%M%S", "%Y-%m-%d-%H%M%S-%f"):
        folder = runs / now.strftime(form)
        try:
            folder.mkdir()
            break
        except FileExistsError:
            if "%f" in form:
                raise
    return folder


def write_config(
    folder: Path,
    recipe: str,
    config: Recipe,
    problem: Problem,
    plan: Plan,
    here: Mapping[str, Any],
    resumed: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write `config.json`: every option, and what else the numbers depend on.

    Args:
        folder: of the run.
        recipe: its name.
        config: its options.
        problem: says what the data are, and how many passes over them an epoch is.
        plan: how it is executed.
        here: the `environment` it began in.
        resumed: at which step it went on in which other environment.
    """
    options = dataclasses.asdict(config) | {"out": str(folder), "resume": None}
    record = {
        "recipe": recipe,
        "options": options,
        "data": problem.data,
        "passes": problem.passes,
        "plan": plan._asdict(),
        "environment": here,
        "resumed": list(resumed),
    }
    _write_text(folder / "config.json", to_json(record, indent=2, default=str) + "\n")


def write_sweep(
    folder: Path, recipe: str, config: Recipe, problem: Problem, plan: Plan, size: int
) -> None:
    """Write `sweep.json`: every option of a sweep.

    Args:
        folder: of the sweep.
        recipe: its name.
        config: its options, the grid among them.
        problem: says what the data are, and how many passes over them an epoch is.
        plan: how it is executed.
        size: members of a group.
    """
    options = dataclasses.asdict(config) | {"out": str(folder), "resume": None}
    record = {
        "recipe": recipe,
        "options": options,
        "data": problem.data,
        "passes": problem.passes,
        "plan": plan._asdict(),
        "size": size,
    }
    _write_text(folder / "sweep.json", to_json(record, indent=2, default=str) + "\n")


def _write_text(path: Path, text: str) -> None:
    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    atomic_write(path, write)


def environment(device: torch.device) -> dict[str, Any]:
    """Tell what, besides the options, the bits of a result may depend on.

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


def append_metrics(folder: Path, record: Mapping[str, Any]) -> None:
    """Append one line to `metrics.jsonl`."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(to_json(record) + "\n")


def sync_metrics(folder: Path) -> None:
    """Bring `metrics.jsonl` to the disk, if there is one yet."""
    path = folder / "metrics.jsonl"
    if path.exists():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def cut_metrics(folder: Path, epochs: int) -> list[dict[str, Any]]:
    """Remove from `metrics.jsonl` all but the lines of the first epochs, and give those.

    What was written after the checkpoint is written again when the epochs are done again: lines of
    whole epochs, that of a part of an epoch, and one that was being written when the run died.
    """
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [from_json(line) for line in lines[:epochs]]
    if [record["epoch"] for record in records] != list(range(1, epochs + 1)):
        raise ValueError(
            f"{path} must have a line for each of the {epochs} epochs in the checkpoint, "
            f"it has {len(records)}; put it back as the run left it"
        )
    _write_text(path, "".join(line + "\n" for line in lines[:epochs]))
    return records


def draw_curves(folder: Path, title: str, records: Sequence[dict[str, Any]]) -> None:
    """Draw `curves.png`: loss, and accuracy where there is one, over epochs."""
    from matplotlib.figure import Figure  # a second to import, which --help need not wait for
    from matplotlib.ticker import MaxNLocator

    names = [name for name in ("loss", "accuracy") if name in records[0]]
    epochs = [record["epoch"] for record in records]
    figure = Figure(figsize=(5 * len(names), 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        drawn: list[float] = []
        for part, label in PARTS.items():
            values = [record.get(part + name, math.nan) for record in records]
            if any(map(math.isfinite, values)):
                axes.plot(
                    epochs, values, marker="o", markersize=3 if epochs[1:] else 6, label=label
                )
                drawn += filter(math.isfinite, values)
        axes.set(xlabel="epoch", ylabel=name, xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if name == "loss" and drawn and 0 < 20 * min(drawn) < max(drawn):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        if drawn:
            axes.legend()
    figure.suptitle(title)
    figure.savefig(folder / "curves.png", dpi=120)


def draw_images(path: Path, dataset: Dataset, count: int = 10) -> None:
    """Draw the first images of a data set, each under its label, in one row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.25 * count, 1.6), layout="constrained")
    for axes, image, label in zip(figure.subplots(1, count), *dataset, strict=False):
        axes.imshow(image.cpu().numpy(), cmap="gray_r")
        axes.set_title(LABELS[int(label)], fontsize=9)
        axes.set_axis_off()
    figure.savefig(path, dpi=120)
