#!/usr/bin/env bash
# keras 3.15.1 (backend torch 2.15.0): Adam with its default rates never moves a bfloat16 weight, without a word.
# β₂ = 0.999 is cast to the dtype of the weight, where it is 1, so the correction √(1 − β₂ᵗ) is 0, and with it every
# step. A model under the dtype policy "bfloat16" stays as it was for the whole of `fit`; "mixed_bfloat16", whose
# weights are float32, trains, and so do SGD and Adam with β₂ = 0.99.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras==3.15.1 torch==2.15.0 numpy==2.4.6
cat >"$folder/find.py" <<'PYTHON'
import os

os.environ["KERAS_BACKEND"] = "torch"
import keras
import numpy as np

x = np.random.default_rng(0).normal(size=(64, 2)).astype("float32")
y = x @ np.array([[2.0], [-3.0]], dtype="float32")


def moved(policy, optimizer):
    """How far the weights of a linear model are from the start after 20 epochs."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Dense(1, use_bias=False, dtype=policy)])
    model.build((None, 2))
    start = np.array(model.get_weights()[0], dtype="float32")
    model.compile(optimizer=optimizer, loss="mse")
    model.fit(x, y, epochs=20, batch_size=16, verbose=0)
    return float(np.abs(np.array(model.get_weights()[0], dtype="float32") - start).max())


adam = keras.optimizers.Adam
results = {
    "bfloat16, Adam": moved("bfloat16", adam(0.1)),
    "bfloat16, Adam with beta_2=0.99": moved("bfloat16", adam(0.1, beta_2=0.99)),
    "bfloat16, SGD": moved("bfloat16", keras.optimizers.SGD(0.1)),
    "mixed_bfloat16, Adam": moved("mixed_bfloat16", adam(0.1)),
}
print("keras", keras.__version__)
for name, way in results.items():
    print(f"{name:32} moved by {way:.3f}")
assert results.pop("bfloat16, Adam") == 0.0, "keras has changed"
assert all(way > 0.5 for way in results.values())
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/find.py"
