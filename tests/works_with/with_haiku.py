"""The keys of Haiku: every draw splits the key, keeps the first half and uses the second."""

import haiku as hk
import jax
import torch

from fdl import interop, random

net = hk.transform(lambda x: hk.Sequential([hk.Linear(8), jax.nn.tanh, hk.Linear(3)])(x))
theirs = net.init(jax.random.PRNGKey(42), jax.numpy.ones((5, 4)))


# Recipe
def haiku_keys(key):
    while True:
        key, used = random.split(key)
        yield used


keys = haiku_keys(random.key(42))
first = random.truncated_normal(next(keys), -2, 2, (4, 8)) * 4**-0.5
second = random.truncated_normal(next(keys), -2, 2, (8, 3)) * 8**-0.5

# Check
torch.testing.assert_close(first, interop.from_jax(theirs["linear"]["w"]))
torch.testing.assert_close(second, interop.from_jax(theirs["linear_1"]["w"]))
