"""Training as a pure function: `fdl` exports these names."""

from __future__ import annotations

from fdl._training._averaged import averaged
from fdl._training._loss import StatefulLoss
from fdl._training._state import TrainState
from fdl._training._step import eval_step, train_step
from fdl._training._supervised import supervised
from fdl._training._update_bn import update_bn

__all__ = [
    "StatefulLoss",
    "TrainState",
    "averaged",
    "eval_step",
    "supervised",
    "train_step",
    "update_bn",
]
