#!/usr/bin/env bash
# optax 0.2.8 (jax 0.10.2): schedule_free with bfloat16 parameters stops averaging after 256 steps. Its sum of weights
# has the dtype of the parameters, where 256 + 1 = 256, so c = w / Σw stays 1/256 and x, which should be the mean of
# all z, becomes an exponential mean of the last few hundred. `state_dtype=float32` does not help: it is for z.
# Keep the parameters in float32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat >"$folder/find.py" <<'PYTHON'
import jax
import jax.numpy as jnp
import optax
import optax.contrib

STEPS = 2000


def sums(dtype, **options):
    """The sum of the weights of 2000 steps with a rate of 1, each of which weighs 1."""
    opt = optax.contrib.schedule_free_sgd(1.0, **options)
    w = jnp.zeros(1, dtype=dtype)

    def step(carry, _):
        w, state = carry
        updates, state = opt.update(jnp.full_like(w, 2.0**-8), state, w)
        return (optax.apply_updates(w, updates), state), None

    (_, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=STEPS))((w, opt.init(w)))
    return state.weight_sum


results = {
    "float32": sums(jnp.float32),
    "bfloat16": sums(jnp.bfloat16),
    "bfloat16, state_dtype=float32": sums(jnp.bfloat16, state_dtype=jnp.float32),
}
print("optax", optax.__version__, "jax", jax.__version__)
for name, total in results.items():
    print(f"{name:30} sum of {STEPS} weights of 1: {float(total):.0f} ({total.dtype})")
assert [float(x) for x in results.values()] == [2000.0, 256.0, 256.0], "optax has changed"
PYTHON
"$folder/venv/bin/python" "$folder/find.py"
