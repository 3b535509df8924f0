"""Losses as pure functions of predictions and targets.

Each loss but `squared_loss` and `l2_penalty` averages over a batch and takes `weights` `[batch]`
last, a bool mask or numbers: the mean is Σ wᵢ lossᵢ / Σ wᵢ, or 0 if all weights are 0. A row of
weight 0 may hold anything, even NaN: it affects neither the loss nor a gradient. Losses of 16-bit
numbers are computed and summed in at least float32, and rounded once, at the end.
"""

from __future__ import annotations

from fdl.losses._classification import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    kl_div,
    nll,
)
from fdl.losses._embedding import cosine_embedding, triplet_margin
from fdl.losses._regression import huber, l1, l2_penalty, mse, smooth_l1, squared_loss

__all__ = [
    "binary_cross_entropy_with_logits",
    "cosine_embedding",
    "cross_entropy",
    "huber",
    "kl_div",
    "l1",
    "l2_penalty",
    "mse",
    "nll",
    "smooth_l1",
    "squared_loss",
    "triplet_margin",
]
