"""From a picture in a file to an image like those of Fashion-MNIST: 28 × 28, light on black."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

__all__ = ["FORMATS", "read_image"]

SIDE = 28
FORMATS = ("PNG", "JPEG", "WEBP")
SHOWN = 24  # how far from the background a grey level is something that the picture shows
ENOUGH = 128  # pixels on the longest side suffice to find where that is

Invert = Literal["auto", "on", "off"]


def read_image(path: Path, invert: Invert = "auto") -> tuple[Tensor, str]:
    """Read a picture as uint8 [28, 28], and say what was changed for that.

    As Fashion-MNIST was made of photographs: what the picture shows is cropped out, on a square of
    its background, resized, and inverted where the background is light. A picture of 28 × 28 keeps
    its pixels.

    Args:
        path: of a PNG, JPEG or WebP file.
        invert: whether to swap light and dark; "auto" looks at the corners.

    Raises:
        ValueError: the file is absent, damaged, enormous, or of another format.

    >>> read_image(Path("absent.png"))
    Traceback (most recent call last):
    ValueError: absent.png: no such file
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as opened:
                image, background = _gray(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not a PNG, JPEG or WebP file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{path} is too large: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:  # how Pillow says it is damaged
        raise ValueError(f"{path} cannot be read: {error}") from error
    changes = []
    if invert == "on" or (invert == "auto" and background > 127):
        image, background = ImageOps.invert(image), 255 - background
        changes.append("inverted: its background is light" if invert == "auto" else "inverted")
    if image.size != (SIDE, SIDE):
        width, height = image.size
        image = _square(image, background).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        changes.append(f"cropped, and resized from {width} × {height} to {SIDE} × {SIDE}")
    return torch.from_numpy(np.array(image)), "; ".join(changes)


def _gray(image: Image.Image) -> tuple[Image.Image, int]:
    """Make 8 bits of grey, and find the level of the background: it fills the corners."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    gray = image.convert("L")
    if image.has_transparency_data:
        shown = np.asarray(image.convert("RGBA").getchannel("A")) / 255
        if (shown < 1).any():
            return _on_contrast(np.asarray(gray), shown)
    pixels, side = np.asarray(gray), max(1, min(gray.size) // 10)
    ends = np.r_[:side, -side:0]
    return gray, int(np.median(pixels[ends][:, ends]))


def _on_contrast(gray: np.ndarray, shown: np.ndarray) -> tuple[Image.Image, int]:
    """Put what is shown, 0 to 1, on black or on white, from which it stands out more."""
    mean = (shown * gray).sum() / max(shown.sum(), 1)
    background = 0 if mean > 127 else 255
    pixels = shown * gray + (1 - shown) * background
    return Image.fromarray(pixels.round().astype(np.uint8)), background


def _square(image: Image.Image, background: int) -> Image.Image:
    """Crop what stands out from the background, and centre it on a black square."""
    small = image.copy()
    small.thumbnail((ENOUGH, ENOUGH), Image.Resampling.BOX)  # its means are free of noise
    shown = np.abs(np.asarray(small).astype(int) - background) > SHOWN
    scale = image.width / small.width
    box = (0, 0, *image.size)
    if shown.any():
        (top, bottom), (left, right) = (np.flatnonzero(shown.any(axis))[[0, -1]] for axis in (1, 0))
        edges = [edge * scale for edge in (left, top, right + 1, bottom + 1)]
        box = (round(edges[0]), round(edges[1]), round(edges[2]), round(edges[3]))
    level = image.point(lambda v: max(0, v - background) * 255 / max(1, 255 - background))
    cropped = level.crop(box)
    side = max(cropped.size)
    square = Image.new("L", (side, side))
    square.paste(cropped, ((side - cropped.width) // 2, (side - cropped.height) // 2))
    return square
