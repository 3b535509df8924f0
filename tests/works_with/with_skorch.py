"""A model as an estimator of scikit-learn."""

import torch
from skorch import NeuralNetClassifier

from fdl import interop, nn, random

model = nn.sequential(nn.linear(4, 8), nn.tanh, nn.linear(8, 3))
x, y = random.normal(random.key(1), (64, 4)), (random.normal(random.key(1), (64, 4)).argmax(1) % 3)

# Recipe
module = interop.as_module(model, model.init(random.key(0)))
loss = torch.nn.CrossEntropyLoss
estimator = NeuralNetClassifier(module, criterion=loss, lr=0.5, max_epochs=60, verbose=0)
estimator.fit(x.numpy(), y.numpy())

# Check
assert estimator.score(x.numpy(), y.numpy()) > 0.8
