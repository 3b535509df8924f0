#!/usr/bin/env bash
# equinox 0.13.8, jax 0.10.2: BatchNorm(mode="batch") evaluates with a variance that is far too large after
# few steps. Both running statistics are divided by 1 - momentum^t, which corrects an average that starts
# at 0, but that of the variance starts at 1: it is the average plus momentum^t / (1 - momentum^t), 99 after
# one step, 1 after 69. Outputs for the batches of training shrink by √(1 + 99) after the first. The
# documentation says that the variance is unbiased; it is also divided by n, not by n - 1. Train for some 70 steps
# before you evaluate, or use mode="ema".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet equinox==0.13.8 jax==0.10.2
cat >"$folder/find.py" <<'PYTHON'
import equinox as eqx
import jax

layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(1, "batch", mode="batch")
axes = {"axis_name": "batch", "in_axes": (0, None), "out_axes": (0, None)}
train = jax.jit(lambda x, state: jax.vmap(layer, **axes)(x, state))
evaluate = jax.jit(lambda x, state: jax.vmap(eqx.nn.inference_mode(layer), **axes)(x, state)[0])

print("step  deviation of outputs in training, in evaluation, by the average plus the start")
for t in range(1, 101):
    x = jax.random.normal(jax.random.key(t), (4096, 1))
    y, state = train(x, state)
    if t in (1, 10, 69, 100):
        expected = (1 + 0.99**t / (1 - 0.99**t)) ** -0.5
        seen = float(evaluate(x, state).std())
        print(f"{t:4d}  {float(y.std()):.3f}  {seen:.3f}  {expected:.3f}")
        assert abs(float(y.std()) - 1) < 0.01
        assert abs(seen - expected) < 0.05 * expected, "equinox has changed"
PYTHON
"$folder/venv/bin/python" "$folder/find.py"
