#!/usr/bin/env bash
# torch 2.15.0: a function that make_fx traces with the same tensor as two of its arguments becomes a graph that
# reads the last of them for both, without a word: traced with (x, x), a - b is 0 for every a and b afterwards.
# The same with torch.func.functionalize inside, as custom compilers trace. jax.make_jaxpr keeps the two
# arguments apart, and torch.compile compiles again once they differ.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6 jax==0.10.2
cat >"$folder/find.py" <<'PYTHON'
import jax
import torch
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx


def difference(a, b):
    return a - b


x, five, three = torch.ones(2), torch.full((2,), 5.0), torch.full((2,), 3.0)
apart = make_fx(difference)(x, x.clone())
together = make_fx(difference)(x, x)
pure = make_fx(functionalize(difference))(x, x)
one = jax.numpy.ones(2)
same = jax.make_jaxpr(difference)(one, one)
in_jax = jax.core.eval_jaxpr(same.jaxpr, same.consts, five.numpy(), three.numpy())[0]
results = {
    "traced with two tensors": apart(five, three).tolist(),
    "traced with one, twice": together(five, three).tolist(),
    "the same, functionalized": pure(five, three).tolist(),
    "jax.make_jaxpr with one, twice": in_jax.tolist(),
    "torch.compile, called with one first": None,
}
compiled = torch.compile(difference, backend="eager")
compiled(x, x)
results["torch.compile, called with one first"] = compiled(five, three).tolist()
print("torch", torch.__version__, "jax", jax.__version__)
for name, value in results.items():
    print(f"{name}: {value}")
print(together.code.strip())
assert list(results.values()) == [[2.0, 2.0], [0.0, 0.0], [0.0, 0.0], [2.0, 2.0], [2.0, 2.0]]
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/find.py"
