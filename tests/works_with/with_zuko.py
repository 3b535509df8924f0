"""A normalizing flow of zuko, trained by compiled steps."""

import torch
import zuko

import fdl
from fdl import interop, optim, random

x = random.normal(random.key(1), (64, 2)).cumsum(1)  # two correlated numbers
flow = zuko.flows.NSF(features=2, transforms=2, hidden_features=(16,))


class Density(torch.nn.Module):
    def forward(self, x):
        return -self.flow().log_prob(x).mean()


module, opt = Density(), optim.adam(0.01)
module.flow = flow

# Recipe
model, params, buffers = interop.from_module(module)


def loss(params, batch, **_):
    return model.apply(params, buffers, batch)[0], {}


state = fdl.TrainState.create(model, opt, key=random.key(0))
step = fdl.jit(fdl.train_step(loss, opt))
for _ in range(20):
    state, metrics = step(state, x)

# Check
optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
for _ in range(20):
    optimizer.zero_grad()
    module(x).backward()
    optimizer.step()
torch.testing.assert_close(loss(state.params, x)[0], module(x), atol=1e-3, rtol=0)
