"""Parameters go to MLX and come from it, as files or arrays."""

import mlx.core as mx
import torch

import fdl
from fdl import nn, random

params = nn.linear(4, 3).init(random.key(0))

# Recipe
fdl.io.save("params.safetensors", params)
theirs = mx.load("params.safetensors")
mx.save_safetensors("theirs.safetensors", {"weight": 2 * theirs["weight"], "bias": theirs["bias"]})
ours = fdl.io.load("theirs.safetensors", like=params)

# Check
assert torch.equal(ours["weight"], 2 * params["weight"])
