"""What a sweep came to: its results, their table and heat map, and the best as an ordinary run."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fdl
from fdl import TrainState, optim, tree
from fdl._files import atomic_write, sync_folder
from fdl._numerics import best_index
from fdl.checkpointing import Checkpointer
from fdl.optim import Optimizer
from fdl.tree import Tree
from train import loop, report, run_folder
from train.config import Recipe
from train.recipes import Problem
from train.records import from_json, numbers, to_json
from train.sweep.grid import Axis, Value

__all__ = [
    "Result",
    "best_of",
    "chosen_by",
    "draw",
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
    """What one point came to.

    >>> Result({"lr": 0.1}, True, 10, [{"loss": 2.0}, {"loss": 0.5}]).loss
    0.5
    """

    point: dict[str, Value]
    ok: bool  # was every loss finite, that of the final state too?
    step: int  # steps done
    history: list[dict[str, Any]]  # the lines of its `metrics.jsonl`

    @property
    def loss(self) -> float:
        """What is to be small: the error or the loss by which points are chosen."""
        if not self.ok:
            return math.inf
        name = chosen_by(self)
        value = float(self.history[-1][name])
        return 1 - value if name.endswith("accuracy") else value


CHOICES = ("validation_accuracy", "validation_loss", "test_accuracy", "test_loss")


def chosen_by(result: Result) -> str:
    """Name the metric by which points are chosen: of the validation set, or what there is.

    >>> chosen_by(Result({"lr": 0.1}, True, 10, [{"loss": 0.5, "validation_loss": 0.6}]))
    'validation_loss'
    """
    return next((name for name in CHOICES if name in result.history[-1]), "loss")


def best_of(results: Sequence[Result]) -> Result | None:
    """Find the result of the smallest loss, None where every one diverged."""
    best = best_index([result.loss for result in results])
    return None if best is None else results[best]


@contextmanager
def group_folder(sweep: Path, number: int) -> Iterator[Path]:
    """Give a folder to write what a group came to, which is then there at once and whole."""
    path = sweep / "groups" / f"{number:04}"
    temporary = path.with_name(f".{number:04}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    shutil.rmtree(path, ignore_errors=True)  # of one that was interrupted
    temporary.rename(path)
    sync_folder(path.parent)


def write_results(folder: Path, results: Sequence[Result], finished: bool) -> None:
    """Write `results.json`: what each point of a group came to, and whether it came to its end."""
    record = {"finished": finished, "results": [result._asdict() for result in results]}
    (folder / "results.json").write_text(to_json(record))


def _groups_in(sweep: Path) -> dict[int, dict[str, Any]]:
    files = sorted(sweep.glob("groups/[0-9]*/results.json"))
    return {int(file.parent.name): json.loads(file.read_text()) for file in files}


def _result(row: dict[str, Any]) -> Result:
    """Read a point; null is a number that was not finite."""
    return Result(row["point"], row["ok"], row["step"], [numbers(line) for line in row["history"]])


def finished(sweep: Path) -> list[int]:
    """List the groups that need not be trained again.

    >>> finished(Path("nowhere"))
    []
    """
    return [number for number, group in _groups_in(sweep).items() if group["finished"]]


def results_in(sweep: Path) -> list[Result]:
    """List what all groups of a sweep came to, in the order of the grid.

    >>> results_in(Path("nowhere"))
    []
    """
    return [_result(row) for group in _groups_in(sweep).values() for row in group["results"]]


def merge(sweep: Path) -> list[Result]:
    """Make `results.jsonl` and `best` of what all groups came to; give their results."""
    results = results_in(sweep)
    lines = []
    for result in results:
        last = result.history[-1] if result.ok else {"diverged_at_step": _diverged_at(result)}
        lines.append(to_json({**result.point, **last}) + "\n")

    def write(file: BinaryIO) -> None:
        file.write("".join(lines).encode())

    atomic_write(sweep / "results.jsonl", write)
    best = best_of(results)
    for number, group in _groups_in(sweep).items():
        if best is not None and best.point in [row["point"] for row in group["results"]]:
            folder = sweep / "groups" / f"{number:04}" / "best"
            shutil.rmtree(sweep / "best", ignore_errors=True)
            shutil.copytree(folder, sweep / "best", ignore=shutil.ignore_patterns("lock"))
            break
    return results


def _diverged_at(result: Result) -> int:
    """Name the step after which a loss was no longer finite."""
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
    found = [result for result in results if result.ok]
    last = found[0].history[-1] if found else {}
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


def draw(path: Path, recipe: str, axes: Sequence[Axis], results: Sequence[Result]) -> None:
    """Draw the metric over the first two axes as a heat map, over one axis as a curve.

    Where there are further axes each cell is the best of theirs; what diverged stays empty.
    """
    from matplotlib.figure import Figure  # a second to import, which --help need not wait for

    name = chosen_by(next(result for result in results if result.ok))
    sign = -1 if name.endswith("accuracy") else 1
    x, y = axes[-1] if len(axes) < 3 else axes[1], axes[0]

    def cell(**at: Value) -> float:
        values = [
            sign * float(result.history[-1][name])
            for result in results
            if result.ok and all(result.point[axis] == value for axis, value in at.items())
        ]
        return sign * min(values, default=math.nan)

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes_ = figure.subplots()
    if len(axes) == 1:
        axes_.plot(x.values, [cell(**{x.name: v}) for v in x.values], marker="o")
        if min(x.values) > 0 and max(x.values) >= 10 * min(x.values) and x.name != "seed":
            axes_.set_xscale("log")
        if len(x.values) <= 12:  # else their labels would overlap
            axes_.set_xticks(x.values, [f"{value:g}" for value in x.values])
            axes_.minorticks_off()
        axes_.set_ylabel(_said(name))
        axes_.grid(alpha=0.3)
    else:
        cells = [[cell(**{y.name: b, x.name: a}) for a in x.values] for b in y.values]
        shown = axes_.imshow(
            cells, aspect="auto", cmap="viridis" if sign < 0 else "viridis_r", origin="lower"
        )
        figure.colorbar(shown, label=_said(name))
        axes_.set_xticks(range(len(x.values)), [f"{v:.3g}" for v in x.values])
        axes_.set_yticks(range(len(y.values)), [f"{v:.3g}" for v in y.values])
        axes_.set_ylabel(_said(y.name))
        if len(x.values) <= 8 and len(y.values) <= 12:
            for i, row in enumerate(cells):
                for j, value in enumerate(row):
                    text = "–" if math.isnan(value) else f"{value:.3f}"
                    axes_.text(j, i, text, ha="center", va="center", fontsize=8).set_bbox(
                        {"facecolor": "white", "alpha": 0.6, "linewidth": 0, "pad": 1}
                    )
    axes_.set_xlabel(_said(x.name))
    axes_.set_title(f"{recipe}: {len(results)} models")
    figure.savefig(path, dpi=110)


def summary(best: Result, last: dict[str, Any]) -> str:
    """Say which point is the best, by what it was chosen, and what the test set says of it.

    Args:
        best: the result of the point.
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


