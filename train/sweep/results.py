"""Results of a sweep: files and tables of them, and the best one saved as an ordinary run."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import fdl
from fdl import TrainState, optim, tree
from fdl._files import sync_folder
from fdl._numerics import best_index
from fdl.checkpointing import Checkpointer
from fdl.optim import Optimizer
from fdl.tree import Tree
from train import loop, plots, resume, run_folder
from train.config import Recipe
from train.planning import Plan
from train.recipes import Problem
from train.records import from_json, numbers, to_json
from train.sweep.grid import Axis, Value

__all__ = [
    "Result",
    "best_of",
    "best_values",
    "chosen_by",
    "finished",
    "group_folder",
    "last_line",
    "merge",
    "only",
    "point_of",
    "results_in",
    "save_run",
    "summary",
    "table",
    "write_results",
]

SHOWN = 30  # rows of the table


class Result(NamedTuple):
    """The result of one point.

    >>> Result({"lr": 0.1}, True, 10, [{"loss": 2.0}, {"loss": 0.5}]).loss
    0.5
    """

    point: dict[str, Value]
    ok: bool  # every loss was finite, that of the final state too
    step: int  # number of steps done
    history: list[dict[str, Any]]  # the lines of its `metrics.jsonl`

    @property
    def loss(self) -> float:
        """The error or the loss by which points are chosen; infinite if the run diverged."""
        if not self.ok:
            return math.inf
        name = chosen_by(self)
        value = float(self.history[-1][name])
        return 1 - value if name.endswith("accuracy") else value


CHOICES = ("validation_accuracy", "validation_loss", "test_accuracy", "test_loss")


def chosen_by(result: Result) -> str:
    """Name the metric that chooses a point: on the validation set, else on what there is.

    >>> chosen_by(Result({"lr": 0.1}, True, 10, [{"loss": 0.5, "validation_loss": 0.6}]))
    'validation_loss'
    """
    return next((name for name in CHOICES if name in result.history[-1]), "loss")


def best_of(results: Sequence[Result]) -> Result | None:
    """Return the result with the smallest loss, None if all diverged."""
    best = best_index([result.loss for result in results])
    return None if best is None else results[best]


@contextmanager
def group_folder(sweep: Path, number: int) -> Iterator[Path]:
    """Yield a folder for the files of a group, which appears complete or not at all."""
    path = sweep / "groups" / f"{number:04}"
    temporary = path.with_name(f".{number:04}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    shutil.rmtree(path, ignore_errors=True)  # of an interrupted group
    temporary.rename(path)
    sync_folder(path.parent)


def write_results(folder: Path, results: Sequence[Result], finished: bool) -> None:
    """Write `results.json`: the result of each point of a group, and if the group is finished."""
    record = {"finished": finished, "results": [result._asdict() for result in results]}
    (folder / "results.json").write_text(to_json(record))


def _groups_in(sweep: Path) -> dict[int, dict[str, Any]]:
    files = sorted(sweep.glob("groups/[0-9]*/results.json"))
    return {int(file.parent.name): json.loads(file.read_text()) for file in files}


def _result(row: dict[str, Any]) -> Result:
    """Read a result; null stands for a number that was not finite."""
    return Result(row["point"], row["ok"], row["step"], [numbers(line) for line in row["history"]])


def finished(sweep: Path) -> list[int]:
    """List the groups that are finished.

    >>> finished(Path("nowhere"))
    []
    """
    return [number for number, group in _groups_in(sweep).items() if group["finished"]]


def results_in(sweep: Path) -> list[Result]:
    """List the results of all groups of a sweep, in the order of the grid.

    >>> results_in(Path("nowhere"))
    []
    """
    return [_result(row) for group in _groups_in(sweep).values() for row in group["results"]]


def merge(sweep: Path) -> list[Result]:
    """Write `results.jsonl` and `best` from the results of all groups, and return these."""
    results = results_in(sweep)
    lines = []
    for result in results:
        last = result.history[-1] if result.ok else {"diverged_at_step": _diverged_at(result)}
        lines.append(to_json({**result.point, **last}) + "\n")
    run_folder.write_text(sweep / "results.jsonl", "".join(lines))
    best = best_of(results)
    for number, group in _groups_in(sweep).items():
        if best is not None and best.point in [row["point"] for row in group["results"]]:
            folder = sweep / "groups" / f"{number:04}" / "best"
            shutil.rmtree(sweep / "best", ignore_errors=True)
            shutil.copytree(folder, sweep / "best", ignore=shutil.ignore_patterns("lock"))
            break
    return results


def _diverged_at(result: Result) -> int:
    """Return the step after which a loss was no longer finite."""
    return max(1, result.step)


def table(axes: Sequence[Axis], results: Sequence[Result]) -> str:
    """Tabulate results, the best first, in at most 80 columns.

    >>> history = [{"loss": 0.5, "accuracy": 0.75, "test_loss": 0.6, "test_accuracy": 0.7}]
    >>> diverged = Result({"lr": 9.0}, False, 4, [{"loss": 1.0}])
    >>> print(table([Axis("lr", (9.0, 0.1))], [diverged, Result({"lr": 0.1}, True, 9, history)]))
           lr      loss  accuracy  test_loss  test_accuracy
          0.1       0.5      0.75        0.6            0.7
            9  diverged at step 4
    """
    done = [result for result in results if result.ok]
    last = done[0].history[-1] if done else {}
    names = [n for n in ("loss", "accuracy", *reversed(CHOICES)) if n in last]
    heads = [f"{_short(axis.name):>9}" for axis in axes] + [f"{_short(n):>8}" for n in names]
    lines = ["  ".join(heads)]
    for result in sorted(results, key=lambda result: result.loss)[:SHOWN]:
        cells = [f"{result.point[axis.name]:>9.4g}" for axis in axes]
        if result.ok:
            cells += [f"{result.history[-1][n]:>{max(8, len(_short(n)))}.4g}" for n in names]
        else:
            cells.append(f"diverged at step {_diverged_at(result)}")
        lines.append("  ".join(cells))
    if len(results) > SHOWN:
        lines.append(f"… and {len(results) - SHOWN} more")
    return "\n".join(lines)


def _short(name: str) -> str:
    return name.removeprefix("weight_").replace("validation", "val")  # so that four axes fit


def best_values(axes: Sequence[Axis], results: Sequence[Result]) -> list[list[float]]:
    """Tabulate the metric that chooses: rows over the first axis, columns over the second.

    A single axis gives one row. With further axes each value is the best over them; it is NaN where
    every run diverged.

    >>> runs = [Result({"lr": v, "seed": 0}, True, 1, [{"loss": v}]) for v in (0.5, 0.1)]
    >>> best_values([Axis("lr", (0.1, 0.5)), Axis("seed", (0,))], runs)
    [[0.1], [0.5]]
    """
    done = [result for result in results if result.ok]
    name = chosen_by(done[0])
    best = max if name.endswith("accuracy") else min

    def value(**at: Value) -> float:
        values = [
            float(result.history[-1][name])
            for result in done
            if all(result.point[axis] == value for axis, value in at.items())
        ]
        return best(values, default=math.nan)

    *rows, columns = axes[:2]
    if not rows:
        return [[value(**{columns.name: v}) for v in columns.values]]
    return [
        [value(**{rows[0].name: row, columns.name: column}) for column in columns.values]
        for row in rows[0].values
    ]


def summary(best: Result, last: dict[str, Any]) -> str:
    """Describe the best point: the metric that chose it, and its score on the test set.

    Args:
        best: its result.
        last: the last line of its `metrics.jsonl`.

    >>> best = Result({"lr": 0.4}, True, 9, [{"loss": 0.5, "validation_accuracy": 0.8}])
    >>> print(summary(best, {"test_accuracy": 0.75}))
    best by validation accuracy: lr = 0.4
    on the test set, which had no part in the choice: test accuracy 0.75
    """
    name = chosen_by(best)
    lines = [f"best by {name.replace('_', ' ')}: {point_of(best)}"]
    if name.startswith("test"):
        lines.append(
            "chosen on the test set, which flatters it: give --validation 0.1 to avoid that"
        )
    elif tested := next((n for n in CHOICES[2:] if n in last), None):
        value = f"{tested.replace('_', ' ')} {last[tested]:.4g}"
        lines.append(f"on the test set, which had no part in the choice: {value}")
    return "\n".join(lines)


def point_of(result: Result) -> str:
    """Write a point as "lr = 0.4, seed = 3"."""
    return ", ".join(f"{option} = {value:g}" for option, value in result.point.items())


def last_line(run: Path) -> dict[str, Any]:
    """Read the last line of a run's `metrics.jsonl`."""
    return from_json((run / "metrics.jsonl").read_text().splitlines()[-1])


