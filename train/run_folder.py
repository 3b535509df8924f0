"""The folder of a run or a sweep: make or find it, and write and read what it holds."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fdl._files import atomic_write
from train.config import RECIPES, SWEEPS, Recipe
from train.planning import Plan
from train.recipes import Problem
from train.records import from_json, to_json

__all__ = [
    "Saved",
    "SavedSweep",
    "append_metrics",
    "cut_metrics",
    "make",
    "newest",
    "read_metrics",
    "read_run",
    "read_sweep",
    "sync_metrics",
    "write_config",
    "write_sweep",
    "write_text",
]

MARKS = {"run": "config.json", "sweep": "sweep.json"}
"""The file that makes a folder a run or a sweep."""


def make(out: Path | None, recipe: str) -> Path:
    """Make the folder of a new run: `out`, or `runs/RECIPE/TIME`.

    Raises:
        ValueError: `out` holds a run already, which would be overwritten.
        OSError: the folder cannot be made.
    """
    if out is None:
        return _make_by_time(Path("runs") / recipe)
    if any((out / mark).exists() for mark in MARKS.values()) or any(
        out.glob("checkpoints/*.safetensors")
    ):
        raise ValueError(f"--out {out} holds a run already; choose another folder or remove it")
    out.mkdir(parents=True, exist_ok=True)
    return out


def _make_by_time(runs: Path) -> Path:
    """Make a folder named by the time, with microseconds if another run began this second."""
    runs.mkdir(parents=True, exist_ok=True)
    now = datetime.now()
    folder = runs / now.strftime("%Y-%m-%d-%H%M%S")
    try:
        folder.mkdir()
    except FileExistsError:
        folder = runs / now.strftime("%Y-%m-%d-%H%M%S-%f")
        folder.mkdir()
    return folder


def newest(folder: Path, what: str = "run") -> Path:
    """Return the folder if it is a run, else the newest run in it, which is printed.

    Args:
        folder: a run, the runs of a recipe such as runs/lenet, a sweep, or a folder of sweeps.
        what: "run" or "sweep".

    Raises:
        ValueError: there is no run; the message names what was found.

    >>> newest(Path("nowhere"))
    Traceback (most recent call last):
    ValueError: nowhere holds no run: there is no such folder
    """
    mark = MARKS[what]
    if (folder / mark).is_file():
        return folder
    candidates = [*folder.glob(f"*/{mark}"), *folder.glob(f"*/best/{mark}")]  # of a sweep, its best
    marks = sorted(candidates, key=lambda path: path.stat().st_mtime)
    if not marks:
        raise ValueError(f"{folder} holds no {what}: {_found_instead(folder, mark)}")
    print(f"the newest {what} in {folder}: {marks[-1].parent}")
    return marks[-1].parent


def _found_instead(folder: Path, mark: str) -> str:
    """Name what was found, and what to pass instead."""
    if not folder.exists():
        return "there is no such folder" + _suggestions(folder.parent, mark)
    if not folder.is_dir():
        return "it is a file; give the folder of a run"
    if (folder.parent / mark).is_file():
        return f"it is part of one, {folder.parent}"
    if (folder / "sweep.json").is_file():
        return "it is a sweep without a best run"
    if (folder / "config.json").is_file():
        return f"it is a run of {read_run(folder).recipe}"
    return f"there is no {folder / mark}" + _suggestions(folder, mark)


def _suggestions(folder: Path, mark: str) -> str:
    """Name up to three runs, and folders of runs, in a folder."""
    runs = {path.parent for path in folder.glob(f"*/{mark}")}
    runs |= {path.parent.parent for path in folder.glob(f"*/*/{mark}")}
    names = sorted(str(run) for run in runs)
    more = ", …" if len(names) > 3 else ""
    return f"; there is {', '.join(names[:3])}{more}" if names else ""


def write_config(
    folder: Path,
    recipe: str,
    config: Recipe,
    problem: Problem,
    plan: Plan,
    environment: Mapping[str, Any],
    resumed: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write `config.json`: every option, and whatever else the numbers depend on.

    Args:
        folder: folder of the run.
        recipe: name of the recipe.
        config: its options.
        problem: gives the name of the data and the number of passes over them in an epoch.
        plan: how the run is executed.
        environment: the environment the run began in.
        resumed: the steps at which the run was resumed in another environment.
    """
    extra = {"environment": environment, "resumed": list(resumed)}
    _write_record(folder / MARKS["run"], folder, recipe, config, problem, plan, extra)


