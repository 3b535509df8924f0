"""Which checkpoints of a run stay: the newest few and the best."""

from __future__ import annotations

import shutil
from pathlib import Path

from fdl.checkpointing._folder import Mode, best_of, files_in, readable


def remove_old(folder: Path, keep: int, best: tuple[str, Mode] | None) -> None:
    """Remove all checkpoints in a folder but the newest ones and the best one.

    Args:
        folder: the folder of the run.
        keep: number of newest checkpoints that stay.
        best: a metric and its mode: the checkpoint that is best by it stays too.
    """
    files = files_in(folder)
    winner = best_of(readable(files), *best) if best else None
    for path in files[keep:]:
        if winner is None or path != winner.path:
            remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint; a folder is renamed first, so that no incomplete one is seen."""
    if path.is_dir():
        hidden = path if path.name.startswith(".") else path.with_name(f".{path.name}")
        path.rename(hidden)
        shutil.rmtree(hidden)
    else:
        path.unlink(missing_ok=True)
