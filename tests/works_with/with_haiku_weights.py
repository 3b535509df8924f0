"""Go on training an MLP of Haiku, with its momentum: its layouts are Flax' under other names."""

import haiku as hk
import jax
import numpy as np
import optax
import torch

import fdl
from fdl import interop, losses, nn, optim, random

net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 8, 3])(x)))
rng = np.random.default_rng(0)
x, y = rng.normal(size=(32, 4)).astype("float32"), rng.integers(0, 3, 32)
theirs, sgd = net.init(jax.random.key(0), x), optax.sgd(0.1, momentum=0.9)


@jax.jit
def train(params, opt_state):
    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(net.apply(params, x), y).mean()

    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = sgd.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, value


opt_state = sgd.init(theirs)
for _ in range(3):
    theirs, opt_state, _ = train(theirs, opt_state)
model = nn.sequential(nn.linear(4, 16), nn.relu, nn.linear(16, 8), nn.relu, nn.linear(8, 3))
places = {"mlp/~/linear_0": "0", "mlp/~/linear_1": "2", "mlp/~/linear_2": "4"}

# Recipe
FLAX = {"w": "kernel", "b": "bias", "offset": "bias", "embeddings": "embedding"}


def from_haiku(layers):
    layers = {places[at]: {FLAX.get(n, n): v for n, v in layers[at].items()} for at in layers}
    return interop.from_flax(interop.from_jax(layers), like=model.init(random.key(0)))


params, momentum = from_haiku(theirs), from_haiku(opt_state[0].trace)

# Check
opt = optim.sgd(0.1, momentum=0.9)
state = fdl.TrainState.create(model, opt, key=random.key(0), params=params)
trace, rate = state.opt_state
trace = trace._replace(slots={"momentum_buffer": momentum})
state = state._replace(opt_state=(trace, rate))
step = fdl.train_step(fdl.supervised(model, losses.cross_entropy), opt)
for _ in range(10):
    state, metrics = step(state, (torch.from_numpy(x), torch.from_numpy(y)))
    theirs, opt_state, loss = train(theirs, opt_state)
    torch.testing.assert_close(metrics["loss"].value.item(), loss.item())
