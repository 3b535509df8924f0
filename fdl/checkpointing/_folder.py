"""List the checkpoints in a folder, and find the best or restore the newest intact one."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.distributed import ProcessGroup

from fdl._checks import describe
from fdl._files import expanded
from fdl._numerics import best_index
from fdl.checkpointing._distributed import ABOUT, check_shards, load_shards
from fdl.io import inspect, load
from fdl.io._safetensors import read_header, read_tensors
from fdl.parallel._group import on_first
from fdl.tree import Tree

Mode = Literal["min", "max"]

# With a serial number, because a run resumed from an earlier checkpoint repeats steps.
_NAME = re.compile(r"(\d{6,})-step-(\d+)(\.safetensors)?")  # a folder if sharded


class Checkpoint(NamedTuple):
    """A checkpoint in a folder, and its metadata.

    >>> checkpoint = Checkpoint(Path("000001-step-5.safetensors"), 5, {"loss": 0.1}, {}, {})
    >>> checkpoint.metrics["loss"]
    0.1
    """

    path: Path
    step: int
    metrics: dict[str, float]
    config: dict[str, Any]
    versions: dict[str, str]  # of fdl and torch that wrote it


class Restored(NamedTuple):
    """A state and the checkpoint it was read from.

    >>> checkpoint = Checkpoint(Path("000001-step-5.safetensors"), 5, {}, {}, {})
    >>> state, (_, step, *_) = Restored({"w": torch.ones(1)}, checkpoint)
    >>> step
    5
    """

    state: Any
    checkpoint: Checkpoint


def checkpoints(folder: str | os.PathLike[str]) -> list[Checkpoint]:
    """List the readable checkpoints in a folder, the newest first.

    Args:
        folder: folder of a `Checkpointer`, which may be writing there.

    Raises:
        FileNotFoundError: the folder does not exist.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoints(folder)
    []
    """
    return list(readable(files_in(expanded(folder, "checkpoints", "folder"))))


def restore(
    folder: str | os.PathLike[str],
    checkpoint: Checkpoint | None = None,
    *,
    like: Tree = None,
    device: torch.device | str | None = None,
) -> Restored | None:
    """Read the newest intact checkpoint; return None if there are no checkpoints.

    Damaged checkpoints are skipped with a warning that names them.

    Args:
        folder: folder of a `Checkpointer`, which may be writing there.
        checkpoint: read this one instead of the newest.
        like: a state with the expected structure, shapes and dtypes; by default these come from
            the file.
        device: where the tensors go, see `fdl.io.load`.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: all checkpoints are damaged, or an intact one does not match `like` (each path
            is listed).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     restore(folder)
    """
    check_checkpoint("restore", checkpoint)
    folder = expanded(folder, "restore", "folder")
    return restore_newest(folder, checkpoint, like, device, None)


def check_checkpoint(caller: str, checkpoint: Any) -> None:
    """Raise unless an argument is a checkpoint or None."""
    if not isinstance(checkpoint, Checkpoint | None):
        raise TypeError(
            f"{caller}: checkpoint must be a Checkpoint, one of checkpoints(folder), got "
            f"{describe(checkpoint)}"
        )


def restore_newest(
    folder: Path,
    checkpoint: Checkpoint | None,
    like: Tree,
    device: torch.device | str | None,
    group: ProcessGroup | None,
) -> Restored | None:
    files = on_first(group, lambda: files_in(folder)) if checkpoint is None else [checkpoint.path]
    candidates = readable(files) if checkpoint is None else iter([checkpoint])
    for candidate in candidates:
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
        "move them away to start a new run"
    )


def files_in(folder: Path) -> list[Path]:
    """List the checkpoints, the newest first."""
    paths = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(paths, key=serial_of, reverse=True)


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
    if path.exists():  # else a writer has removed it as too old
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


def best_of(checkpoints: Iterator[Checkpoint], metric: str, mode: Mode) -> Checkpoint | None:
    """Find the checkpoint with the best metric; among equal ones, the newest."""
    candidates = [checkpoint for checkpoint in checkpoints if metric in checkpoint.metrics]
    i = best_index([checkpoint.metrics[metric] for checkpoint in candidates], mode)
    return None if i is None else candidates[i]


def check_mode(what: str, mode: str) -> None:
    if mode not in ("min", "max"):
        raise ValueError(f'{what} must be "min" or "max", got {mode!r}')
