"""An evolution strategy on the parameters as one vector, the whole population in one program."""

import torch
from evotorch.algorithms.functional import pgpe, pgpe_ask, pgpe_tell

import fdl
from fdl import losses, nn, random, tree

model = nn.sequential(nn.linear(4, 8), nn.tanh, nn.linear(8, 3))
x, y = random.normal(random.key(1), (64, 4)), random.randint(random.key(2), (64,), 0, 3)
rates = {"center_learning_rate": 0.3, "stdev_learning_rate": 0.1, "stdev_init": 0.1}

# Recipe
vector, unravel = tree.ravel(model.init(random.key(0)))
loss = fdl.jit(torch.vmap(lambda v: losses.cross_entropy(model.apply(unravel(v), x), y)))
search = pgpe(center_init=vector, objective_sense="min", **rates)
for _ in range(60):
    population = pgpe_ask(search, popsize=50)
    search = pgpe_tell(search, population, loss(population))
params = unravel(search.optimizer_state.center)

# Check
assert losses.cross_entropy(model.apply(params, x), y) < 0.8
