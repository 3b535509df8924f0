"""A chain of posteriors in one program: `from_module` makes its sampler draw from a key."""

import posteriors
import torch

import fdl
from fdl import interop, losses, nn, random, tree

model = nn.sequential(nn.linear(4, 8), nn.tanh, nn.linear(8, 3))
x, y = random.normal(random.key(1), (64, 4)), random.randint(random.key(2), (64,), 0, 3)


def log_posterior(params, batch):
    prior = -sum(leaf.square().sum() for leaf in tree.leaves(params)) / 2
    return prior / 64 - losses.cross_entropy(model.apply(params, batch[0]), batch[1]), ()


# Recipe
class Sampler(torch.nn.Module):
    def forward(self, params, batch):
        sgld = posteriors.sgmcmc.sgld.build(log_posterior, lr=0.01, temperature=1 / 64)
        return sgld.update(sgld.init(params), batch)[0].params


sampler, _, _ = interop.from_module(Sampler())
step = lambda p, key: (sampler.apply({}, p, (x, y), train=True, key=key), p)  # noqa: E731
chain = fdl.jit(lambda params, keys: fdl.scan(step, params, keys))
params, samples = chain(model.init(random.key(0)), random.split(random.key(1), 50))

# Check
values = torch.vmap(lambda params: log_posterior(params, (x, y))[0])(samples)
assert values[25:].mean() > values[0] and values.unique().numel() == 50
