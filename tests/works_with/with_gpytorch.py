"""Train a Gaussian process by pure steps: in `trace_mode` its functions can be transformed."""

import gpytorch
import torch

import fdl
from fdl import interop, optim, random

x = torch.linspace(0, 1, 20)
y = torch.sin(6 * x)


class Process(gpytorch.models.ExactGP):
    def __init__(self):
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        self.mean, self.kernel = gpytorch.means.ConstantMean(), gpytorch.kernels.RBFKernel()

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))


class Loss(torch.nn.Module):
    def __init__(self, process):
        super().__init__()
        self.density = gpytorch.mlls.ExactMarginalLogLikelihood(process.likelihood, process)

    def forward(self, x, y):
        return -self.density(self.density.model(x), y)


module = Loss(Process())

# Recipe
model, params, buffers = interop.from_module(module)


def loss(params, batch, **_):
    return model.apply(params, buffers, *batch, train=True)[0], {}


opt = optim.adam(0.1)
step = fdl.train_step(loss, opt)
state = fdl.TrainState.create(model, opt, key=random.key(0))
with gpytorch.settings.trace_mode(), gpytorch.settings.debug(False):
    for _ in range(20):
        state, metrics = step(state, (x, y))
trained = interop.to_module(state.params, module, buffers)

# Check
theirs = Loss(Process())
optimizer = torch.optim.Adam(theirs.parameters(), lr=0.1)
for _ in range(20):
    optimizer.zero_grad()
    theirs(x, y).backward()
    optimizer.step()
torch.testing.assert_close(trained(x, y), theirs(x, y), atol=1e-4, rtol=0)
