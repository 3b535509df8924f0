#!/usr/bin/env bash
# torch 2.15.0, torch.compile on a CPU: a constant of bfloat16 is none. torch.full_like(x, 0.7) of a bfloat16 x holds
# 0.69921875 eagerly, and 0.7 in a compiled program, where kernels compute in float32 and only results are rounded: it
# differs from 0.7 rounded to bfloat16, and fmod(x, 0.7) of its multiples gives 0.695 in place of 0. A tensor that is
# passed in is right. Pass such constants as tensors.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
cat >"$folder/find.py" <<'PYTHON'
import torch

print("torch", torch.__version__)
x = torch.tensor([0.7, 1.4, 2.8, 7.0]).bfloat16()
functions = {
    "x == full_like(x, 0.7)": lambda x: x == torch.full_like(x, 0.7),
    "fmod(x, 0.7)": lambda x: torch.fmod(x, 0.7),
    "fmod(x, full_like(x, 0.7))": lambda x: torch.fmod(x, torch.full_like(x, 0.7)),
    "fmod(x, y)": lambda x, y=x[:1]: torch.fmod(x, y),
}
seen = {}
for name, f in functions.items():
    eager, compiled = f(x).tolist(), torch.compile(f)(x).tolist()
    print(f"{name}: eagerly {eager}, compiled {compiled}")
    seen[name] = eager == compiled
assert list(seen.values()) == [False, False, False, True], "torch has changed"
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/find.py"