def write_sweep(
    folder: Path, recipe: str, config: Recipe, problem: Problem, plan: Plan, size: int
) -> None:
    """Write `sweep.json`: every option of a sweep.

    Args:
        folder: folder of the sweep.
        recipe: name of the recipe.
        config: its options, the grid among them.
        problem: gives the name of the data and the number of passes over them in an epoch.
        plan: how the groups are executed.
        size: number of members in a group.
    """
    _write_record(folder / MARKS["sweep"], folder, recipe, config, problem, plan, {"size": size})


def _write_record(
    path: Path,
    folder: Path,
    recipe: str,
    config: Recipe,
    problem: Problem,
    plan: Plan,
    extra: Mapping[str, Any],
) -> None:
    record = {
        "recipe": recipe,
        "options": dataclasses.asdict(config) | {"out": str(folder), "resume": None},
        "data": problem.data,
        "passes": problem.passes,
        "plan": plan._asdict(),
        **extra,
    }
    write_text(path, to_json(record, indent=2, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""

    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    atomic_write(path, write)


class Saved(NamedTuple):
    """The content of `config.json`."""

    recipe: str
    config: Recipe
    data: str
    passes: int
    plan: Plan
    environment: dict[str, Any]
    resumed: list[dict[str, Any]]


def read_run(folder: Path) -> Saved:
    """Read `config.json` of a run.

    Raises:
        ValueError: the file was not written by this version of fdl.
        OSError: there is no such file.
    """
    path = folder / MARKS["run"]
    with _of_this_version(path, "run"):
        record = json.loads(path.read_text())
        config = RECIPES[record["recipe"]](**_options(record))
        return Saved(
            record["recipe"],
            config,
            record["data"],
            record.get("passes", 1),  # missing in older runs
            Plan(**record["plan"]),
            record["environment"],
            record["resumed"],
        )


@contextmanager
def _of_this_version(path: Path, kind: str) -> Iterator[None]:
    """Name the file and the kind of folder in the error if the record has another form."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not that of a {kind} of this version of fdl "
            f"({type(error).__name__}: {error})"
        ) from error


class SavedSweep(NamedTuple):
    """The content of `sweep.json`."""

    recipe: str
    config: Recipe  # with its grid
    data: str
    passes: int
    plan: Plan
    size: int  # members of a group


def read_sweep(folder: Path) -> SavedSweep:
    """Read `sweep.json` of a sweep.

    Raises:
        ValueError: the file was not written by this version of fdl.
        OSError: there is no such file.
    """
    path = folder / MARKS["sweep"]
    with _of_this_version(path, "sweep"):
        record = json.loads(path.read_text())
        config = SWEEPS[record["recipe"]](**_options(record))
        return SavedSweep(
            record["recipe"],
            config,
            record["data"],
            record.get("passes", 1),  # missing in older sweeps
            Plan(**record["plan"]),
            record["size"],
        )


def _options(record: Mapping[str, Any]) -> dict[str, Any]:
    """Read options; runs and sweeps older than the option --validation had no validation set."""
    options = {"validation": 0.0} | record["options"] | {"out": None}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}


def append_metrics(folder: Path, record: Mapping[str, Any]) -> None:
    """Append one line to `metrics.jsonl`."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(to_json(record) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of `metrics.jsonl`; one that is incomplete, of a run that died, is left out.

    >>> read_metrics(Path("nowhere"))
    []
    """
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [from_json(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def sync_metrics(folder: Path) -> None:
    """Flush `metrics.jsonl` to the disk, if it exists."""
    path = folder / "metrics.jsonl"
    if path.exists():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def cut_metrics(folder: Path, epochs: int) -> list[dict[str, Any]]:
    """Cut `metrics.jsonl` to the lines of the first epochs, and return these.

    The lines cut were written after the checkpoint, and will be written again: lines of whole
    epochs, of a part of one, or one that was incomplete when the run died.

    Raises:
        ValueError: lines of the first epochs are missing.
    """
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [from_json(line) for line in lines[:epochs]]
    if [record["epoch"] for record in records] != list(range(1, epochs + 1)):
        raise ValueError(
            f"{path} must have a line for each of the {epochs} epochs in the checkpoint, "
            f"got {len(records)} lines; restore the file that the run wrote"
        )
    write_text(path, "".join(line + "\n" for line in lines[:epochs]))
    return records
