"""The keys of Keras on JAX: two words, the seed and the number of calls before."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import keras
import torch

from fdl import interop, random

seeds = keras.random.SeedGenerator(7)
theirs = [keras.random.normal((3,), seed=seeds) for _ in range(2)]
layer = keras.layers.Dense(3, kernel_initializer=keras.initializers.GlorotUniform(seed=11))
layer.build((None, 4))
dropped = keras.layers.Dropout(0.5, seed=9)(keras.ops.ones((2, 6)), training=True)

# Recipe
ours = [random.normal(torch.tensor([7, calls]), (3,)) for calls in range(2)]
bound = (6 / (4 + 3)) ** 0.5
kernel = random.uniform(torch.tensor([11, 0]), (4, 3), minval=-bound, maxval=bound)
kept = random.bernoulli(torch.tensor([9, 0]), 0.5, (2, 6))

# Check
torch.testing.assert_close(ours, interop.from_jax(theirs))
torch.testing.assert_close(kernel, interop.from_jax(layer.kernel.value))
assert torch.equal(2.0 * kept, interop.from_jax(dropped))
