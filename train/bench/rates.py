"""Measure products and copies of this machine: `python -m train.bench.rates torch|jax DEVICE`.

The best of several calls counts, because it serves as a bound. Both libraries are measured if both
are installed: on some processors torch's products run at half the rate of JAX's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from train.records import to_json

__all__ = ["main", "measure_jax", "measure_torch"]

SIZES = (512, 1024, 2048)  # of square float32 matrices
COPIED = 256 * 2**20  # bytes, far more than fits in caches
SECONDS = 0.5  # for each measurement


def best(call: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    """Return the least seconds that a call takes."""
    wait(call())
    least, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        wait(call())
        least = min(least, time.perf_counter() - start)
    return least


def measure_torch(device: str) -> dict[str, float]:
    """Measure products (FLOP/s) and copies (bytes read and written per second) with torch."""
    import torch

    def wait(_: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    products = []
    for n in SIZES:
        a, out = torch.rand(n, n, device=device), torch.empty(n, n, device=device)
        products.append(2 * n**3 / best(partial(torch.mm, a, a, out=out), wait))
    source = torch.ones(COPIED // 4, device=device)
    target = torch.ones_like(source)
    return {
        "matrix_flops": max(products),
        "copy_bytes": 2 * COPIED / best(lambda: target.copy_(source), wait),
    }


def measure_jax(device: str) -> dict[str, float]:
    """Measure products (FLOP/s) with JAX."""
    import jax
    import jax.numpy as jnp

    product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    products = []
    for n in SIZES:
        a = jax.random.uniform(jax.random.key(0), (n, n))
        took = best(partial(product, a), jax.block_until_ready)
        products.append(2 * n**3 / took)
    return {"matrix_flops": max(products)}


def main(library: str, device: str) -> None:
    """Print the rates of one library as JSON."""
    measure = {"torch": measure_torch, "jax": measure_jax}[library]
    print(to_json(measure(device)))


if __name__ == "__main__":
    main(*sys.argv[1:])
