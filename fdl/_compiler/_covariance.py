"""Covariances and correlations in a traced function, where torch asks for their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def cov(
    input: Tensor,
    *,
    correction: int = 1,
    fweights: Tensor | None = None,
    aweights: Tensor | None = None,
) -> Tensor:
    """Equal `torch.cov` of variables [variables, observations], or of one [observations].

    Raises:
        RuntimeError: as in torch; for weights that are negative, or sum to zero, when the program
            runs.
    """
    if input.ndim > 2 or input.dtype == torch.bool:
        return torch.cov(input, correction=correction, fweights=fweights, aweights=aweights)
    x = input if input.ndim == 2 else input.reshape(1, -1)
    count = x.shape[1]
    weights: Tensor | None = None
    for name, own in (("fweights", fweights), ("aweights", aweights)):
        if own is None:
            continue
        if own.ndim > 1 or own.numel() != count or own.is_floating_point() == (name == "fweights"):
            return torch.cov(input, correction=correction, fweights=fweights, aweights=aweights)
        torch._assert_async((own >= 0).all(), f"cov: {name} has negative numbers")
        weights = own if weights is None else weights * own
    total = count if weights is None else weights.sum()
    if isinstance(total, Tensor):
        torch._assert_async(total != 0, "cov: the weights sum to zero")
    mean = (x if weights is None else x * weights).sum(1, keepdim=True) / total
    degrees: Any = total - correction
    if aweights is not None and weights is not None and correction:
        degrees = total - correction * (weights * aweights).sum() / total
    x = x - mean
    products = x @ (x if weights is None else x * weights).mT.conj()
    degrees = degrees.clamp(min=0) if isinstance(degrees, Tensor) else max(degrees, 0)
    return (products / degrees).squeeze()


def corrcoef(input: Tensor) -> Tensor:
    """Equal `torch.corrcoef` of variables [variables, observations], or of one [observations]."""
    if input.ndim > 2 or input.dtype == torch.bool:
        return torch.corrcoef(input)
    products = cov(input)
    if products.ndim == 0:
        return products / products
    variances = products.diagonal()
    deviations = (variances.real if products.is_complex() else variances).sqrt()
    scaled = products / deviations.unsqueeze(-1) / deviations
    if scaled.is_complex():
        return torch.complex(scaled.real.clamp(-1, 1), scaled.imag.clamp(-1, 1))
    return scaled.clamp(-1, 1)


COVARIANCES: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys((torch.cov, Tensor.cov), cov),
    **dict.fromkeys((torch.corrcoef, Tensor.corrcoef), corrcoef),
}
