#!/usr/bin/env bash
# torch 2.11.0 and 2.15.0: `torch.func.functionalize` treats a `scan` the wrong way round. With remove="mutations"
# views stay views, except in the body of the loop, where each becomes a copy (t → t_copy); with
# remove="mutations_and_views" they become copies, except in the body. So a compiler that functionalizes because one
# operation writes in place copies a weight in every step of a recurrent net. The condition in
# `FunctorchFunctionalizeAPI.functionalize` is the other one. Trace the loop's body before, or replace the method.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
cat >"$folder/find.py" <<'PYTHON'
import torch
from torch._higher_order_ops.scan import scan
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx


def fn(w, rows):
    start = torch.zeros(2, 2).add_(1) @ w.t()

    def body(carry, row):
        carry = carry @ w.t() + row
        return carry, carry.clone()

    return scan(body, start, rows)


def transposes(remove):
    """The operations that transpose, outside of the loop and in its body."""
    graph = make_fx(functionalize(fn, remove=remove), tracing_mode="fake")(torch.rand(2, 2), torch.rand(3, 2, 2))
    (body,) = graph.children()
    return tuple(
        [str(n.target) for n in part.graph.nodes if str(n.target).startswith("aten.t")] for part in (graph, body)
    )


print("torch", torch.__version__)
for remove in ("mutations", "mutations_and_views"):
    outside, inside = transposes(remove)
    print(f"remove={remove!r}: outside {outside}, in the body {inside}")
    expected = ["aten.t.default", "aten.t_copy.default"]
    if remove == "mutations_and_views":
        expected.reverse()
    assert [*outside, *inside] == expected, "torch has changed"
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/find.py"
