"""Resizing and warping: interpolate in several modes, affine grids, grid_sample, unfold."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fdl import random
from tests.support.programs import Program


def step(image, theta):
    grid = F.affine_grid(theta[None], [1, 2, 6, 5], align_corners=False)
    warped = F.grid_sample(image[None], grid, padding_mode="border", align_corners=False)
    nearest = F.grid_sample(image[None], grid, mode="nearest", align_corners=True)
    small = F.interpolate(warped, scale_factor=0.5, mode="bilinear")
    back = F.interpolate(small, (6, 5), mode="bicubic", align_corners=True)
    line = F.interpolate(warped.flatten(2), 7, mode="linear")
    blocks = F.unfold(F.interpolate(back, scale_factor=2, mode="nearest"), 4, stride=4)
    shuffled = F.pixel_unshuffle(F.pad(warped, (0, 1, 0, 0), mode="reflect"), 2)
    folded = F.fold(F.unfold(warped, 2), (6, 5), 2)
    image = 0.5 * image + 0.5 * back[0]
    return image, {"nearest": nearest, "line": line, "blocks": blocks, "x": shuffled, "y": folded}


def init():
    return random.normal(random.key(0), (2, 6, 5), torch.float64)


def xs():
    return torch.eye(2, 3).double() + 0.2 * random.normal(random.key(1), (4, 2, 3), torch.float64)


PROGRAM = Program(step, init, xs)
