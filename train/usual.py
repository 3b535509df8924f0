"""What recipes usually come to, so that a good run can be told from a broken one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from train import recipes
from train.config import RECIPES, Recipe

__all__ = ["USUAL", "compare"]

USUAL: dict[tuple[str, int, int], tuple[float, ...]] = {}
"""(recipe, training images, epochs): test accuracies of seeds 0, 1 and 2 with default options."""

# Options that do not make it another model or another way to train.
FREE = ("epochs", "seed", "device", "compile", "out", "resume", "save_every", "data")


def compare(
    name: str, config: Recipe, problem: recipes.Problem, record: Mapping[str, Any]
) -> str | None:
    """Say what is usual where the last epoch of a run ends; None where that is not known."""
    default: Recipe = RECIPES[name]()
    free = {option: getattr(default, option) for option in FREE if hasattr(default, option)}
    images = len(problem.train.x)
    known = USUAL.get((name, images, record["epoch"]))
    whole = problem.passes * images == recipes.EXAMPLES  # older runs on the sample had one pass
    if known is None or not whole or dataclasses.replace(config, **free) != default:
        return None
    return (
        f"test accuracy {record['test_accuracy']:.3f}; usual after {record['epoch']} epochs is "
        f"{min(known):.3f} to {max(known):.3f}"
    )
