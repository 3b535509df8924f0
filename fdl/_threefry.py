"""Threefry, and the words that it makes of keys: one operation for the compiler.

J. K. Salmon, M. A. Moraes, R. O. Dror and D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3"
(SC11); the layout of keys and counters is JAX's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# torch's unsigned types lack most operations, so a 32-bit word lives in the low half of an int64,
# and a 64-bit word is an int64 read as unsigned.
MASK = 0xFFFFFFFF


def threefry2x32(
    k0: Tensor, k1: Tensor, x0: int | Tensor, x1: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Encrypt the counter (x0, x1) under the key (k0, k1): five times four rounds, then a key."""
    schedule = (k0, k1, k0 ^ k1 ^ 0x1BD11BDA)
    # Sums are masked where they get shifted, and otherwise left to grow: their low half is right.
    a, b = k0 + x0, (k1 + x1) & MASK
    for i in range(5):
        for r in (17, 29, 16, 24) if i % 2 else (13, 15, 26, 6):
            a = a + b
            b = (a ^ (b << r | b >> (32 - r))) & MASK
        a = a + schedule[(i + 1) % 3]
        b = (b + schedule[(i + 2) % 3] + (i + 1)) & MASK
    return a & MASK, b


def encrypted_counters(key: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Encrypt each position's index in row-major order, as a 64-bit counter, with one key or more.

    The results of keys `[..., 2]` are `[..., *shape]`.
    """
    index = torch.arange(math.prod(shape), device=key.device).reshape(shape)
    k0, k1 = (key[(..., i, *(None,) * len(shape))] for i in (0, 1))
    return threefry2x32(k0, k1, index >> 32, index & MASK)


def encrypted_words(key: Tensor, shape: Sequence[int], width: int, shift: int = 0) -> Tensor:
    """Draw words by operations of torch."""
    word = join(*encrypted_counters(key, tuple(shape)), width)
    return (word >> shift).to(torch.int32) if shift else word


def join(high: Tensor, low: Tensor, width: int) -> Tensor:
    """Make words of 64 bits, whose highest bit is the sign, or of 32, of two of 32 bits."""
    return (high << 32) | low if width == 64 else high ^ low


def dtype_of_words(shift: int) -> torch.dtype:
    """Return the dtype of words that moved right by `shift`."""
    return torch.int32 if shift else torch.int64


def _fake_words(key: Tensor, shape: Sequence[int], width: int, shift: int) -> Tensor:
    return key.new_empty(*key.shape[:-1], *shape, dtype=dtype_of_words(shift))


def _words_of_keys(
    info: Any, in_dims: Any, key: Tensor, shape: Sequence[int], width: int, shift: int
) -> tuple[Tensor, int]:
    return torch.ops.fdl.random_words(key.movedim(in_dims[0], 0), shape, width, shift), 0


# One operation for the compiler, which on the CPU has a kernel for it (`_compiler/_draws.py`).
torch.library.define(
    "fdl::random_words", "(Tensor key, int[] shape, int width, int shift) -> Tensor"
)
torch.library.impl("fdl::random_words", "CompositeExplicitAutograd", encrypted_words)
torch.library.register_fake("fdl::random_words", _fake_words)
torch.library.register_vmap("fdl::random_words", _words_of_keys)
