"""Images rotated, shifted, scaled and sheared at random, as functions of a key."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from fdl import random
from fdl._checks import check_at_least_0, check_number, describe
from fdl.data._augment import check_images, draw_between, rounded
from fdl.random import Key


def random_rotation(key: Key, x: Tensor, degrees: float, fill: float = 0.0) -> Tensor:
    """Rotate each image about its centre by up to `degrees`, either way.

    Equals `torchvision.transforms.functional.rotate` with bilinear interpolation, by an angle drawn
    uniformly: positive ones turn counterclockwise. Each image has a draw of its own.

    Args:
        key: a key, int64 [2].
        x: images `[..., channels, height, width]` of any real dtype; integers are rounded.
        degrees: the largest angle, at least 0.
        fill: value of the pixels outside the image. (Other than 0, torchvision darkens the edge.)

    Returns:
        Images of the shape and dtype of `x`.

    Raises:
        TypeError: `key` is not a key, `x` is not a tensor of real numbers, or an option not one.
        ValueError: `x` has fewer than three axes, or an option is out of its range.

    >>> row = torch.tensor([[[1.0, 2.0, 3.0]]])
    >>> random_rotation(random.key(0), row, 0.0)
    tensor([[[1., 2., 3.]]])
    """
    check_images("random_rotation", key, x, real=True)
    check_at_least_0("random_rotation", degrees=degrees)
    _check_fill("random_rotation", fill)
    angle = draw_between(key, x, -degrees, degrees)
    zero = torch.zeros_like(angle)
    return _warped(x, _inverse(-angle, zero, torch.ones_like(angle)), (zero, zero), fill)


def random_affine(
    key: Key,
    x: Tensor,
    degrees: float = 0.0,
    translate: tuple[float, float] = (0.0, 0.0),
    scale: tuple[float, float] = (1.0, 1.0),
    shear: float = 0.0,
    fill: float = 0.0,
) -> Tensor:
    """Rotate, shift, scale and shear each image, with draws of its own, all uniform.

    Equals `torchvision.transforms.functional.affine` with bilinear interpolation. There, unlike in
    `rotate`, a positive angle turns clockwise. Shifts are real numbers, not whole pixels.

    Args:
        key: a key, int64 [2].
        x: images `[..., channels, height, width]` of any real dtype; integers are rounded.
        degrees: the largest angle, at least 0.
        translate: the largest shifts, as fractions of width and height, at least 0.
        scale: smallest and largest factor, both positive.
        shear: the largest angle of shear along the width, in degrees, from 0 to below 90.
        fill: value of the pixels outside the image.

    Returns:
        Images of the shape and dtype of `x`.

    Raises:
        TypeError: `key` is not a key, `x` is not a tensor of real numbers, or an option not one.
        ValueError: `x` has fewer than three axes, or an option is out of its range.

    >>> row = torch.tensor([[[1.0, 2.0, 3.0]]])
    >>> random_affine(random.key(0), row, scale=(3.0, 3.0))
    tensor([[[1.6667, 2.0000, 2.3333]]])
    """
    check_images("random_affine", key, x, real=True)
    check_at_least_0("random_affine", degrees=degrees, shear=shear)
    _check_fill("random_affine", fill)
    for name, pair in (("translate", translate), ("scale", scale)):
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(f"random_affine: {name} must be two numbers, got {describe(pair)}")
        check_at_least_0(
            "random_affine", **{f"{name}[{i}]": number for i, number in enumerate(pair)}
        )
    if not 0 < scale[0] <= scale[1]:
        raise ValueError(f"random_affine: scale must be (low, high), 0 < low ≤ high, got {scale}")
    if shear >= 90:
        raise ValueError(f"random_affine: shear must be below 90 degrees, got {shear}")
    height, width = x.shape[-2:]
    angle, right, down, factor, slant = (
        draw_between(k, x, low, high)
        for k, (low, high) in zip(
            random.split(key, 5),
            (
                (-degrees, degrees),
                (-translate[0] * width, translate[0] * width),
                (-translate[1] * height, translate[1] * height),
                scale,
                (-shear, shear),
            ),
            strict=True,
        )
    )
    return _warped(x, _inverse(angle, slant, factor), (right, down), fill)


def _inverse(angle: Tensor, shear: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """Return the inverse of rotation × shear × scale, row by row: four tensors like `angle`."""
    turn, slant = angle * (math.pi / 180), torch.tan(shear * (math.pi / 180))
    cos, sin = torch.cos(turn), torch.sin(turn)
    rows = (cos - sin * slant, sin + cos * slant, -sin, cos)
    return tuple(entry / scale for entry in rows)


def _warped(
    x: Tensor, inverse: tuple[Tensor, ...], shift: tuple[Tensor, Tensor], fill: float
) -> Tensor:
    """Take each pixel from where the inverse of a linear map says, between four pixels of `x`.

    Places are computed in float64, from the centre of the image, at ((width − 1) / 2, …).
    """
    height, width = x.shape[-2:]
    working = x.dtype if x.dtype == torch.float64 else torch.float32
    if not x.is_floating_point() and x.element_size() > 2:
        working = torch.float64
    down, right = (
        torch.arange(n, dtype=torch.float64, device=x.device) - (n - 1) / 2 for n in (height, width)
    )
    a, b, c, d = (entry[..., None, None] for entry in inverse)
    right, down = right - shift[0][..., None, None], down[:, None] - shift[1][..., None, None]
    column = a * right + b * down + (width - 1) / 2
    row = c * right + d * down + (height - 1) / 2
    left, top = column.floor(), row.floor()
    values = x.to(working).flatten(-2)
    total = torch.zeros((), dtype=working, device=x.device)
    for lower, later in itertools.product((0, 1), repeat=2):
        i, j = top + lower, left + later
        weight = (1 - (row - i).abs()) * (1 - (column - j).abs())
        inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
        index = (i.clamp(0, height - 1) * width + j.clamp(0, width - 1)).long()
        index, weight, inside = (t.flatten(-2)[..., None, :] for t in (index, weight, inside))
        pixel = torch.where(inside, torch.take_along_dim(values, index, -1), fill)
        total = total + weight.to(working) * pixel
    return rounded(total.unflatten(-1, (height, width)), x.dtype)


def _check_fill(caller: str, fill: float) -> None:
    check_number(caller, "fill", fill, "finite", math.isfinite)
