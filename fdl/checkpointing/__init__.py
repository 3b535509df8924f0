"""Checkpoints of a run in a folder: written in the background, verified on reading."""

from __future__ import annotations

from fdl.checkpointing._checkpointer import Checkpointer
from fdl.checkpointing._folder import Checkpoint, Restored, checkpoints, restore

__all__ = [
    "Checkpoint",
    "Checkpointer",
    "Restored",
    "checkpoints",
    "restore",
]
