#!/usr/bin/env bash
# keras 3.15.1, h5py 3.16.0, backend JAX 0.10.2 (and torch, with another error): a model with a bfloat16 layer is
# saved to .h5 without a warning about it, and that file cannot be loaded again. The weights are written as two
# opaque bytes each, and unlike in .keras files nothing beside them says that they are bfloat16. Expected: an error
# when it is saved. Save .keras files.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras==3.15.1 h5py==3.16.0 jax==0.10.2
cat >"$folder/find.py" <<'PYTHON'
import sys

import h5py
import keras

net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, dtype="bfloat16", name="dense")])
for name in ("net.keras", "net.h5"):
    net.save(f"{sys.argv[1]}/{name}")
keras.models.load_model(f"{sys.argv[1]}/net.keras")
print("net.keras: loaded")
with h5py.File(f"{sys.argv[1]}/net.h5") as file:
    kernel = file["model_weights/dense/sequential/dense/kernel"]
    print("net.h5: dtype of the kernel", kernel.dtype, "attributes", dict(kernel.attrs))
    assert kernel.dtype.str == "|V2"
try:
    keras.models.load_model(f"{sys.argv[1]}/net.h5")
except (TypeError, ValueError) as error:
    print(f"net.h5: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
else:
    sys.exit("keras has changed: the file was loaded")
PYTHON
KERAS_BACKEND=jax "$folder/venv/bin/python" "$folder/find.py" "$folder" 2>&1 | grep -v WARNING
