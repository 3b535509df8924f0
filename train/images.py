"""Convert a picture in a file to an image like Fashion-MNIST's: 28 × 28, light on black."""

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
CONTRAST = 24  # minimum difference in grey level between an object and the background
THUMBNAIL = 128  # pixels on the longest side of the copy that is searched for the object

Invert = Literal["auto", "on", "off"]


def read_image(path: Path, invert: Invert = "auto") -> tuple[Tensor, str]:
    """Read a picture as uint8 `[28, 28]`, and describe the changes made to it.

    Follows the way Fashion-MNIST was made from photographs: the object is cropped, centred on a
    square, resized, and inverted if the background is light. A picture of 28 × 28 is not resized.

    Args:
        path: a PNG, JPEG or WebP file.
        invert: "on" swaps light and dark; "auto" does if the corners are light.

    Raises:
        ValueError: the file is absent, damaged, too large, or has another format.

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
    except (OSError, SyntaxError, ValueError) as error:  # raised by Pillow for damaged files
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
    """Convert to 8-bit grey, and return the level of the background, taken from the corners."""
    if image.mode.startswith("I"):  # 16 bits; Pillow would clip them
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    gray = image.convert("L")
    if image.has_transparency_data:
        opacity = np.asarray(image.convert("RGBA").getchannel("A")) / 255
        if (opacity < 1).any():
            return _on_contrast(np.asarray(gray), opacity)
    pixels, side = np.asarray(gray), max(1, min(gray.size) // 10)
    ends = np.r_[:side, -side:0]
    return gray, int(np.median(pixels[ends][:, ends]))


def _on_contrast(gray: np.ndarray, opacity: np.ndarray) -> tuple[Image.Image, int]:
    """Put a transparent image, opacity 0 to 1, on black or white, whichever contrasts more."""
    mean = (opacity * gray).sum() / max(opacity.sum(), 1)
    background = 0 if mean > 127 else 255
    pixels = opacity * gray + (1 - opacity) * background
    return Image.fromarray(pixels.round().astype(np.uint8)), background


def _square(image: Image.Image, background: int) -> Image.Image:
    """Crop the object, and centre it on a black square."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)  # averages out noise
    object_ = np.abs(np.asarray(small).astype(int) - background) > CONTRAST
    scale = image.width / small.width
    box = (0, 0, *image.size)
    if object_.any():
        spans = [np.flatnonzero(object_.any(axis))[[0, -1]] for axis in (1, 0)]
        (top, bottom), (left, right) = spans
        edges = [edge * scale for edge in (left, top, right + 1, bottom + 1)]
        box = (round(edges[0]), round(edges[1]), round(edges[2]), round(edges[3]))
    level = image.point(lambda v: max(0, v - background) * 255 / max(1, 255 - background))
    cropped = level.crop(box)
    side = max(cropped.size)
    square = Image.new("L", (side, side))
    square.paste(cropped, ((side - cropped.width) // 2, (side - cropped.height) // 2))
    return square
