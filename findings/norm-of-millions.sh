#!/usr/bin/env bash
# torch 2.15.0, CPU, one thread: torch.linalg.vector_norm of 8 million float32 numbers is too small by
# 0.7 %, thousands of times float32's rounding. It adds the squares one after the other; (x * x).sum(),
# which adds by halves, is right to 1e-6. clip_grad_norm_ and every logged gradient norm use the former.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
cat >"$folder/find.py" <<'PYTHON'
import torch

torch.set_num_threads(1)
x = torch.full((8_000_000,), 0.1)
right = (x.double() ** 2).sum().sqrt().item()
norm = torch.linalg.vector_norm(x).item()
halves = (x * x).sum().sqrt().item()
print(f"right {right:.4f}, vector_norm {norm:.4f} ({norm / right - 1:+.2%}), "
      f"(x * x).sum().sqrt() {halves:.4f} ({halves / right - 1:+.1e})")
assert abs(norm / right - 1) > 1e-3, "torch has changed: the norm is right now"
assert abs(halves / right - 1) < 1e-6
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/find.py"
