#!/usr/bin/env bash
# torch 2.11.0 and 2.15.0, CPU: erf and atanh in a program of torch.compile are other functions than eagerly. In float32
# they have an absolute error of 1e-7, which near 0 is everything: erf(1e-8) and atanh(1e-8) are 0, erf(1e-6) is 6 %
# off. Eager torch is right to the last digits. A normalising flow that inverts tanh, or a step that divides by a small
# erf, computes them in float64, or as log1p(2 * x / (1 - x)) / 2. GELU adds 1 to erf and is not concerned.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
cat >"$folder/find.py" <<'PYTHON'
import math

import torch

print("torch", torch.__version__)
x = torch.tensor([1e-8, 1e-7, 1e-6, 1e-4]).repeat_interleave(16)  # whole vectors
for f, exact in ((torch.erf, math.erf), (torch.atanh, math.atanh)):
    eager, compiled, wide = f(x), torch.compile(f)(x), torch.compile(f)(x.double())
    for i in range(0, len(x), 16):
        right = exact(x[i].item())
        off = [abs(y[i].item() / right - 1) for y in (eager, compiled)]
        in_float64 = abs(wide[i].item() / exact(x.double()[i].item()) - 1)
        print(f"{exact.__name__}({x[i].item():.0e}): off by {off[0]:.0e} eagerly, {off[1]:.0e} compiled")
        assert off[0] < 1e-6, "eager torch has changed"
        assert off[1] > 1e-5, "torch.compile has changed"
    assert compiled[0] == 0
    print(f"{exact.__name__}(1e-4) in float64, compiled: off by {in_float64:.0e}")
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/find.py"
