"""The parts that the recipes of optimizers share: sign, weight decay, and a step of −lr."""

from __future__ import annotations

from fdl.optim._base import Optimizer
from fdl.optim._basic import add_decayed_weights, scale, scale_by_learning_rate
from fdl.optim._hyperparams import ScalarOrSchedule, check_rate, is_zero
from fdl.optim._leafwise import chain
from fdl.optim._masking import Mask, masked_for


def negated(maximize: bool) -> list[Optimizer]:
    """Return the first links of a chain: g ← −g to maximize, none to minimize.

    >>> len(negated(True)), len(negated(False))
    (1, 0)
    """
    return [scale(-1.0)] if maximize else []


def decayed(
    caller: str, weight_decay: ScalarOrSchedule, mask: Mask | None = None
) -> list[Optimizer]:
    """Return the links of a chain that add λw, none for the number 0.

    >>> len(decayed("sgd", 0.1)), len(decayed("sgd", 0.0))
    (1, 0)
    """
    check_rate(caller, "weight_decay", weight_decay)
    if is_zero(weight_decay):
        return []
    return [masked_for(caller, add_decayed_weights(weight_decay), mask)]


def descend(
    caller: str,
    direction: list[Optimizer],
    lr: ScalarOrSchedule,
    weight_decay: ScalarOrSchedule,
    maximize: bool = False,
    decoupled: bool = False,
    mask: Mask | None = None,
) -> Optimizer:
    """Chain w ← w − lr · direction(±g + λw), or decoupled w ← w − lr · (direction(±g) + λw).

    >>> len(descend("sgd", [], 0.1, 0.0).init({}))
    1
    """
    check_rate(caller, "lr", lr)
    decay = decayed(caller, weight_decay, mask)
    steps = [*direction, *decay] if decoupled else [*decay, *direction]
    return chain(*negated(maximize), *steps, scale_by_learning_rate(lr))
