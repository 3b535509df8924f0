"""Random numbers from explicit keys: every draw is a pure function of a key.

There is no generator to seed and no state to save. A *key* is a tensor of two 32-bit words; the
same key gives the same numbers, today and after a restart, in eager mode and compiled, on every
device. What is used once is then split:

>>> from fdl import random
>>> key = random.key(0)
>>> key, dropout_key, noise_key = random.split(key, 3)  # three independent streams
>>> random.normal(noise_key, (2, 3)).shape
torch.Size([2, 3])

Three habits are all there is to it:

- **Use a key once.** Two draws from one key are the same bits, not two samples.
- **Split to branch**, as above: one key per layer, per worker, per purpose.
- **Fold in to count**: `fold_in(key, step)` is the key of a step. `step` may be a tensor, so a
  compiled training step derives its own key and never recompiles.

One key belongs to one call. A batch of keys goes through `torch.vmap`:

>>> import torch
>>> keys = random.split(random.key(1), 8)
>>> torch.vmap(lambda k: random.uniform(k, (4,)))(keys).shape
torch.Size([8, 4])

The bits come from the counter-based generator Threefry-2x32 with 20 rounds (Salmon, Moraes, Dror
and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; their library is Random123): the
n-th draw encrypts the counter n under the key. Keys and draws agree with `jax.random` (threefry,
partitionable, its default): bit by bit for `key`, `split`, `fold_in`, `bits`, `uniform`
on [0, 1), `bernoulli`, `randint` and `permutation`, to a few units in the last place for
`normal` and its kin.

Draws compile like any other code, fastest through `fdl.jit`, which sets Inductor to compile
Threefry ten times faster than plain `torch.compile` does.

Every function checks its arguments before it draws: TypeError for a thing of the wrong kind (a seed
where a key belongs, an unknown dtype), ValueError for a wrong value or shape (a batch of keys, a
negative size, a parameter that does not broadcast). The message says what to do instead.
"""

from __future__ import annotations

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

__all__ = [
    "Key",
    "Shape",
    "bernoulli",
    "bits",
    "categorical",
    "fold_in",
    "key",
    "normal",
    "permutation",
    "randint",
    "split",
    "truncated_normal",
    "uniform",
]
