"""Function transformations beyond those of torch.func.

Gradients of single examples, products with curvature matrices that are never formed, `checkpoint`,
which trades time for memory, and `sequential_vmap`. Like those of torch.func they take pure
functions of trees and compose with each other, with `grad`, `vmap`, `jvp` and `fdl.jit`.
"""

from __future__ import annotations

from fdl.transforms._autograd import autograd_grad_and_value
from fdl.transforms._checkpoint import checkpoint, stop_gradient
from fdl.transforms._curvature import gnvp, hessian, hutchinson_trace, hvp
from fdl.transforms._per_sample import clipped_grad_sum, per_sample_grads, per_sample_norms
from fdl.transforms._sequential import sequential_vmap

__all__ = [
    "autograd_grad_and_value",
    "checkpoint",
    "clipped_grad_sum",
    "gnvp",
    "hessian",
    "hutchinson_trace",
    "hvp",
    "per_sample_grads",
    "per_sample_norms",
    "sequential_vmap",
    "stop_gradient",
]
