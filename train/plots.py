"""Figures: the curves of a run, the metrics over the grid of a sweep, images with their labels.

Matplotlib is imported within the functions: it takes a second, and `--help` need not wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fdl.data import Dataset
from train.sweep.grid import Axis

__all__ = ["draw_comparison", "draw_curves", "draw_images", "draw_mistakes", "draw_sweep"]

LEGEND = {
    "": "train, mean over the epoch",
    "validation_": "validation, after it",
    "test_": "test, after it",
}
"""Prefix of a metric's name, and the label of the data it was measured on."""


def draw_curves(path: Path, title: str, records: Sequence[dict[str, Any]]) -> None:
    """Draw the loss, and the accuracy if there is one, over the epochs.

    Args:
        path: the file to write.
        title: title of the figure.
        records: the lines of `metrics.jsonl`.
    """
    names = [name for name in ("loss", "accuracy") if name in records[0]]
    epochs = [record["epoch"] for record in records]
    size = 3 if len(epochs) > 1 else 6
    figure, panels = _over_epochs(names, height=3.5)
    for name, axes in panels.items():
        drawn: list[float] = []
        for prefix, label in LEGEND.items():
            values = [record.get(prefix + name, math.nan) for record in records]
            if any(map(math.isfinite, values)):
                axes.plot(epochs, values, marker="o", markersize=size, label=label)
                drawn += filter(math.isfinite, values)
        axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        if name == "loss" and drawn and 0 < 20 * min(drawn) < max(drawn):
            axes.set_yscale("log")
        if drawn:
            axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def _over_epochs(names: Sequence[str], height: float) -> tuple[Any, dict[str, Any]]:
    """Make a figure with a panel for each metric, over the epochs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5 * len(names), height), layout="constrained")
    panels = dict(zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True))
    for name, axes in panels.items():
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    return figure, panels


def draw_comparison(path: Path, runs: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Draw the loss and the accuracy of several runs: dashed in training, solid on held-out data.

    Args:
        path: the file to write.
        runs: the lines of `metrics.jsonl` by name of the run.
    """
    first = [records[0] for records in runs.values()]
    names = [name for name in ("loss", "accuracy") if any(name in record for record in first)]
    figure, panels = _over_epochs(names, height=3.5 + 0.2 * len(runs))
    for name, axes in panels.items():
        for i, (run, records) in enumerate(runs.items()):
            epochs = [record["epoch"] for record in records]
            held_out = next((p for p in ("validation_", "test_") if p + name in records[0]), None)
            for prefix, style in (("", "--"), (held_out, "-")):
                if prefix is None or prefix + name not in records[0]:
                    continue
                values = [record.get(prefix + name, math.nan) for record in records]
                shown = name == names[0] and prefix == (held_out or "")  # once in the legend
                label = run if shown else None
                axes.plot(epochs, values, style + "o", ms=3, color=f"C{i}", label=label)
    figure.suptitle("dashed: in training; solid: on validation or test data after each epoch")
    figure.legend(loc="outside lower center", ncols=min(3, len(runs)))
    figure.savefig(path, dpi=120)


