"""A step over several processes: each takes a part of the batch, gradients are averaged.

torchrun --nproc-per-node 2 docs/examples/data_parallel.py
"""

import torch
import torch.distributed as dist
from torch.func import grad_and_value

import fdl
from fdl import losses, nn, optim, random, tree


def averaged(objective, has_aux):
    """Differentiate as `grad_and_value` does, then average the gradients over all processes."""

    def call(params):
        grads, aux = grad_and_value(objective, has_aux=has_aux)(params)
        for leaf in tree.leaves(grads):
            dist.all_reduce(leaf)
        return tree.map(lambda leaf: leaf / dist.get_world_size(), grads), aux

    return call


dist.init_process_group("gloo")
rank, count = dist.get_rank(), dist.get_world_size()

model, opt = nn.sequential(nn.linear(4, 8), nn.tanh, nn.linear(8, 1)), optim.adam(0.01)
loss = fdl.supervised(model.apply, losses.mse)
step = fdl.train_step(loss, opt, grad_fn=averaged)
alone = fdl.train_step(loss, opt)

state = whole = fdl.TrainState.create(model, opt, key=random.key(0))  # the same in all processes
for i in range(10):
    x = random.normal(random.fold_in(random.key(1), i), (32, 4))
    y = x.sum(1, keepdim=True)
    state, _ = step(state, (x.chunk(count)[rank], y.chunk(count)[rank]))
    whole, _ = alone(whole, (x, y))

assert tree.allclose(state.params, whole.params, rtol=1e-4, atol=1e-5)
assert not torch.equal(state.params["0"]["weight"], model.init(random.key(0))["0"]["weight"])
print(f"process {rank} of {count}: as one process with the whole batch")
dist.destroy_process_group()
