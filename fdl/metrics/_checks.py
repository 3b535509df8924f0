"""Checks of what losses and metrics receive."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fdl._checks import describe
from fdl._numerics import is_visible


def check_real(caller: str, **tensors: Tensor) -> None:
    """Raise unless every argument is a tensor of real numbers.

    >>> check_real("loss", logits=torch.zeros(3, 2))
    """
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or x.is_complex():
            raise TypeError(f"{caller}: {name} must be a tensor of real numbers, got {describe(x)}")


def check_weights(caller: str, values: Tensor, weights: Tensor) -> None:
    """Raise unless `weights` is `[batch]` for values `[batch, ...]`.

    >>> check_weights("loss", torch.zeros(3, 2), torch.ones(3))
    """
    check_real(caller, weights=weights)
    if weights.shape != values.shape[:1]:
        raise ValueError(
            f"{caller}: weights must have the shape {list(values.shape[:1])}, one number per "
            f"example, got {list(weights.shape)}"
        )


def check_labels(caller: str, logits: Tensor, labels: Tensor, name: str = "logits") -> None:
    """Raise unless `labels` is `[batch]` for logits `[batch, classes]`: nothing is broadcast.

    >>> check_labels("accuracy", torch.zeros(3, 2), torch.tensor([0, 1, 1]))
    """
    check_real(caller, **{name: logits, "labels": labels})
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"{caller}: expected {name} [batch, classes] and labels [batch], got "
            f"{list(logits.shape)} and {list(labels.shape)}"
        )


def is_integer(x: Tensor) -> bool:
    """Return whether a tensor holds integers; bool is not an integer dtype.

    >>> is_integer(torch.tensor([0, 1])), is_integer(torch.tensor([True]))
    (True, False)
    """
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def check_integers(caller: str, labels: Tensor) -> None:
    """Raise unless labels are integers.

    >>> check_integers("accuracy", torch.tensor([0, 1], dtype=torch.uint8))
    """
    if not is_integer(labels):
        raise TypeError(f"{caller}: labels must be integers, got {labels.dtype}")


def check_values(
    caller: str, expected: str, target: Tensor, wrong: Callable[[Tensor], Tensor]
) -> None:
    """Raise if a target is wrong, where Python can see its value.

    Do not check targets that have weights: masked rows may hold anything.

    Args:
        caller: first words of the error message.
        expected: what a target must be, used in the error message.
        target: any shape.
        wrong: an elementwise test.

    >>> check_values("loss", "0 or more", torch.tensor([1.0]), lambda t: t < 0)
    """
    if is_visible(target):
        bad = target[wrong(target)]
        if bad.numel():
            raise ValueError(f"{caller}: target must be {expected}, got {bad[0].item()}")


def not_a_class(caller: str, classes: int, error: Exception) -> ValueError:
    """Make the error for a label that is not a class.

    >>> str(not_a_class("loss", 3, IndexError("index 3")))[:58]
    'loss: labels must be from 0 to 2, one of 3 classes; give t'
    """
    return ValueError(
        f"{caller}: labels must be from 0 to {classes - 1}, one of {classes} classes; "
        f"give the rows to leave out weight 0 ({error})"
    )


def pick(caller: str, values: Tensor, labels: Tensor) -> Tensor:
    """Return the value of each row's label, `[batch]`, from values `[batch, classes]`.

    >>> pick("loss", torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, 0]))
    tensor([2., 3.])
    """
    try:
        return values.gather(1, labels[:, None])[:, 0]
    except RuntimeError as error:
        raise not_a_class(caller, values.shape[1], error) from None