def draw_images(path: Path, dataset: Dataset, labels: Sequence[str], count: int = 10) -> None:
    """Draw the first images of a data set in one row, each under its label."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.25 * count, 1.6), layout="constrained")
    for axes, image, label in zip(figure.subplots(1, count), *dataset, strict=False):
        _show(axes, image)
        axes.set_title(labels[int(label)], fontsize=9)
        axes.set_axis_off()
    figure.savefig(path, dpi=120)


def _show(axes: Any, image: Tensor) -> None:
    """Show an image, `[height, width]` in grey or `[3, height, width]` in colour."""
    image = image if image.ndim == 2 else image.permute(1, 2, 0)
    axes.imshow(image.cpu().numpy(), cmap="gray_r")  # colours need no map


def draw_mistakes(
    path: Path,
    title: str,
    matrix: Tensor,
    worst: Dataset,
    predicted: Tensor,
    labels: Sequence[str],
) -> None:
    """Draw a confusion matrix, and beside it images, each with its label and what it is taken for.

    Args:
        path: the file to write.
        title: title of the figure.
        matrix: `[classes, classes]`, counts; a row for each label.
        worst: the images with their labels.
        predicted: the predicted class of each image.
        labels: the names of the classes.
    """
    from matplotlib.figure import Figure

    columns = 6
    rows = math.ceil(len(worst.x) / columns)
    figure: Any = Figure(figsize=(17, 8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(8, 9))
    _matrix(left.subplots(), matrix, labels)
    right.suptitle("largest loss: the label, and what is predicted (red: wrong)")
    panels = right.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels:
        axes.set_axis_off()
    for axes, image, label, other in zip(panels, *worst, predicted, strict=False):
        _show(axes, image)
        axes.set_title(f"{labels[int(label)]}\n", fontsize=9)
        shown = {"color": "C3" if other != label else "C2", "transform": axes.transAxes}
        axes.text(0.5, 1.04, labels[int(other)], ha="center", fontsize=9, **shown)
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


def _matrix(axes: Any, matrix: Tensor, labels: Sequence[str]) -> None:
    """Draw counts in cells, shaded by their share of the row."""
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    size = 9 if len(labels) <= 20 else 5
    for (i, j), count in np.ndenumerate(matrix.numpy()):
        if count and len(labels) <= 50:  # the counts of more would overlap
            color = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, f"{count:,.0f}", ha="center", va="center", color=color, fontsize=size)
    slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(labels)), labels, fontsize=size, **slanted)
    axes.set_yticks(range(len(labels)), labels, fontsize=size)
    axes.set(xlabel="predicted", ylabel="label")


def draw_sweep(
    path: Path, title: str, metric: str, axes: Sequence[Axis], values: Sequence[Sequence[float]]
) -> None:
    """Draw a metric over the grid of a sweep: a curve over one axis, a heat map over two.

    Args:
        path: the file to write.
        title: title of the figure.
        metric: name of the metric.
        axes: the axes of the grid, of which the first two are drawn.
        values: the metric, as `results.best_values` returns it; NaN stays empty.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    panel = figure.subplots()
    if len(axes) == 1:
        _curve(panel, metric, axes[0], values[0])
    else:
        shown = _heat_map(panel, metric, axes, values)
        figure.colorbar(shown, label=_label(metric))
    panel.set_title(title)
    figure.savefig(path, dpi=110)


def _curve(panel: Any, metric: str, axis: Axis, values: Sequence[float]) -> None:
    panel.plot(axis.values, values, marker="o")
    least, most = min(axis.values), max(axis.values)
    if least > 0 and most >= 10 * least and axis.name != "seed":
        panel.set_xscale("log")
    if len(axis.values) <= 12:  # the labels of more would overlap
        panel.set_xticks(axis.values, [f"{value:g}" for value in axis.values])
        panel.minorticks_off()
    panel.set_xlabel(_label(axis.name))
    panel.set_ylabel(_label(metric))
    panel.grid(alpha=0.3)


def _heat_map(
    panel: Any, metric: str, axes: Sequence[Axis], values: Sequence[Sequence[float]]
) -> Any:
    y, x = axes[:2]
    colors = "viridis" if metric.endswith("accuracy") else "viridis_r"
    shown = panel.imshow(values, aspect="auto", cmap=colors, origin="lower")
    panel.set_xticks(range(len(x.values)), [f"{value:.3g}" for value in x.values])
    panel.set_yticks(range(len(y.values)), [f"{value:.3g}" for value in y.values])
    panel.set_xlabel(_label(x.name))
    panel.set_ylabel(_label(y.name))
    if len(x.values) <= 8 and len(y.values) <= 12:
        box = {"facecolor": "white", "alpha": 0.6, "linewidth": 0, "pad": 1}
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                text = "–" if math.isnan(value) else f"{value:.3f}"
                panel.text(j, i, text, ha="center", va="center", fontsize=8).set_bbox(box)
    return shown


def _label(name: str) -> str:
    """Write the name of an option or a metric as a label.

    >>> _label("test_accuracy"), _label("lr")
    ('test accuracy', 'learning rate')
    """
    return "learning rate" if name == "lr" else name.replace("_", " ")
