#!/usr/bin/env bash
# torch 2.15.0, CPU: the gradient of a scan operator compiled by Inductor is wrong, silently, while the value
# is right. scan of (c · w + r).sin() over three rows, gradient of the last carry's sum by w: eager and the
# backend aot_eager agree with central differences, the default backend differs in the second entry by a third.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
cat >"$folder/find.py" <<'PYTHON'
import torch
from torch._higher_order_ops.scan import scan

w, start = torch.tensor([0.5, -1.5]), torch.tensor([0.3, 0.2])
rows = torch.arange(6.0).view(3, 2)


def last(w):
    carry, _ = scan(lambda c, r: ((c * w + r).sin(), c * 2), start, rows)
    return carry.sum()


def gradient(f):
    x = w.clone().requires_grad_()
    (value := f(x)).backward()
    return value.item(), x.grad


def by_loop(w):
    c = start.to(w.dtype)
    for r in rows:
        c = (c * w + r).sin()
    return c.sum()


h = 1e-6 * torch.eye(2, dtype=torch.float64)
right = torch.stack([(by_loop(w.double() + e) - by_loop(w.double() - e)) / 2e-6 for e in h])
value, by_aot = gradient(torch.compile(last, backend="aot_eager", fullgraph=True))
same, by_inductor = gradient(torch.compile(last, fullgraph=True))
print("central differences", right.tolist())
print("aot_eager          ", by_aot.tolist())
print("inductor           ", by_inductor.tolist())
assert abs(value - same) < 1e-6
assert torch.allclose(by_aot.double(), right, atol=1e-4)
assert (by_inductor - right).abs().max() > 0.1, "torch has changed: the gradient is right now"
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/find.py"
