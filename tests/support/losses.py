"""Comparison of a loss with torch's, without weights and with."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.support.asserts import close, unchanged

SHAPES = st.tuples(st.integers(1, 5)) | st.tuples(*[st.integers(1, 4)] * 2)
SHAPES = SHAPES | st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 2))
WEIGHTS = st.sampled_from([None, "mask", "numbers", "integers"])


def weights_of(kind: str | None, n: int) -> Tensor | None:
    """Weights of n rows, of which those at places 1, 4, … are 0."""
    if kind is None:
        return None
    numbers = torch.tensor([0.5, 0.0, 2.0, 1.25, 0.0, 3.0, 0.25], dtype=torch.float64)[:n]
    if n == 1:
        numbers = numbers + 1
    return {"mask": numbers != 0, "numbers": numbers, "integers": numbers.ceil().long()}[kind]


def compare(ours: Any, theirs: Any, inputs: tuple[Tensor, ...], weights: str | None) -> None:
    """Compare value and gradients by all floating inputs.

    Args:
        ours: (*inputs, weights) -> the mean.
        theirs: (*inputs, reduction=) -> the mean or the loss of each row, as torch's functions.
        inputs: float64, or integers, which have no gradient.
        weights: a kind of weights.
    """
    places = tuple(i for i, x in enumerate(inputs) if x.is_floating_point())
    w = weights_of(weights, len(inputs[0]))
    copies = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    if w is None:
        expected = theirs(*copies, reduction="mean")
    else:
        each = theirs(*copies, reduction="none").reshape(len(w), -1).mean(1)
        expected = (w.double() * each).sum() / w.double().sum()
    expected.backward()
    with unchanged(inputs, w):
        grads, value = torch.func.grad_and_value(ours, places)(*inputs, w)
    close(value, expected.detach())
    for i, found in zip(places, grads, strict=True):
        copy = copies[i]
        close(found, torch.zeros_like(copy) if copy.grad is None else copy.grad)
