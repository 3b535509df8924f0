"""Errors of `fdl.parallel` list every leaf that is wrong, on one process too."""

from __future__ import annotations

import pytest
import torch

import fdl
from fdl import losses, nn, optim, parallel, random


def test_own_rows_lists_every_leaf_without_a_batch_axis():
    rows = {"index": torch.zeros(3), "mask": torch.zeros(3, 4), "weight": torch.tensor(1.0)}
    listed = r"divisible by the 1 processes, got\n  index: \[3\]\n  weight: \[\]$"
    with pytest.raises(ValueError, match=listed):
        parallel.own_rows(rows, None)
    with pytest.raises(ValueError, match=r"got\n  indices: \[3\]$"):
        parallel.own_rows(torch.zeros(3), None)


def test_a_batch_that_cannot_be_cut_lists_every_leaf():
    model, opt = nn.linear(2, 1), optim.sgd(0.1)
    step = parallel.train_step(fdl.supervised(model, losses.mse), opt, None, microbatches=3)
    state = fdl.TrainState.create(model, opt, key=random.key(0))
    listed = r"by the 3 microbatches of a process, got\n  0: \[4, 2\]\n  1: \[4, 1\]$"
    with pytest.raises(ValueError, match=listed):
        step(state, (torch.ones(4, 2), torch.ones(4, 1)))
    with pytest.raises(ValueError, match="a power of two times the 1 processes, got 0"):
        parallel.train_step(fdl.supervised(model, losses.mse), opt, None, microbatches=0)
