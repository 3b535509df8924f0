"""Linear regression."""

from __future__ import annotations

from fdl import nn
from fdl.nn import Model

__all__ = ["linreg"]


def linreg(features: int = 2, *, std: float = 0.01) -> Model:
    """ŷ = x wᵀ + b, trained on ½ (ŷ − y)².

    With X `[n, features]` and the residual r = X wᵀ + b − y `[n, 1]`, the gradient of the mean is

        ∂/∂w = rᵀ X / n        ∂/∂b = Σ r / n

    Args:
        features: the length of x.
        std: w is drawn from N(0, std²); b starts at 0.

    Returns:
        A model from `[batch, features]` to `[batch, 1]`, with the parameters `weight`
        `[1, features]` and `bias` `[1]`.

    >>> from fdl import random
    >>> model = linreg(2)
    >>> params = model.init(random.key(0))
    >>> params["weight"].shape, params["bias"]
    (torch.Size([1, 2]), tensor([0.]))
    """
    return nn.linear(features, 1, weight_init=nn.init.normal(std), bias_init=nn.init.zeros)
