"""Compare runs: `python -m train compare RUN RUN …` prints a table and draws their curves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fdl._table import aligned
from train import plots, run_folder
from train.config import ELSEWHERE, Compare
from train.records import LABELS, best_epoch

__all__ = ["compare"]

COLUMNS = {"epoch": "epoch"} | LABELS


class Run(NamedTuple):
    """What is compared of a run."""

    name: str
    options: dict[str, Any]  # the recipe's name among them
    records: list[dict[str, Any]]  # the lines of metrics.jsonl


def compare(config: Compare) -> int:
    """Print a line for each run, with the options that differ, and draw all curves; return 0.

    Raises:
        ValueError: a folder holds no run, or a run has no epoch yet.
        OSError: the picture cannot be written.
    """
    runs = []
    for given in config.runs:
        folder = run_folder.newest(given)
        saved, records = run_folder.read_run(folder), run_folder.read_metrics(folder)
        if not records:
            raise ValueError(f"compare: {folder} has no epoch yet")
        options = {"recipe": saved.recipe, **dataclasses.asdict(saved.config)}
        runs.append(Run(str(given), options, records))
    print(table(runs))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    plots.draw_comparison(config.out, {run.name: run.records for run in runs})
    print(f"curves: {config.out}")
    return 0


def differing(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """List the options in which runs differ.

    >>> differing([{"lr": 0.1, "seed": 0, "out": "a"}, {"lr": 0.2, "seed": 0, "out": "b"}])
    ['lr']
    """
    names = dict.fromkeys(name for options in runs for name in options if name not in ELSEWHERE)
    return [n for n in names if any(o.get(n) != runs[0].get(n) for o in runs[1:])]


def table(runs: Sequence[Run]) -> str:
    """Return a table: each run after its last epoch, with the options that differ.

    A run with `--patience` is shown after its best epoch, whose weights it keeps.

    >>> losses = [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}]
    >>> print(table([Run("a", {"lr": 0.1}, losses), Run("b", {"lr": 0.2}, losses[:1])]))
    run  lr   epoch  loss
    a    0.1  2      0.25
    b    0.2  1      0.5
    """
    options = differing([run.options for run in runs])
    shown = [_record(run) for run in runs]
    metrics = [name for name in COLUMNS if any(name in record for record in shown)]
    rows = [["run", *options, *(COLUMNS[name] for name in metrics)]]
    for run, record in zip(runs, shown, strict=True):
        rows.append(
            [run.name, *(_shown(run.options.get(name)) for name in options)]
            + [_shown(record.get(name)) for name in metrics]
        )
    return aligned(rows)


def _record(run: Run) -> dict[str, Any]:
    best = best_epoch(run.records) if run.options.get("patience") else 0
    return next((r for r in run.records if r["epoch"] == best), run.records[-1])


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)
