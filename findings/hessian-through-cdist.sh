#!/usr/bin/env bash
# torch 2.15.0: the Hessian of a kernel written with cdist is wrong by more than its own size.
# jacrev(grad(f)) of Σ exp(−cdist(z, z + 1)²/2), 4 points in the plane, float64: the rows differ from
# central differences of grad(f), which itself is right; with the distances written out they agree.
# The second derivative of cdist is wrong under vmap, which jacrev uses for the rows.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
cat >"$folder/find.py" <<'PYTHON'
import torch
from torch.func import grad, jacrev

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
z = torch.randn(4, 2)


def kernel(distance):
    return lambda z: torch.exp(-distance(z, z + 1.0) ** 2 / 2).sum()


def written_out(a, b):
    return ((a[:, None] - b[None]) ** 2).sum(-1).sqrt()


def differences(f, x, h=1e-6):
    return torch.stack([(f(x + e.view_as(x)) - f(x - e.view_as(x))).flatten() / (2 * h)
                        for e in h * torch.eye(x.numel())])


errors = {}
for name, distance in (("cdist", torch.cdist), ("written out", written_out)):
    f = kernel(distance)
    right = differences(grad(f), z)
    rows = jacrev(grad(f))(z).reshape(8, 8)
    errors[name] = ((rows - right).abs().max() / right.abs().max()).item()
    slope = (grad(f)(z) - grad(kernel(written_out))(z)).abs().max()
    print(f"{name:12} gradient off by {slope:.0e}, Hessian off by {errors[name]:.1e} (relative)")
    assert slope < 1e-12

assert errors["cdist"] > 0.1, "torch has changed: the Hessian is right now"
assert errors["written out"] < 1e-6
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/find.py"
