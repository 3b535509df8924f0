"""Usual accuracies of the recipes, to tell a good run from a broken one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from train import recipes
from train.config import ELSEWHERE, RECIPES, Recipe

__all__ = ["USUAL", "compare"]

USUAL: dict[tuple[str, int, int], tuple[float, ...]] = {
    ("softmax", 60_000, 5): (0.824, 0.828, 0.826),
    ("softmax", 60_000, 10): (0.832, 0.826, 0.827),
    ("mlp", 60_000, 5): (0.814, 0.798, 0.856),
    ("mlp", 60_000, 10): (0.860, 0.855, 0.857),
    ("dropout", 60_000, 5): (0.812, 0.790, 0.818),
    ("dropout", 60_000, 10): (0.838, 0.843, 0.840),
    ("lenet", 60_000, 10): (0.833, 0.807, 0.793),
    ("lenet-bn", 60_000, 10): (0.854, 0.811, 0.840),
    ("resnet-small", 60_000, 15): (0.927, 0.9265, 0.928),
    # The sample, ten passes an epoch
    ("softmax", 6_000, 5): (0.835, 0.832, 0.836),
    ("softmax", 6_000, 10): (0.833, 0.840, 0.827),
    ("mlp", 6_000, 5): (0.839, 0.844, 0.844),
    ("mlp", 6_000, 10): (0.854, 0.861, 0.860),
    ("dropout", 6_000, 5): (0.842, 0.815, 0.813),
    ("dropout", 6_000, 10): (0.844, 0.851, 0.842),
    ("lenet", 6_000, 10): (0.834, 0.833, 0.818),
    ("lenet-bn", 6_000, 10): (0.834, 0.843, 0.836),
    ("resnet-small", 6_000, 15): (0.897, 0.909, 0.906),
}
"""Test accuracies of seeds 0, 1 and 2 with default options, by (recipe, images, epochs)."""

# Options that change neither the model nor its training.
FREE = (*ELSEWHERE, "epochs", "seed", "data")


def compare(
    name: str, config: Recipe, problem: recipes.Problem, record: Mapping[str, Any]
) -> str | None:
    """Compare the last test accuracy of a run with the usual one; None if that is not known."""
    default: Recipe = RECIPES[name]()
    free = {option: getattr(default, option) for option in FREE if hasattr(default, option)}
    images = len(problem.train.x)
    known = USUAL.get((name, images, record["epoch"]))
    full_epoch = problem.passes * images == recipes.EXAMPLES  # older runs on the sample: one pass
    if known is None or not full_epoch or dataclasses.replace(config, **free) != default:
        return None
    return (
        f"test accuracy {record['test_accuracy']:.3f}; usual after {record['epoch']} epochs is "
        f"{min(known):.3f} to {max(known):.3f}"
    )
