#!/usr/bin/env bash
# torch 2.15.0, CPU: torch._assert_async(condition) is dropped from a program of torch.compile, and stays with a message:
# torch._assert_async(condition, "why"). Eager torch, and Dynamo without AOTAutograd, raise in both cases; torch 2.11.0
# drops it with the backend aot_eager alone. The list of operations that torch.fx keeps though nothing reads their result
# has one overload, but not the other. A check that numbers are positive or finite is given a message.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
cat >"$folder/find.py" <<'PYTHON'
import torch

print("torch", torch.__version__)


def silent(x):
    torch._assert_async((x > 0).all())
    return x * 2


def speaking(x):
    torch._assert_async((x > 0).all(), "numbers must be positive")
    return x * 2


def outcome(f):
    try:
        return f(torch.tensor([-1.0, 3.0])).tolist()
    except RuntimeError as error:
        return str(error).splitlines()[0]


for f in (silent, speaking):
    eager = outcome(f)
    found = {backend: outcome(torch.compile(f, backend=backend)) for backend in ("eager", "aot_eager", "inductor")}
    print(f"{f.__name__}: without torch.compile: {eager}")
    for backend, result in found.items():
        print(f"    {backend}: {result}")
    assert isinstance(eager, str) and found["eager"] == eager, "Dynamo has changed"
    kept = f is speaking
    for backend in ("aot_eager", "inductor"):
        assert found[backend] == (eager if kept else [-2.0, 6.0]), f"{backend} has changed"
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/find.py"
