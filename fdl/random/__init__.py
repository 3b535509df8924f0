"""Random numbers from explicit keys: every draw is a pure function of a key.

There is no generator to seed and no state to save. A *key* is a tensor of two 32-bit words. The
same key gives the same numbers today and after a restart, eager and compiled, on every device.
Split a key before you draw more than once:

>>> from fdl import random
>>> key = random.key(0)
>>> key, dropout_key, noise_key = random.split(key, 3)  # three independent streams
>>> random.normal(noise_key, (2, 3)).shape
torch.Size([2, 3])

Three rules:

- **Use a key once.** Two draws from one key are the same bits, not two samples.
- **Split to branch**, as above: one key per layer, per worker, per purpose.
- **Fold in to count**: `fold_in(key, step)` is the key of a step. `step` may be a tensor, so a
  compiled training step derives its own key and never recompiles.

Each function takes a single key. To draw with many keys, use `torch.vmap`:

>>> import torch
>>> keys = random.split(random.key(1), 8)
>>> torch.vmap(lambda k: random.uniform(k, (4,)))(keys).shape
torch.Size([8, 4])

Functions have the names, parameters and defaults of `jax.random`, and return the same numbers,
those of JAX 0.5.0 and later unless a docstring names another release:

- bit by bit, for the same dtype: `key`, `split`, `fold_in`, `bits`, `uniform` on [0, 1),
  `bernoulli`, `randint` (in 8 and 16 bits those of JAX 0.7 and later), `permutation`,
  `rademacher` (those without x64), and `choice` without `p`. JAX's default integers are int32, and
  of `randint` and `choice` other draws, unless its x64 is on; those here are int64;
- to a few units in the last place of the largest step of their formula: `normal`,
  `truncated_normal`, `exponential`, `gumbel`, `laplace`, `logistic`, `cauchy`, `orthogonal`,
  `multivariate_normal`. Of a draw near 0, or in the tail of a truncated normal, these can be
  hundreds of its own;
- the same, where rounding does not decide otherwise, one draw in many thousands: `categorical` (of
  logits in 32 and 64 bits), `choice` with `p`, `gamma`, `beta`, `dirichlet`, `t`, `ball`,
  `poisson`, `binomial`.

The bits come from the counter-based generator Threefry-2x32 with 20 rounds (Salmon, Moraes, Dror
and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, their library Random123), which is
JAX's default (threefry, partitionable since 0.5.0): the n-th draw is the counter n, encrypted with
the key.

Draws compile like any other code. `fdl.jit` compiles them fastest, since it configures Inductor to
compile Threefry ten times faster than plain `torch.compile` does. Draws of the last group but for
`categorical` and `choice` are loops, which `torch.compile` takes only outside of `vmap` and other
functions of `torch.func`; `fdl.jit` takes them everywhere.

Every function checks its arguments before it draws. It raises TypeError for an argument of the
wrong kind (a seed in place of a key, an unknown dtype), and ValueError for a wrong value or shape
(a batch of keys, a negative size, a parameter that does not broadcast). The message says what to do
instead.
"""

from __future__ import annotations

from fdl.random._continuous import cauchy, exponential, gumbel, laplace, logistic
from fdl.random._discrete import binomial, choice, poisson, rademacher
from fdl.random._gamma import beta, dirichlet, gamma, t
from fdl.random._samplers import (
    Key,
    Shape,
    bernoulli,
    bits,
    categorical,
    fold_in,
    key,
    normal,
    permutation,
    randint,
    split,
    truncated_normal,
    uniform,
)
from fdl.random._vectors import ball, multivariate_normal, orthogonal

__all__ = [
    "Key",
    "Shape",
    "ball",
    "bernoulli",
    "beta",
    "binomial",
    "bits",
    "categorical",
    "cauchy",
    "choice",
    "dirichlet",
    "exponential",
    "fold_in",
    "gamma",
    "gumbel",
    "key",
    "laplace",
    "logistic",
    "multivariate_normal",
    "normal",
    "orthogonal",
    "permutation",
    "poisson",
    "rademacher",
    "randint",
    "split",
    "t",
    "truncated_normal",
    "uniform",
]
