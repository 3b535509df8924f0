"""Hamiltonian Monte Carlo of Pyro, on the compiled density of a model."""

import torch
from pyro.infer import MCMC, NUTS

import fdl
from fdl import losses, nn, random, tree

model = nn.sequential(nn.linear(4, 8), nn.tanh, nn.linear(8, 3))
x, y = random.normal(random.key(1), (64, 4)), random.randint(random.key(2), (64,), 0, 3)
params = tree.flatten_dict(model.init(random.key(0)))
torch.manual_seed(0)


# Recipe
@fdl.jit
def energy(params):
    prior = sum(leaf.square().sum() for leaf in params.values()) / 2
    return prior + 64 * losses.cross_entropy(model.apply(tree.unflatten_dict(params), x), y)


sampler = NUTS(potential_fn=energy)
chain = MCMC(sampler, 20, 20, params, disable_progbar=True)
chain.run()
samples = tree.unflatten_dict(chain.get_samples())

# Check
accuracy = (torch.vmap(model.apply, (0, None))(samples, x).mean(0).argmax(1) == y).float().mean()
assert samples["0"]["weight"].shape == (20, 8, 4) and accuracy > 0.4