def _said(name: str) -> str:
    """Write a name as a label.

    >>> _said("test_accuracy"), _said("lr")
    ('test accuracy', 'learning rate')
    """
    return "learning rate" if name == "lr" else name.replace("_", " ")


def only(state: TrainState, opt: Optimizer) -> TrainState:
    """Leave out of the optimizer's state what `opt`, one of whose rates is 0, has no place for.

    >>> params = {"w": fdl.random.uniform(fdl.random.key(0), (1,))}
    >>> key, step = fdl.random.key(0), fdl.random.key(0)[0]
    >>> both = TrainState(params, {}, optim.sgd(0.1, 0.9).init(params), key, step)
    >>> list(optim.hyperparams(only(both, optim.sgd(0.1)).opt_state))
    ['lr']
    """
    return state._replace(opt_state=_only(state.opt_state, opt.init(state.params)))


def _only(state: Tree, like: Tree) -> Tree:
    if type(like) is not tuple:  # of one transformation; a tuple is a chain of them
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
    plan: loop.Plan,
    result: Result,
    state: TrainState,
    progress: loop.Progress,
) -> None:
    """Save one member as the ordinary run that it is, over one that is there.

    Args:
        folder: of the run.
        name: of the recipe.
        config: its options.
        problem: what was trained.
        plan: how it was executed.
        result: what it came to.
        state: what it has learned.
        progress: how far it is.
    """
    here = report.environment(state.key.device)
    folder.mkdir(parents=True, exist_ok=True)
    report.write_config(folder, name, config, problem, plan, here)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    for record in result.history:
        report.append_metrics(folder, record)
    with Checkpointer(folder / "checkpoints", keep=1) as checkpointer:
        last = {k: v for k, v in result.history[-1].items() if isinstance(v, float)}
        checkpointer.save(
            state, metrics=last, config={"progress": run_folder.progress_as_json(progress)}
        )
    fdl.io.save(folder / "params.safetensors", tree.merge(state.params, state.buffers))
    report.draw_curves(folder, f"{name}, {point_of(result)}", result.history)
