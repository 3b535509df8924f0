"""What a run has saved, put to use: `python -m train eval RUN` and `predict RUN IMAGE…`."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fdl import checkpointer, data, disable_jit
from fdl.checkpointer import Restored
from fdl.data import LABELS
from fdl.nn import StatefulModel
from train import loop, recipes
from train.config import Eval, Images, Predict
from train.saved import read_run

__all__ = ["evaluate", "predict", "read_image"]

SIDE = 28  # of the images of Fashion-MNIST


def evaluate(config: Eval) -> int:
    """Print the metrics of the newest checkpoint of a run; 0 when done.

    Raises:
        ValueError: no run, or no checkpoint in it yet, or it was trained on no images.
    """
    run = read_run(config.run)
    options = run.config
    if config.data is not None:
        if not isinstance(options, Images):
            raise ValueError(f"--data: {config.run} is a run of {run.recipe}, on drawn data")
        options = dataclasses.replace(options, data=config.data)
    device = recipes.find_device(config.device)
    problem, state, _ = recipes.set_up(options, device)
    state, checkpoint = _newest(config.run, like=state, device=device)
    which, dataset = ("train", problem.train) if problem.test is None else ("test", problem.test)
    programs = loop.Programs(loop.run_chunk(problem), loop.run_evaluation(problem))
    with disable_jit():
        found = loop.evaluate(programs, state, dataset)
    print(f"{run.recipe} after step {checkpoint.step}: {problem.data}; {device}")
    for name, value in found.items():
        print(f"{which} {name} {value:.6g}")
    return 0


def predict(config: Predict) -> int:
    """Print the label of each image, and the probability of every class; 0 when done.

    Raises:
        ValueError: no run on images, no checkpoint in it yet, or a file that is no image.
    """
    run = read_run(config.run)
    if not isinstance(run.config, Images):
        raise ValueError(f"predict needs a run on images, {config.run} is one of {run.recipe}")
    model = recipes.image_model(run.config)
    read = [read_image(path) for path in config.images]
    images = torch.stack([image for image, _ in read])
    state = _newest(config.run, like=None, device="cpu").state
    index = torch.arange(len(images))
    batch = data.gather((images, index), (index, index >= 0))
    if isinstance(model, StatefulModel):
        logits, _ = model.apply(state.params, state.buffers, batch.x)
    else:
        logits = model.apply(state.params, batch.x)
    for path, (_, note), row in zip(config.images, read, logits.float().softmax(1), strict=True):
        print(f"{path}: {LABELS[int(row.argmax())]}{note}")
        for p, name in sorted(zip(row.tolist(), LABELS, strict=True), reverse=True):
            print(f"    {name:12} {p:.4f}")
    return 0


def _newest(folder: Path, *, like: Any, device: torch.device | str) -> Restored:
    path = folder / "checkpoints"
    found = checkpointer.restore(path, like=like, device=device) if path.is_dir() else None
    if found is None:
        raise ValueError(f"{folder} holds no checkpoint yet: there is none in {path}")
    return found


def read_image(path: Path) -> tuple[Tensor, str]:
    """Read a PNG file as uint8 [28, 28], and say what had to be changed for that.

    Raises:
        ValueError: the file is absent, damaged, enormous, or not PNG.

    >>> read_image(Path("absent.png"))
    Traceback (most recent call last):
    ValueError: absent.png: no such file
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG"]) as opened:
                image = _gray(opened)
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not a PNG file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{path} is too large: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:  # how Pillow says it is damaged
        raise ValueError(f"{path} cannot be read: {error}") from error
    width, height = image.size
    note = ""
    if (width, height) != (SIDE, SIDE):
        note = f" (resized from {width} × {height} to {SIDE} × {SIDE})"
        image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)), note


def _gray(image: Image.Image) -> Image.Image:
    """Make 8 bits of grey, on black where it is transparent."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip
        return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return image.convert("L")
