"""Parameters go to tinygrad and come from it, as files or arrays."""

import torch
from tinygrad.nn.state import safe_load

import fdl
from fdl import interop, nn, random

params = nn.linear(4, 3).init(random.key(0))

# Recipe
fdl.io.save("params.safetensors", params)
theirs = {name: x.to("PYTHON") for name, x in safe_load("params.safetensors").items()}
ours = interop.from_numpy({name: x.numpy() for name, x in theirs.items()})

# Check
assert torch.equal(ours["weight"], params["weight"])
