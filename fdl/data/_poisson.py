"""Batches of random sizes, as the theory of DP-SGD assumes them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fdl import random
from fdl._checks import check_number, check_positive
from fdl._modes import is_eager
from fdl.data._types import Indices

OVERFLOW = 1e-12  # how likely a batch exceeds the default capacity, at most


def poisson_indices(
    key: random.Key, n: int, rate: float, steps: int, capacity: int | None = None
) -> Indices:
    """Draw batches by Poisson sampling: each holds each example independently, with `rate`.

    A batch has n · rate examples on average, and as many rows as `capacity`: the examples in
    ascending order, then padding of index 0 and mask False. Divide sums of gradients by n · rate,
    not by the number of examples. Distances between the examples of a batch are drawn, which are
    geometric, so that the cost does not depend on n.

    A batch with more examples than `capacity` is an error. In a compiled program and under `vmap`,
    where Python cannot see it, the last of its examples are left out instead: add the probability
    of that, times `steps`, to the δ of (ε, δ)-privacy. It is below 10⁻¹² a batch for the default.

    Args:
        key: a key; the result is on its device.
        n: number of examples, at least 1.
        rate: probability of each example in each batch, above 0 and at most 1.
        steps: number of batches, at least 1.
        capacity: rows of a batch, at least 1. If None, so many that a batch has more examples with
            a probability below 10⁻¹², by Bernstein's inequality.

    Returns:
        `index` int64 and `mask` bool [steps, capacity].

    Raises:
        TypeError: `n`, `steps` or `capacity` is not an int, or `rate` not a number.
        ValueError: a number is out of its range, or a batch has more examples than `capacity`.

    Source: Abadi et al., Deep Learning with Differential Privacy, 2016,
    https://arxiv.org/abs/1607.00133

    >>> index, mask = poisson_indices(random.key(0), n=1000, rate=0.004, steps=5, capacity=20)
    >>> index.shape, mask.sum(1)
    (torch.Size([5, 20]), tensor([2, 5, 6, 3, 2]))
    """
    check_positive("poisson_indices", "n", n)
    check_positive("poisson_indices", "steps", steps)
    words = "above 0 and at most 1"
    check_number("poisson_indices", "rate", rate, words, lambda rate: 0 < rate <= 1)
    if capacity is None:
        capacity = _enough(n, rate)
    check_positive("poisson_indices", "capacity", capacity)
    u = 1 - random.uniform(key, (steps, capacity + 1), torch.float64)  # in (0, 1]
    # The distance to the next example is above k if k examples in a row are left out.
    beyond = torch.log(u) / math.log1p(-rate) if rate < 1 else torch.zeros_like(u)
    distance = beyond.clamp(max=n).long() + 1
    index = distance.cumsum(1) - 1
    counts = index < n
    _check_capacity(counts, n, rate, capacity)
    counts = counts[:, :capacity]
    return Indices(torch.where(counts, index[:, :capacity], 0), counts.contiguous())


def _check_capacity(counts: Tensor, n: int, rate: float, capacity: int) -> None:
    """Raise if a batch has one example more than there are rows, where Python can see it."""
    if is_eager() and type(counts) is Tensor and counts[:, capacity].any():
        step = counts[:, capacity].to(torch.uint8).argmax().item()
        raise ValueError(
            f"poisson_indices: batch {step} has more than capacity={capacity} of the n={n} "
            f"examples, at a rate of {rate}; a capacity of {_enough(n, rate)}, the default, is "
            f"exceeded with a probability below {OVERFLOW:g}"
        )


def _enough(n: int, rate: float) -> int:
    """Return a number that a binomial one exceeds with a probability below `OVERFLOW`.

    By Bernstein's inequality, P(X ≥ m + t) ≤ exp(−t² / (2 (v + t/3))) for a mean m and variance v.

    >>> _enough(60_000, 0.004), _enough(10, 0.5)
    (365, 10)
    """
    mean, variance, logarithm = n * rate, n * rate * (1 - rate), -math.log(OVERFLOW)
    most = logarithm / 3 + math.sqrt(logarithm**2 / 9 + 2 * variance * logarithm)
    return min(n, math.ceil(mean + most))
