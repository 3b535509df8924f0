"""Did a runner train as the reference did? A runner that did not is wrong, however fast.

The losses alone do not tell: without weight decay those of LeNet change by 1e-4 in 20 steps, less
than a difference in rounding may. How far each parameter moved does: it changes by 0.65.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from train.bench.runner import Trajectory
from train.bench.task import Array

__all__ = ["TOLERANCE", "Check", "Reference", "check"]

TOLERANCE = 1e-3  # relative, of losses and of the distance a parameter moved
SIGMAS = 5  # 16 seeds: by chance the mean loss is farther off once in 5,000 times


class Reference(NamedTuple):
    """The training that every runner is compared with."""

    losses: Array  # float64 [steps]
    start: dict[str, Array]  # the initial weights
    params: dict[str, Array]  # float64
    other_masks: tuple[float, float] | None  # of a model with dropout: see `reference`


class Check(NamedTuple):
    """What a comparison came to."""

    right: bool
    loss: float  # the greatest relative difference; of the mean loss where masks differ
    distance: float | None  # the greatest of `apart` below, None where masks differ
    reason: str  # why it is wrong, or what was compared


def check(reference: Reference, found: Trajectory, own_masks: bool) -> Check:
    """Compare a runner's trajectory with the reference's.

    Args:
        reference: what is right.
        found: the runner's; where it has fewer losses, each is a mean of as many steps.
        own_masks: whether dropout drew other masks than the reference's.
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
    return Check(not faults, loss, apart[worst][0], "; ".join(faults) or f"{worst} the farthest")


def distance(reference: Reference, found: Trajectory, name: str) -> tuple[float, float]:
    """Say how far apart two movements of a parameter ended, relative to their length.

    Float32 rounds a parameter p at each step by up to ½ ε|p|, at random. After n steps that is
    about ε √n ‖p‖, which counts where p moves little: conv.0.weight of LeNet is 2e-4 off after 20
    steps.

    Returns:
        The difference, and what is allowed.
    """
    start, end = reference.start[name].astype(np.float64), reference.params[name]
    moved = float(np.linalg.norm(end - start))
    gap = float(np.linalg.norm(found.params[name].astype(np.float64) - end))
    steps = len(reference.losses)
    rounding = np.finfo(np.float32).eps * steps**0.5 * float(np.linalg.norm(end))
    if moved == 0:
        return (0.0 if gap == 0 else float("inf")), TOLERANCE
    return gap / moved, TOLERANCE + rounding / moved


def check_mean(expected: tuple[float, float], loss: float) -> Check:
    """Compare a mean loss under other masks with its distribution over seeds."""
    mean, deviation = expected
    off = abs(loss - mean)
    said = f"mean loss {off / deviation:.1f} σ off, over seeds of the dropout"
    return Check(off <= SIGMAS * deviation, off / mean, None, said)
