"""Message passing on a graph: gather, scatter-add, degree normalisation, max pooling by amax."""

from __future__ import annotations

import torch

from fdl import nn, optim, random, tree
from tests.support.programs import Program

NODES, EDGES, WIDTH = 10, 24, 6
source, target = random.randint(random.key(9), (2, EDGES), 0, NODES)
graph_of = torch.arange(NODES) // 5
message = nn.sequential(nn.linear(2 * WIDTH, 16), nn.relu, nn.linear(16, WIDTH))
optimizer = optim.adamw(1e-2)


def forward(params, nodes):
    degree = (
        torch.zeros(NODES, dtype=torch.float64)
        .index_add(0, target, torch.ones(EDGES, dtype=torch.float64))
        .clamp(min=1)
    )
    for _ in range(2):
        messages = message.apply(params["message"], torch.cat([nodes[source], nodes[target]], -1))
        index = target[:, None].expand(-1, WIDTH)
        received = torch.zeros_like(nodes).scatter_add(0, index, messages)
        nodes = nodes + received / degree[:, None]
    pooled = torch.full((2, WIDTH), float("-inf"), dtype=nodes.dtype)
    pooled = pooled.scatter_reduce(0, graph_of[:, None].expand(-1, WIDTH), nodes, "amax")
    return pooled @ params["readout"]


def step(state, batch):
    params, opt = state
    nodes, y = batch
    grads, loss = torch.func.grad_and_value(
        lambda params: (forward(params, nodes) - y).square().mean()
    )(params)
    updates, opt = optimizer.update(grads, opt, params)
    return (optim.apply_updates(params, updates), opt), loss


def init():
    first, second = random.split(random.key(0))
    params = {"message": message.init(first), "readout": random.normal(second, (WIDTH,))}
    params = tree.cast(params, torch.float64)
    return params, optimizer.init(params)


def batches():
    nodes = random.normal(random.key(1), (4, NODES, WIDTH), torch.float64)
    return nodes, nodes.mean((1, 2))[:, None].expand(-1, 2)


PROGRAM = Program(step, init=init, xs=batches)
