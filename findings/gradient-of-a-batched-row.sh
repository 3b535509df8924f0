#!/usr/bin/env bash
# torch 2.15.0: the gradient of a batched torch.select_scatter with respect to the row that it writes is too
# large by the size of the axis. For y = select_scatter(x, s, 0, 1) with x of 4 rows, sum(y) has the derivative
# 1 with respect to s: vmap of grad says so, grad of vmap says 4, without a word. slice_scatter of the same row
# is right: use it. In-place writes such as h[1] = ... become select_scatter where they are made pure.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
cat >"$folder/find.py" <<'PYTHON'
import torch
from torch.func import grad, vmap

x, s = torch.zeros(2, 4, 5), torch.zeros(2, 5)

def select(x, s):
    return torch.select_scatter(x, s, 0, 1).sum()


def narrow(x, s):
    return torch.slice_scatter(x, s[None], 0, 1, 2).sum()

def of_batch(f):
    return grad(lambda s: vmap(f)(x, s).sum())(s)

print("torch", torch.__version__)
each = vmap(grad(select, argnums=1))(x, s)
print("vmap(grad(select_scatter)):", each.unique().tolist())
print("grad(vmap(select_scatter)):", of_batch(select).unique().tolist())
print("grad(vmap(slice_scatter)): ", of_batch(narrow).unique().tolist())
assert each.unique().tolist() == [1.0]
assert of_batch(narrow).unique().tolist() == [1.0]
assert of_batch(select).unique().tolist() == [4.0], "torch has changed"
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/find.py"
