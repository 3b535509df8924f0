"""Runs that exist already: what their folders say, and how they go on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdl.metrics import Mean
from train.config import RECIPES, SWEEPS, Recipe
from train.loop import Plan, Progress
from train.options import read

__all__ = [
    "SWEEP_MAY_CHANGE",
    "Saved",
    "SavedSweep",
    "differences",
    "given_anew",
    "newest",
    "progress_as_json",
    "progress_from_json",
    "read_run",
    "read_sweep",
]

MARKS = {"run": "config.json", "sweep": "sweep.json"}
SWEEP_MAY_CHANGE = ("device", "data", "memory", "resume")
MAY_CHANGE = ("epochs", "device", "data", "save_every", "resume")


class Saved(NamedTuple):
    """What `config.json` says of a run."""

    recipe: str
    config: Recipe
    data: str
    passes: int
    plan: Plan
    environment: dict[str, Any]
    resumed: list[dict[str, Any]]


def newest(folder: Path, what: str = "run") -> Path:
    """Return the folder itself where it is a run, or the newest run in it, and say which.

    Args:
        folder: of a run, or of the runs of a recipe, such as runs/lenet, or of a sweep or sweeps.
        what: "run" or "sweep".

    Raises:
        ValueError: there is no run; what there is instead is named.

    >>> newest(Path("nowhere"))
    Traceback (most recent call last):
    ValueError: nowhere holds no run: there is no such folder
    """
    mark = MARKS[what]
    if (folder / mark).is_file():
        return folder
    found = [*folder.glob(f"*/{mark}"), *folder.glob(f"*/best/{mark}")]  # of a sweep, its best
    marks = sorted(found, key=lambda path: path.stat().st_mtime)
    if not marks:
        raise ValueError(f"{folder} holds no {what}: {_found_instead(folder, mark)}")
    print(f"the newest {what} in {folder}: {marks[-1].parent}")
    return marks[-1].parent


def _found_instead(folder: Path, mark: str) -> str:
    """Say what is there, and what to give instead."""
    if not folder.exists():
        return "there is no such folder" + _such_as(folder.parent, mark)
    if not folder.is_dir():
        return "it is a file; give the folder of a run"
    if (folder.parent / mark).is_file():
        return f"it is part of one, {folder.parent}"
    if (folder / "sweep.json").is_file():
        return "it is a sweep without a best run"
    if (folder / "config.json").is_file():
        return f"it is a run of {read_run(folder).recipe}"
    return f"there is no {folder / mark}" + _such_as(folder, mark)


def _such_as(folder: Path, mark: str) -> str:
    """Name the runs in a folder, and the folders of runs."""
    runs = {path.parent for path in folder.glob(f"*/{mark}")}
    runs |= {path.parent.parent for path in folder.glob(f"*/*/{mark}")}
    names = sorted(str(run) for run in runs)
    more = ", …" if len(names) > 3 else ""
    return f"; there is {', '.join(names[:3])}{more}" if names else ""


def read_run(folder: Path) -> Saved:
    """Read `config.json` of a run.

    Raises:
        ValueError: it is not one of ours.
        OSError: there is none.
    """
    path = folder / "config.json"
    try:
        record = json.loads(path.read_text())
        config = RECIPES[record["recipe"]](**_options(record))
        return Saved(
            record["recipe"],
            config,
            record["data"],
            record.get("passes", 1),  # which older runs do not say
            Plan(**record["plan"]),
            record["environment"],
            record["resumed"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not that of a run of this version of fdl ({type(error).__name__}: {error})"
        ) from error


class SavedSweep(NamedTuple):
    """What `sweep.json` says of a sweep."""

    recipe: str
    config: Recipe  # with its grid
    data: str
    passes: int
    plan: Plan
    size: int  # members of a group


def read_sweep(folder: Path) -> SavedSweep:
    """Read `sweep.json` of a sweep.

    Raises:
        ValueError: it is not one of ours.
        OSError: there is none.
    """
    path = folder / "sweep.json"
    try:
        record = json.loads(path.read_text())
        config = SWEEPS[record["recipe"]](**_options(record))
        return SavedSweep(
            record["recipe"],
            config,
            record["data"],
            record.get("passes", 1),
            Plan(**record["plan"]),
            record["size"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not that of a sweep of this version of fdl "
            f"({type(error).__name__}: {error})"
        ) from error


def _options(record: Mapping[str, Any]) -> dict[str, Any]:
    """Read options; those of runs and sweeps from before there was a validation set have none."""
    options = {"validation": 0.0} | record["options"] | {"out": None}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}


def given_anew(
    recipe: str,
    folder: Path,
    saved: Saved | SavedSweep,
    arguments: Sequence[str],
    may_change: Sequence[str] = MAY_CHANGE,
) -> Recipe:
    """Take the options of a run, and over them those on the command line.

    Args:
        recipe: that is asked for.
        folder: of the run.
        saved: what it says.
        arguments: after the name of the recipe.
        may_change: options that leave it the same run.

    Raises:
        ValueError: an option differs that would make it another run.
    """
    if saved.recipe != recipe:
        raise ValueError(f"--resume {folder} is a run of {saved.recipe}, got {recipe}")
    default: Any = saved.config
    grid = {"grid": default.grid} if hasattr(default, "grid") else {}
    if grid:  # which the command line would add to
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
                f"{option} is {was} in {folder}, got {now}: a run goes on as it began; "
                f"leave {option} out, or start another run"
            )
    going_on: Recipe = dataclasses.replace(config, resume=folder, out=None)
    return going_on


def differences(began: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name what differs between two environments and may show in the bits of a result.

    >>> differences({"torch": "2.11.0", "threads": 1}, {"torch": "2.15.0", "threads": 1})
    'torch 2.15.0, was 2.11.0'
    """
    return "; ".join(
        f"{name} {now[name]}, was {began.get(name)}"
        for name in now
        if name != "python" and now[name] != began.get(name)
    )


def progress_as_json(progress: Progress) -> dict[str, Any]:
    """Write a `Progress` as JSON, which keeps every bit of a float64.

    >>> total = {"loss": Mean(torch.tensor(0.1).double(), torch.tensor(3.0).double())}
    >>> progress_as_json(Progress(2, 5, total, 1.5))["total"]
    {'loss': [0.10000000149011612, 3.0]}
    """
    total = {name: [mean.total.item(), mean.count.item()] for name, mean in progress.total.items()}
    return progress._asdict() | {"total": total}


def progress_from_json(record: Mapping[str, Any], device: torch.device) -> Progress:
    """Read what `progress_as_json` wrote.

    >>> record = {"epoch": 2, "done": 5, "total": {"loss": [0.5, 3.0]}, "seconds": 1.5}
    >>> progress_as_json(progress_from_json(record, torch.device("cpu"))) == record
    True
    """

    def tensor(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=device)

    total = {
        name: Mean(tensor(total), tensor(count)) for name, (total, count) in record["total"].items()
    }
    return Progress(record["epoch"], record["done"], total, record["seconds"])
