"""The keys of Flax's nnx: the seed's key folded with the number of the draw."""

import jax
import torch
from flax import nnx

from fdl import interop, random

rngs = nnx.Rngs(42)
first, second = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(7))

# Recipe
keys = [random.fold_in(random.key(42), i) for i in range(4)]  # a kernel, its bias, a kernel, …
kernel = random.truncated_normal(keys[2], -2, 2, (8, 3)) * 8**-0.5 / 0.87962566
own = random.fold_in(random.key(7), 0)  # a dropout layer takes one for a sequence of its own
kept = random.bernoulli(random.fold_in(own, 0), 0.5, (5, 6))

# Check
torch.testing.assert_close(kernel, interop.from_jax(second.kernel[...]))
assert torch.equal(2.0 * kept, interop.from_jax(dropout(jax.numpy.ones((5, 6)))))
