"""Convert a picture in a file to an image like those of a data set, such as 28 × 28 on black."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from train.image_sets import IMAGE_SETS, ImageSet

__all__ = ["FORMATS", "read_image"]

FORMATS = ("PNG", "JPEG", "WEBP")
CONTRAST = 24  # minimum difference in grey level between an object and the background
THUMBNAIL = 128  # pixels on the longest side of the copy that is searched for the object

Invert = Literal["auto", "on", "off"]


def read_image(
    path: Path, invert: Invert = "auto", like: ImageSet = IMAGE_SETS["fashion-mnist"]
) -> tuple[Tensor, str]:
    """Read a picture as uint8 `[side, side]`, or `[3, side, side]`, and describe the changes.

    Follows the way Fashion-MNIST was made from photographs: the object is cropped, centred on a
    square, resized, and inverted if the background is light. Of a photograph in colour the middle
    is cropped. A picture of the right size is not resized.

    Args:
        path: a PNG, JPEG or WebP file.
        invert: "on" swaps light and dark; "auto" does if the corners of a grey image are light.
        like: the data set that the model was trained on.

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
                upright = _eight_bits(ImageOps.exif_transpose(opened))
                if like.channels == 3:
                    return _in_colour(upright, invert, like.side)
                image, background = _gray(upright)
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
    if image.size != (like.side, like.side):
        changes.append(_resized(image, like.side))
        inner = like.side - 2 * like.margin
        image = _square(image, background).resize((inner, inner), Image.Resampling.BILINEAR)
        image = ImageOps.expand(image, like.margin)
    return torch.from_numpy(np.array(image)), "; ".join(changes)


def _resized(image: Image.Image, side: int) -> str:
    return f"cropped, and resized from {image.width} × {image.height} to {side} × {side}"


def _in_colour(image: Image.Image, invert: Invert, side: int) -> tuple[Tensor, str]:
    """Crop the middle of a photograph, resize it, and put what is transparent on white."""
    rgba = image.convert("RGBA")
    rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    changes = []
    if invert == "on":
        rgb = ImageOps.invert(rgb)
        changes.append("inverted")
    if image.size != (side, side):
        changes.append(_resized(image, side))
        rgb = ImageOps.fit(rgb, (side, side), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1), "; ".join(changes)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16 bits to 8; Pillow would clip them."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))


def _gray(image: Image.Image) -> tuple[Image.Image, int]:
    """Convert to 8-bit grey, and return the level of the background, taken from the corners."""
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
