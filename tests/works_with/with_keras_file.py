"""Go on training the model of a `.keras` file: a strided SAME convolution, batch norm, dense."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import keras
import numpy as np
import torch
import torch.nn.functional as F
from keras import layers

import fdl
from fdl import interop, losses, nn, optim, random

net = keras.Sequential(
    [
        keras.Input((8, 8, 3)),
        layers.Conv2D(8, 3, strides=2, padding="same"),
        layers.BatchNormalization(name="norm"),
        layers.ReLU(),
        layers.Flatten(),
        layers.Dense(3, name="logits"),
    ]
)
net.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
rng = np.random.default_rng(0)
x, y = rng.normal(size=(32, 8, 8, 3)).astype("float32"), rng.integers(0, 3, 32)
for _ in range(3):
    net.train_on_batch(x, y)
net.save("net.keras")

model = nn.sequential(
    lambda x: F.pad(x, (0, 1, 0, 1)),  # SAME with stride 2 on an even size pads at the end only
    nn.conv2d(3, 8, 3, stride=2),
    nn.batch_norm(8, eps=1e-3, momentum=0.01),
    nn.relu,
    nn.flatten(),
    nn.linear(8 * 4 * 4, 3),
)

# Recipe
like, names = model.init(random.key(0)), {"conv2d": "1", "norm": "2", "logits": "5"}
image = {"logits": (8, 4, 4)}  # what Flatten flattens: channels, height, width
params, buffers = interop.from_keras("net.keras", image, like=like, names=names)

# Check
batch = torch.from_numpy(x).movedim(-1, 1), torch.from_numpy(y)
evaluated, _ = model.apply(params, buffers, batch[0])
torch.testing.assert_close(evaluated, torch.from_numpy(np.array(net(x))), atol=1e-5, rtol=1e-5)
opt = optim.sgd(0.1)
step = fdl.train_step(fdl.supervised(model, losses.cross_entropy), opt)
state = fdl.TrainState.create(model, opt, key=random.key(0), params=params)
state = state._replace(buffers=buffers)
for _ in range(10):
    state, metrics = step(state, batch)
    torch.testing.assert_close(metrics["loss"].value.item(), float(net.train_on_batch(x, y)))
