"""The chart of docs/benchmark.md: time per step relative to the fastest runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["draw", "figure", "ratios"]

OURS, THEIRS = "#d1495b", "#9aa5b1"
PANELS = 3  # in a row


def ratios(workload: dict[str, Any]) -> dict[str, float]:
    """Divide the median of each runner that trains correctly by the smallest."""
    medians = {w["name"]: w["median_us"] for w in workload["runners"] if w["status"] == "right"}
    return {name: value / min(medians.values()) for name, value in medians.items()}


def figure(value: float) -> str:
    """Format a ratio or microseconds with three digits, or all digits before the point.

    >>> [figure(value) for value in (1.0, 1.327, 15.89, 3812.4)]
    ['1.00', '1.33', '15.9', '3812']
    """
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw a panel of dots for each workload that is not scaled."""
    from matplotlib.figure import Figure  # takes a second to import

    workloads = [w for w in document["workloads"] if ratios(w) and not w["scaled"]]
    names = list(dict.fromkeys(runner["name"] for w in workloads for runner in w["runners"]))
    columns = max(1, min(PANELS, len(workloads)))
    rows = max(1, -(-len(workloads) // columns))
    height = 0.6 + 0.21 * len(names)
    chart = Figure(figsize=(1.2 + 3.2 * columns, 0.5 + height * rows), layout="constrained")
    panels = chart.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axes, workload in zip(panels, workloads, strict=False):
        draw_panel(axes, workload, names)
    for axes in panels[len(workloads) :]:
        axes.set_axis_off()
    chart.suptitle("Time per step relative to the fastest (log scale)", fontsize=10)
    # Equal figures give equal files: without the date and version that are saved by default.
    chart.savefig(path, dpi=110, metadata={"Software": None})


def draw_panel(axes: Any, workload: dict[str, Any], names: list[str]) -> None:
    """Draw the dots of one workload, fdl's in colour, in the order of all panels.

    Dots, because bars on a logarithmic axis have no zero to start from.
    """
    ratio = ratios(workload)
    most = max(ratio.values())
    for place, name in enumerate(names):
        if name not in ratio:
            continue
        ours = name.startswith("fdl-")
        axes.plot(ratio[name], place, "o", color=OURS if ours else THEIRS, markersize=5)
        axes.annotate(
            figure(ratio[name]), (ratio[name], place), xytext=(6, 0), textcoords="offset points",
            va="center", fontsize=7.5,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.axvline(1, color="0.85", linewidth=1, zorder=0)
    axes.grid(axis="y", color="0.93", zorder=0)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0.8, max(2.0, most) * 2.2)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=7.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_title(f"{workload['name']}, batch {workload['batch']}", fontsize=9)
