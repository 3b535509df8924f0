#!/usr/bin/env bash
# torch 2.15.0 (since 2.12): what a program sets of `torch._dynamo.config` or `torch._inductor.config` is seen by the
# thread that sets it and by no other, also by none that is started afterwards: settings live in context variables, and
# a new thread begins with the defaults. A server that sets its options when it is imported and compiles in a pool of
# threads compiles without them, and nothing says so. Here a limit of 64 recompilations holds for the main thread, and
# the ninth shape in a worker is refused by the default limit of 8. With torch 2.11 all threads see the settings.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
cat >"$folder/find.py" <<'PYTHON'
from concurrent.futures import ThreadPoolExecutor

import torch
import torch._dynamo
import torch._inductor.config

print("torch", torch.__version__)
torch._dynamo.config.recompile_limit = 64
torch._inductor.config.fallback_random = True


def read():
    return torch._dynamo.config.recompile_limit, torch._inductor.config.fallback_random


def shapes_accepted():
    """Compile a function of ten shapes, and return how many were accepted."""
    torch._dynamo.reset()
    fn = torch.compile(lambda x: x + 1, backend="eager", fullgraph=True, dynamic=False)
    for n in range(1, 11):
        try:
            fn(torch.zeros(n))
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            return n - 1
    return n


with ThreadPoolExecutor(1) as pool:
    here, there = read(), pool.submit(read).result()
    print("settings of the main thread, and as a worker reads them:", here, there)
    assert here == (64, True) and there == (8, False), "torch has changed"
    here, there = shapes_accepted(), pool.submit(shapes_accepted).result()
    print("shapes accepted in the main thread, and in the worker:", here, there)
    assert (here, there) == (10, 8), "torch has changed"
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/find.py"
