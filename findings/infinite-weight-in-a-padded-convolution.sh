#!/usr/bin/env bash
# torch 2.15.0 on a CPU: whether the zeros of padding count as numbers depends on which library convolves. With one
# infinite weight and images of ones, pixels whose window reaches into the padding with it are NaN (0 · inf) in
# float64, as if the zeros were written out, and in jax.lax; in float32, by oneDNN, which skips the zeros, they are
# finite (in bfloat16 it depends on the processor); and in float32 without oneDNN every pixel of the channel is NaN,
# also in the middle of the image, where no zero takes part. So a test that compares which values are NaN in float32
# with those in float64 fails although nobody made a mistake. After F.pad, a convolution without padding by oneDNN
# gives what float64 gives.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6 jax==0.10.2
cat >"$folder/find.py" <<'PYTHON'
import jax
import numpy as np
import torch
import torch.nn.functional as F

images = torch.ones(20, 3, 7, 7, dtype=torch.float64)
weight = torch.ones(4, 3, 3, 3, dtype=torch.float64)
weight[1, 0, 0, 0] = torch.inf


def count(y):
    return {"NaN": int(np.isnan(y).sum()), "inf": int(np.isinf(y).sum())}


def convolve(dtype, padding=1, images=images):
    return F.conv2d(images.to(dtype), weight.to(dtype), padding=padding).double().numpy()


results = {
    "float64": count(convolve(torch.float64)),
    "float64, zeros written out": count(convolve(torch.float64, 0, F.pad(images, (1, 1, 1, 1)))),
    "float32, by oneDNN": count(convolve(torch.float32)),
    "bfloat16, by oneDNN": count(convolve(torch.bfloat16)),
}
with torch.backends.mkldnn.flags(enabled=False):
    results["float32, without oneDNN"] = count(convolve(torch.float32))
in_jax = jax.lax.conv(*(jax.numpy.float32(z.numpy()) for z in (images, weight)), (1, 1), "SAME")
results["float32, jax.lax.conv"] = count(np.asarray(in_jax))
print("torch", torch.__version__, "jax", jax.__version__)
for name, value in results.items():
    print(f"{name}: {value}")
border = {"NaN": 260, "inf": 720}
assert results["float64"] == results["float64, zeros written out"] == border
assert results["float32, jax.lax.conv"] == border
assert results["float32, by oneDNN"] == {"NaN": 0, "inf": 720}
assert results["float32, without oneDNN"] == {"NaN": 980, "inf": 0}
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/find.py"
