"""Conway's Game of Life on a torus by a convolution, with births by key."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fdl import random
from tests.support.programs import Program

SIZE = 12
kernel = torch.ones(1, 1, 3, 3)
kernel[0, 0, 1, 1] = 0


def neighbours(board):
    padded = F.pad(board.float()[None, None], (1, 1, 1, 1), mode="circular")
    return F.conv2d(padded, kernel)[0, 0].round().to(torch.uint8)


def step(board, key):
    count = neighbours(board)
    board = (count == 3) | (board & (count == 2))
    board = board | random.bernoulli(key, 0.02, board.shape)
    rows = board.sum(1, dtype=torch.int16)
    return board, {"alive": board.sum(), "rows": rows, "most": count.max()}


PROGRAM = Program(
    step,
    init=lambda: random.bernoulli(random.key(0), 0.4, (SIZE, SIZE)),
    xs=lambda: random.split(random.key(1), 6),
    differentiable=False,
)
