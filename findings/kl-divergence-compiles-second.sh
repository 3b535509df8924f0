#!/usr/bin/env bash
# torch 2.15.0: whether torch.compile(fullgraph=True) takes torch.distributions.kl_divergence depends on what the
# process did before. Dynamo cannot trace the search for the rule of a pair of classes (min of a generator), but
# the first eager call stores what it found in a table, and from then on the same program compiles. So a step
# with a KL term compiles after an eager step, as in a notebook, and is refused as a script that compiles at once.
# Call kl_divergence once for each pair of classes before you compile.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
cat >"$folder/find.py" <<'PYTHON'
import torch
from torch.distributions import Normal, kl_divergence


def kl(mean):
    scale = torch.ones_like(mean)
    posterior = Normal(mean, scale, validate_args=False)
    return kl_divergence(posterior, Normal(0 * mean, scale, validate_args=False)).sum()


def compiles():
    torch._dynamo.reset()
    try:
        torch.compile(kl, fullgraph=True, backend="eager")(mean)
    except torch._dynamo.exc.Unsupported as error:
        return str(error).splitlines()[0]
    return "compiles"


mean = torch.ones(3)
print("torch", torch.__version__)
before = compiles()
print("in a new process:    ", before)
print("eagerly:             ", kl(mean).item())
after = compiles()
print("after the eager call:", after)
assert (before, after) == ("Failed to trace builtin operator", "compiles"), "torch has changed"
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore "$folder/find.py"
