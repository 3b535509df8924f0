"""A model as a module in a loop of accelerate."""

import torch
from accelerate import Accelerator

import fdl
from fdl import interop, nn, random

model = nn.sequential(nn.linear(4, 8), nn.tanh, nn.linear(8, 3))
x, y = random.normal(random.key(1), (64, 4)), random.randint(random.key(2), (64,), 0, 3)
rows = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)
params = model.init(random.key(0))

# Recipe
module = interop.as_module(model, params)
optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
accelerator = Accelerator(cpu=True)
module, optimizer, rows = accelerator.prepare(module, optimizer, rows)
for batch in rows:
    optimizer.zero_grad()
    accelerator.backward(torch.nn.functional.cross_entropy(module(batch[0]), batch[1]))
    optimizer.step()
named = dict(accelerator.unwrap_model(module).named_parameters())
trained = fdl.tree.unflatten_dict(named, like=params)

# Check
opt = fdl.optim.sgd(0.5)
state = fdl.TrainState.create(model, opt, key=random.key(0), params=params)
step = fdl.train_step(fdl.supervised(model, fdl.losses.cross_entropy), opt)
for i in range(4):
    state, _ = step(state, (x[16 * i : 16 * i + 16], y[16 * i : 16 * i + 16]))
assert fdl.tree.allclose(trained, state.params, atol=1e-6)
