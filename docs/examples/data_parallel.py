"""Softmax regression over several processes, each with its part of every batch.

torchrun --nproc-per-node 2 docs/examples/data_parallel.py
"""

import torch.distributed as dist

import fdl
from fdl import data, losses, nn, optim, parallel, random, tree

dist.init_process_group("gloo")  # "nccl" for GPUs
mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))

model, opt = nn.sequential(nn.flatten(), nn.linear(784, 10)), optim.sgd(lr=0.1, momentum=0.9)
loss = fdl.supervised(model, losses.cross_entropy)
step = parallel.train_step(loss, opt, mesh)  # instead of fdl.train_step(loss, opt)

images = data.fashion_mnist_sample()
rows = data.epoch_indices(random.key(1), n=len(images.x), batch_size=256)
start = fdl.TrainState.create(model, opt, key=random.key(0))
parallel.check_replicated({"state": start, "rows": rows}, mesh)


def epoch(step, rows):
    """Scan a step over rows of indices."""
    return fdl.scan(lambda s, row: step(s, data.to_float(data.batch(images, row))), start, rows)


state, metrics = epoch(step, parallel.own_rows(rows, mesh))  # fdl.jit makes one program of it
print(f"process {dist.get_rank()}: mean loss {metrics['loss'].sum().value:.6f}")

whole, _ = epoch(fdl.train_step(loss, opt), rows)  # what one process does alone
assert tree.allclose(state.params, whole.params, rtol=1e-4, atol=1e-5)
dist.destroy_process_group()
