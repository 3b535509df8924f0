"""Compare the training of a runner with the reference; one that differs is wrong, however fast.

The losses alone are not enough: without weight decay the losses of LeNet change by 1e-4 in 20
steps, less than rounding may. The movement of the parameters changes by 0.65.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from train.bench.runner import Trajectory
from train.bench.task import Array

__all__ = ["TOLERANCE", "Check", "Reference", "check"]

TOLERANCE = 1e-3  # relative, of losses and of the movement of a parameter
CANCELLED = 1e-9  # a parameter that moves less than this times the usual has the gradient 0
SIGMAS = 5  # of 16 seeds: a mean loss is farther off by chance once in 5,000 times


class Reference(NamedTuple):
    """Result of the reference training."""

    losses: Array  # float64 [steps]
    start: dict[str, Array]  # the initial weights and running statistics
    params: dict[str, Array]  # the final ones, in float64
    other_masks: tuple[float, float] | None  # of a model with dropout, see `reference.other_masks`


class Check(NamedTuple):
    """Result of a comparison."""

    right: bool
    loss: float  # largest relative difference; of the mean loss if masks differ
    distance: float | None  # largest relative difference of a movement; None if masks differ
    reason: str  # why it is wrong, or what was compared


def check(reference: Reference, found: Trajectory, own_masks: bool) -> Check:
    """Compare a runner's trajectory with the reference's.

    Args:
        reference: the reference.
        found: the trajectory of the runner; if it has fewer losses, each is a mean over steps.
        own_masks: True if dropout drew other masks than in the reference.
    """
    if not np.isfinite(found.losses).all():
        return Check(False, float("inf"), None, "a loss is not finite")
    if own_masks and reference.other_masks is not None:
        return check_mean(reference.other_masks, float(found.losses.mean()))
    losses = reference.losses.reshape(len(found.losses), -1).mean(1)
    loss = float((np.abs(found.losses - losses) / np.abs(losses)).max())
    apart = {name: distance(reference, found, name) for name in reference.params}
    worst = max(apart, key=lambda name: apart[name][0])
    faults = [
        f"{name} moved {gap:.1e} off" for name, (gap, allowed) in apart.items() if not gap < allowed
    ]
    if not loss < TOLERANCE:
        faults.insert(0, f"loss {loss:.1e} off")
    return Check(not faults, loss, apart[worst][0], "; ".join(faults) or f"{worst} differs most")


def distance(reference: Reference, found: Trajectory, name: str) -> tuple[float, float]:
    """Return the relative difference between two movements of a parameter, and its tolerance.

    Float32 rounds a parameter p at each step by up to ½ ε|p|, at random. After n steps this is
    about ε √n ‖p‖, which matters if p moves little: conv.0.weight of LeNet is 2e-4 off after 20
    steps. A bias that a batch norm cancels has the gradient 0: in float64 it moves by 1e-16, in
    float32 by 1e-6. Its difference is divided by the usual movement of a parameter.
    """
    end = reference.params[name]
    moved, usual = movement(reference, name), usual_movement(reference) * end.size**0.5
    if 0 < moved < CANCELLED * usual:
        moved = usual
    gap = float(np.linalg.norm(found.params[name].astype(np.float64) - end))
    steps = len(reference.losses)
    rounding = np.finfo(np.float32).eps * steps**0.5 * float(np.linalg.norm(end))
    if moved == 0:
        return (0.0 if gap == 0 else float("inf")), TOLERANCE
    return gap / moved, TOLERANCE + rounding / moved


def movement(reference: Reference, name: str) -> float:
    """Return the norm of the movement of a parameter."""
    end = reference.params[name]
    return float(np.linalg.norm(end - reference.start[name].astype(np.float64)))


def usual_movement(reference: Reference) -> float:
    """Return the median over parameters of the movement of an element."""
    sizes = {name: end.size for name, end in reference.params.items()}
    return float(np.median([movement(reference, name) / n**0.5 for name, n in sizes.items()]))


def check_mean(expected: tuple[float, float], loss: float) -> Check:
    """Compare a mean loss under other masks with its distribution over seeds."""
    mean, deviation = expected
    off = abs(loss - mean)
    reason = f"mean loss {off / deviation:.1f} σ off, over seeds of the dropout"
    return Check(off <= SIGMAS * deviation, off / mean, None, reason)
