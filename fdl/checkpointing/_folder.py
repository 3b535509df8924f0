"""What is in a folder of checkpoints: each of them, the best one, the newest intact one."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.distributed import ProcessGroup

from fdl._files import expanded
from fdl._numerics import best_index
from fdl.checkpointing._distributed import ABOUT, check_shards, load_shards
from fdl.io import inspect, load
from fdl.io._safetensors import read_header, read_tensors
from fdl.parallel._group import on_first
from fdl.tree import Tree

Mode = Literal["min", "max"]

# Counted, and not only by step: a run that goes on from an earlier checkpoint does steps again.
_NAME = re.compile(r"(\d{6,})-step-(\d+)(\.safetensors)?")  # a folder if of many processes


class Checkpoint(NamedTuple):
    """A checkpoint in its folder, and what it says of itself.

    >>> checkpoint = Checkpoint(Path("000001-step-5.safetensors"), 5, {"loss": 0.1}, {}, {})
    >>> checkpoint.metrics["loss"]
    0.1
    """

    path: Path
    step: int
    metrics: dict[str, float]
    config: dict[str, Any]
    versions: dict[str, str]  # of fdl and torch, that wrote it


class Restored(NamedTuple):
    """A state, and the checkpoint it was read from.

    >>> checkpoint = Checkpoint(Path("000001-step-5.safetensors"), 5, {}, {}, {})
    >>> state, (_, step, *_) = Restored({"w": torch.ones(1)}, checkpoint)
    >>> step
    5
    """

    state: Any
    checkpoint: Checkpoint


def checkpoints(folder: str | os.PathLike[str]) -> list[Checkpoint]:
    """List the readable checkpoints in a folder, the newest first, whoever is writing there.

    Args:
        folder: of a `Checkpointer`.

    Raises:
        FileNotFoundError: no such folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoints(folder)
    []
    """
    return list(readable(files_in(expanded(folder))))


def restore(
    folder: str | os.PathLike[str],
    checkpoint: Checkpoint | None = None,
    *,
    like: Tree = None,
    device: torch.device | str | None = None,
) -> Restored | None:
    """Read the newest checkpoint that is intact, None where there is none at all.

    A damaged one is skipped with a warning that names it.

    Args:
        folder: of a `Checkpointer`, which another process may be writing to.
        checkpoint: this one instead of the newest.
        like: a state of the structure, shapes and dtypes to expect; without it the file alone
            says what there is.
        device: where the tensors go, see `fdl.io.load`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: there are checkpoints, and all are damaged; or one is intact and is not `like`
            this (each path is listed).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     restore(folder)
    """
    return restore_newest(expanded(folder), checkpoint, like, device, None)


def restore_newest(
    folder: Path,
    checkpoint: Checkpoint | None,
    like: Tree,
    device: torch.device | str | None,
    group: ProcessGroup | None,
) -> Restored | None:
    files = on_first(group, lambda: files_in(folder)) if checkpoint is None else [checkpoint.path]
    found = readable(files) if checkpoint is None else iter([checkpoint])
    for candidate in found:
        try:
            if candidate.path.is_dir():
                state = load_shards(candidate.path, like, device, group)
            else:
                state = load(candidate.path, like=like, device=device)
            return Restored(state, candidate)
        except (OSError, ValueError) as error:
            if checkpoint is not None or _is_intact(candidate.path, group):
                raise
            _warn(candidate.path, error)
    if not files or not any(path.exists() for path in files):
        return None
    raise ValueError(
        f"restore: none of the {len(files)} checkpoints in {folder} is intact; "
        "move them away to begin anew"
    )


def files_in(folder: Path) -> list[Path]:
    """List the checkpoints, the newest first."""
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=serial_of, reverse=True)


def serial_of(path: Path) -> int:
    return int(path.name.partition("-")[0])


def readable(files: list[Path]) -> Iterator[Checkpoint]:
    for path in files:
        try:
            about = inspect(path / ABOUT if path.is_dir() else path).metadata
            metrics = {name: float(text) for name, text in about["metrics"].items()}
            yield Checkpoint(path, about["step"], metrics, about["config"], about["versions"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            _warn(path, error)


def _warn(path: Path, error: Exception) -> None:
    if path.exists():  # a writer may have removed it meanwhile, as one too old
        warnings.warn(
            f"Checkpointer: skipped {path}, which is damaged: {error}", RuntimeWarning, stacklevel=4
        )


def _is_intact(path: Path, group: ProcessGroup | None) -> bool:
    try:
        if path.is_dir():
            load(path / ABOUT)
            check_shards(path, group)
            return True
        with path.open("rb") as file:
            header = read_header(file.fileno(), "")
            for name in header.entries:
                read_tensors(file.fileno(), header, [name], "")
    except (OSError, ValueError):
        return False
    return True


def best_of(found: Iterator[Checkpoint], metric: str, mode: Mode) -> Checkpoint | None:
    """Find the best one by `best_index`; of equal ones, the newest."""
    with_it = [checkpoint for checkpoint in found if metric in checkpoint.metrics]
    i = best_index([checkpoint.metrics[metric] for checkpoint in with_it], mode)
    return None if i is None else with_it[i]


def check_mode(what: str, mode: str) -> None:
    if mode not in ("min", "max"):
        raise ValueError(f'{what} must be "min" or "max", got {mode!r}')
