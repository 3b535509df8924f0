"""Patterns and layers of einops in pure, compiled functions."""

import torch
from einops import einsum, rearrange
from einops.layers.torch import EinMix

import fdl
from fdl import interop, random

x = random.normal(random.key(0), (2, 5, 6, 4))

# Recipe
mix, params, _ = interop.from_module(EinMix("b t c -> b t d", weight_shape="c d", c=4, d=3))


@fdl.jit
@torch.vmap
def mixed(x):
    return rearrange(mix.apply(params, x), "b t d -> (b t) d")


# Check
expected = einsum(x, params["weight"], "n b t c, c d -> n b t d").flatten(1, 2)
torch.testing.assert_close(mixed(x), expected)
