#!/usr/bin/env bash
# torch 2.15.0: the first eager `torch.func.grad` (or `vjp`, `jacrev`) of a process imports Dynamo and Inductor, with
# SymPy and torch.distributed behind them: about 900 modules and 2 to 3 seconds before a gradient of three
# numbers, though nothing is compiled. All that it wants is to switch off compiled autograd, which only Dynamo can
# have switched on. `backward`, `torch.func.vmap` and `torch.func.jvp` import none of it, and neither does
# `import torch`. Scripts that run for a second pay more for this than for all they do, and a benchmark that times
# the first gradient times an import.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
cat >"$folder/find.py" <<'PYTHON'
import sys
import time

import torch

COMPILERS = {"torch._dynamo", "torch._inductor", "sympy"}


def imported(call):
    """The compilers and the number of modules that a call imports, and its seconds."""
    before, began = set(sys.modules), time.perf_counter()
    call()
    new = set(sys.modules) - before
    return sorted(COMPILERS & new), len(new), time.perf_counter() - began


def loss(x):
    return (x**2).sum()


x = torch.ones(3)
print("torch", torch.__version__)
assert not COMPILERS & set(sys.modules), "import torch imports them"
for name, call in {
    "backward": lambda: loss(x.clone().requires_grad_()).backward(),
    "torch.func.vmap": lambda: torch.func.vmap(loss)(x),
    "torch.func.jvp": lambda: torch.func.jvp(loss, (x,), (x,)),
}.items():
    compilers, modules, seconds = imported(call)
    assert not compilers, f"{name} imports {compilers}"
    print(f"{name}: {modules} modules, {seconds:.2f} s")
for time_of_call in ("first", "second"):
    compilers, modules, seconds = imported(lambda: torch.func.grad(loss)(x))
    print(f"torch.func.grad, {time_of_call}: {modules} modules, {seconds:.4f} s; {' '.join(compilers)}")
    if time_of_call == "first":
        assert set(compilers) == COMPILERS and modules > 700, "torch has changed"
    else:
        assert modules == 0
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/find.py"