def only(state: TrainState, opt: Optimizer) -> TrainState:
    """Remove from the optimizer's state what `opt`, with a rate of 0, does not have.

    >>> params = {"w": fdl.random.uniform(fdl.random.key(0), (1,))}
    >>> key, step = fdl.random.key(0), fdl.random.key(0)[0]
    >>> both = TrainState(params, {}, optim.sgd(0.1, 0.9).init(params), key, step)
    >>> list(optim.hyperparams(only(both, optim.sgd(0.1)).opt_state))
    ['lr']
    """
    return state._replace(opt_state=_only(state.opt_state, opt.init(state.params)))


def _only(state: Tree, like: Tree) -> Tree:
    if type(like) is not tuple:  # a single transformation; a tuple is a chain
        return state
    candidates, kept = iter(state), []
    for part in like:
        wanted = optim.hyperparams(part).keys()
        match = next(s for s in candidates if wanted <= optim.hyperparams(s).keys())
        kept.append(_only(match, part))
    return tuple(kept)


def save_run(
    folder: Path,
    name: str,
    config: Recipe,
    problem: Problem,
    plan: Plan,
    result: Result,
    state: TrainState,
    progress: loop.Progress,
) -> None:
    """Save one member as an ordinary run, in place of an older one.

    Args:
        folder: folder of the run.
        name: name of the recipe.
        config: options of the run.
        problem: the problem that was trained.
        plan: how the run was executed.
        result: result of the member.
        state: final state.
        progress: how far the run is.
    """
    environment = resume.environment(state.key.device)
    folder.mkdir(parents=True, exist_ok=True)
    run_folder.write_config(folder, name, config, problem, plan, environment)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    for record in result.history:
        run_folder.append_metrics(folder, record)
    with Checkpointer(folder / "checkpoints", keep=1) as checkpointer:
        last = {k: v for k, v in result.history[-1].items() if isinstance(v, float)}
        checkpointer.save(
            state, metrics=last, config={"progress": resume.progress_to_json(progress)}
        )
    fdl.io.save(folder / "params.safetensors", tree.merge(state.params, state.buffers))
    plots.draw_curves(folder / "curves.png", f"{name}, {point_of(result)}", result.history)
