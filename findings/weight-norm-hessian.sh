#!/usr/bin/env bash
# torch 2.15.0, CPU: the Hessian through torch.nn.utils.parametrizations.weight_norm is wrong, silently:
# jacrev(grad(f)) of one such layer under tanh differs from central differences of grad(f) by more
# than half its size in float64; g · v / ‖v‖ written out agrees to 1e-7. First derivatives are right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
cat >"$folder/find.py" <<'PYTHON'
import torch
from torch.func import functional_call, grad, jacrev

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 1, bias=False))
g, v = (p.detach() for p in layer.parameters())
x, start = torch.randn(5, 3), torch.cat([g.flatten(), v.flatten()])


def module(w):
    names = [name for name, _ in layer.named_parameters()]
    values = dict(zip(names, (w[:1].view_as(g), w[1:].view_as(v))))
    return functional_call(layer, values, x).tanh().sum()


def written_out(w):
    g, v = w[:1], w[1:]
    return (x @ (g * v / (v * v).sum().sqrt())).tanh().sum()


def differences(f, w, h=1e-6):
    return torch.stack([(f(w + e) - f(w - e)) / (2 * h) for e in h * torch.eye(len(w))])


errors = {}
for f in (module, written_out):
    right = differences(grad(f), start)
    hessian = jacrev(grad(f))(start)
    errors[f.__name__] = ((hessian - right).abs().max() / right.abs().max()).item()
    print(f"{f.__name__:12} gradient off by {(grad(f)(start) - grad(written_out)(start)).abs().max():.0e}, "
          f"Hessian off by {errors[f.__name__]:.1e} (relative)")

assert errors["module"] > 0.1, "torch has changed: the Hessian is right now"
assert errors["written_out"] < 1e-6
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/find.py"
