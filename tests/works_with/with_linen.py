"""The keys of Flax's linen: a key folded with a hash of the module's path and the draw's number."""

import hashlib

import jax
import torch
from flax import linen

from fdl import interop, random

x = jax.numpy.ones((5, 4))
net = linen.Sequential([linen.Dense(8), linen.tanh, linen.Dense(3)])
params = net.init(jax.random.key(42), x)["params"]
dropout = linen.Dropout(0.5, deterministic=False)
dropped = dropout.apply({}, x, rngs={"dropout": jax.random.key(7)})


# Recipe
def linen_key(key, *path, draw=1):
    text = "".join(path).encode() + bytes([draw])
    return random.fold_in(key, int.from_bytes(hashlib.sha1(text).digest()[:4], "big"))


key = linen_key(random.key(42), "layers_2")
kernel = random.truncated_normal(key, -2, 2, (8, 3)) * 8**-0.5 / 0.87962566
kept = random.bernoulli(linen_key(random.key(7)), 0.5, (5, 4))

# Check
torch.testing.assert_close(kernel, interop.from_jax(params["layers_2"]["kernel"]))
assert torch.equal(2.0 * kept, interop.from_jax(dropped))
