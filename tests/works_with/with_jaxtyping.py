"""Shapes that beartype checks while a function is traced: a compiled call pays nothing."""

import torch
from beartype import beartype
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

import fdl


# Recipe
@jaxtyped(typechecker=beartype)
def attend(
    q: Float[Tensor, "n d"], k: Float[Tensor, "m d"], v: Float[Tensor, "m e"]
) -> Float[Tensor, "n e"]:
    return torch.softmax(q @ k.T / q.shape[1] ** 0.5, 1) @ v


attend_all = fdl.jit(torch.vmap(attend))
y = attend_all(torch.ones(2, 3, 4), torch.ones(2, 5, 4), torch.ones(2, 5, 6))

# Check
try:
    attend_all(torch.ones(2, 3, 4), torch.ones(2, 5, 4), torch.ones(2, 4, 6))
    raise AssertionError
except TypeCheckError as error:
    assert "parameter 'v'" in str(error)
