#!/usr/bin/env bash
# jax 0.10.2: `truncated_normal` in float32 has no tail. Between 5 and 6 there are ten different numbers, between 9
# and 10 only one, and from 6 to infinity every draw is the largest float, 3.4e38: erf of the bounds rounds to 1,
# and what the inverse makes of it is clipped to the bounds. Nothing is NaN, so nothing tells. Draw low + d by
# rejection, with d exponential, or invert the logarithm of the tail (`log_ndtr`).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat >"$folder/find.py" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np


def values(low, high):
    """The smallest and the largest of 10,000 draws, and how many there are."""
    x = np.asarray(jax.random.truncated_normal(jax.random.key(0), low, high, (10_000,), "float32"))
    print(f"[{low}, {high}]: {x.min():.4g} to {x.max():.4g}, {len(np.unique(x))} different")
    return x


print("jax", jax.__version__)
assert len(np.unique(values(3.0, 4.0))) > 8000
assert len(np.unique(values(5.0, 6.0))) < 20, "jax has changed"
assert len(np.unique(values(9.0, 10.0))) == 1, "jax has changed"
assert (values(6.0, jnp.inf) > 1e38).all(), "jax has changed"
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/find.py"
