"""Look at the mistakes of a run: `python -m train look RUN` draws them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fdl import data, metrics
from fdl.data import Dataset
from train import evaluate, loop, plots
from train.config import Images, Look
from train.image_sets import IMAGE_SETS

__all__ = ["confusions", "logits_of", "look"]

WORST = 30  # images to draw


def look(config: Look) -> int:
    """Draw the confusion matrix of a run, and the images with the largest loss; return 0.

    Raises:
        ValueError: the run is not on images, or has no checkpoint.
        OSError: the picture cannot be written.
    """
    saved = evaluate.load(config)
    if not isinstance(saved.run.config, Images):
        raise ValueError(
            f"look needs a run on images, got {saved.folder}, a run of {saved.run.recipe}"
        )
    labels = IMAGE_SETS[saved.run.config.data_set].labels
    part, dataset = loop.held_out(saved.problem)[-1]  # the test set
    logits = logits_of(saved, dataset.x)
    losses = F.cross_entropy(logits, dataset.y, reduction="none")
    matrix = metrics.confusion_matrix(logits, dataset.y).value
    accuracy = matrix.trace() / len(losses)
    title = f"{saved.run.recipe} after step {saved.step}, {len(losses):,} {part} images"
    print(f"{title}: loss {losses.mean():.6g}, accuracy {accuracy:.6g}")
    print("most often taken for another:", *confusions(matrix, labels), sep="\n")
    worst = losses.argsort(descending=True)[:WORST]
    out = config.out or saved.folder / "look.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    plots.draw_mistakes(
        out,
        f"{title}: accuracy {accuracy:.4f}",
        matrix.cpu(),
        Dataset(dataset.x[worst].cpu(), dataset.y[worst].cpu()),
        logits[worst].argmax(1).cpu(),
        labels,
    )
    print(f"picture: {out}")
    return 0


def logits_of(saved: evaluate.Loaded, x: Tensor) -> Tensor:
    """Apply the model of a run to images, in batches; return float32 `[images, classes]`."""
    state = saved.state
    parts = (data.to_float(part) for part in x.split(loop.EVAL_BATCH))
    return torch.cat([evaluate.apply(saved.problem.model, state, part).float() for part in parts])


def confusions(matrix: Tensor, labels: tuple[str, ...], count: int = 3) -> list[str]:
    """List what is most often taken for something else, in lines.

    >>> confusions(torch.tensor([[8, 2], [0, 9]]), ("shirt", "coat"))
    ['    shirt for coat, 2 of 10']
    """
    wrong = matrix.clone().fill_diagonal_(0).flatten()
    order = wrong.argsort(descending=True, stable=True)[:count]
    pairs = [divmod(int(i), len(labels)) for i in order if wrong[i] > 0]
    return [
        f"    {labels[true]} for {labels[other]}, "
        f"{int(matrix[true, other]):,} of {int(matrix[true].sum()):,}"
        for true, other in pairs
    ]
