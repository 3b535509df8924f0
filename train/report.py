"""What a run leaves behind: a folder with its configuration, metrics, curves and parameters."""

import dataclasses
import json
import platform
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import fdl
from fdl.data import LABELS, Dataset
from train.config import Recipe

__all__ = ["append_metrics", "draw_curves", "draw_images", "open_run", "write_config"]


def open_run(out: Path | None, recipe: str) -> Path:
    """Make the folder of a new run: `out`, or `runs/RECIPE/TIME`.

    Raises:
        ValueError: `out` holds a run already, which would be overwritten.
        OSError: the folder cannot be made.
    """
    folder = out or Path("runs") / recipe / datetime.now().strftime("%Y-%m-%d-%H%M%S-%f")
    if (folder / "config.json").exists():
        raise ValueError(f"--out {folder} holds a run already; choose another folder or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_config(folder: Path, recipe: str, config: Recipe, **facts: Any) -> None:
    """Write `config.json`: every option, and what else the numbers depend on."""
    options = dataclasses.asdict(config) | {"out": str(folder)}
    environment = {
        "fdl": fdl.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    record = {"recipe": recipe, "options": options, **facts, "environment": environment}
    (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n")


def append_metrics(folder: Path, record: dict[str, Any]) -> None:
    """Append one line to `metrics.jsonl`."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def draw_curves(folder: Path, title: str, records: Sequence[dict[str, Any]]) -> None:
    """Draw `curves.png`: loss, and accuracy where there is one, over epochs."""
    from matplotlib.figure import Figure  # a second to import, which --help need not wait for

    panels = [("loss", "test_loss")]
    if "accuracy" in records[0]:
        panels.append(("accuracy", "test_accuracy"))
    figure = Figure(figsize=(5 * len(panels), 3.5), layout="constrained")
    epochs = [record["epoch"] for record in records]
    for axes, names in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, label in zip(names, ("train", "test"), strict=True):
            if name in records[0]:
                values = [record.get(name, float("nan")) for record in records]
                axes.plot(epochs, values, marker="o", markersize=3, label=label)
        axes.set(xlabel="epoch", ylabel=names[0])
        axes.xaxis.get_major_locator().set_params(integer=True)
        losses = [r[n] for r in records for n in names if n in r]
        if names[0] == "loss" and min(losses) > 0 and max(losses) > 20 * min(losses):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
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
