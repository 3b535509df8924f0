"""Any `nn.Module` in, any `nn.Module` out; trees to and from NumPy, JAX, Flax and Keras.

>>> import torch
>>> model, params, _ = from_module(torch.nn.Linear(3, 2))
>>> grads = torch.func.grad(lambda params: model.apply(params, torch.ones(4, 3)).sum())(params)
>>> module = to_module(params, torch.nn.Linear(3, 2))
"""

from __future__ import annotations

from fdl.interop._arrays import from_jax, from_numpy, to_jax, to_numpy
from fdl.interop._as_module import as_module
from fdl.interop._flax import from_flax, to_flax
from fdl.interop._keras import from_keras
from fdl.interop._module import from_module, to_module
from fdl.interop._orbax import from_orbax
from fdl.interop._to_sequential import to_sequential

__all__ = [
    "as_module",
    "from_flax",
    "from_jax",
    "from_keras",
    "from_module",
    "from_numpy",
    "from_orbax",
    "to_flax",
    "to_jax",
    "to_module",
    "to_numpy",
    "to_sequential",
]
