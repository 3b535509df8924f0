"""Derive a key for each random call of a module's forward."""

from __future__ import annotations

from torch import Tensor
from torch.overrides import TorchFunctionMode

from fdl import random


class Keys(TorchFunctionMode):
    """Count random calls: the n-th draws from `fold_in(key, n)`.

    Args:
        key: the key; with None random calls raise.
    """

    def __init__(self, key: Tensor | None) -> None:
        super().__init__()
        self.key = key
        self.drawn = 0

    def next(self, name: str) -> Tensor:
        """Return the key of the next draw; `name` is that of the function, used in the error."""
        if self.key is None:
            raise ValueError(
                f"{name} draws random numbers and needs a key: pass key=fdl.random.key(seed) to "
                "apply, or train=False to evaluate if it is a layer such as dropout"
            )
        self.drawn += 1
        return random.fold_in(self.key, self.drawn - 1)
