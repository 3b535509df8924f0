"""Go on training a net of Equinox: weights as torch has them, but for the bias of a convolution."""

import equinox as eqx
import jax
import numpy as np
import optax
import torch

import fdl
from fdl import interop, losses, nn, optim, random

keys = jax.random.split(jax.random.key(0), 3)


class Net(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    up: eqx.nn.ConvTranspose2d
    out: eqx.nn.Linear

    def __init__(self):
        self.conv = eqx.nn.Conv2d(3, 8, 3, stride=2, padding=1, key=keys[0])
        self.norm = eqx.nn.BatchNorm(8, axis_name="batch", mode="batch")
        self.up = eqx.nn.ConvTranspose2d(8, 4, 3, stride=2, key=keys[1])
        self.out = eqx.nn.Linear(4 * 9 * 9, 3, key=keys[2])

    def __call__(self, x, state):
        x, state = self.norm(self.conv(x), state)
        return self.out(self.up(jax.nn.relu(x)).reshape(-1)), state


rng = np.random.default_rng(0)
x, y = rng.normal(size=(32, 3, 8, 8)).astype("float32"), rng.integers(0, 3, 32)
net, norms = eqx.nn.make_with_state(Net)()
axes = {"in_axes": (0, None), "out_axes": (0, None)}


def forward(net, norms):
    return jax.vmap(net, axis_name="batch", **axes)(x, norms)


@eqx.filter_jit
def train(net, norms):
    def loss(net):
        logits, now = forward(net, norms)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), now

    (value, norms), grads = eqx.filter_value_and_grad(loss, has_aux=True)(net)
    return eqx.apply_updates(net, jax.tree.map(lambda g: -0.1 * g, grads)), norms, value


for _ in range(3):
    net, norms, _ = train(net, norms)


model = nn.sequential(
    conv=nn.conv2d(3, 8, 3, stride=2, padding=1),
    norm=nn.batch_norm(8, momentum=0.01),
    relu=nn.relu,
    up=nn.conv_transpose2d(8, 4, 3, stride=2),
    flatten=nn.flatten(),
    out=nn.linear(4 * 9 * 9, 3),
)
_, like = model.init(random.key(0))

# Recipe
leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(net, eqx.is_inexact_array))
flat = interop.from_jax({"".join(map(str, path)).lstrip("."): leaf for path, leaf in leaves})
for path in ("conv.bias", "up.bias"):
    flat[path] = flat[path].flatten()  # [out, 1, 1]
flat["up.weight"] = flat["up.weight"].transpose(0, 1).flip(2, 3)
mean, var = interop.from_jax(list(norms.get(net.norm.batch_state_index)))
scale = 1 - 0.99 ** int(norms.get(net.norm.batch_counter))  # by which Equinox divides both
moving = {"running_mean": mean / scale, "running_var": var / scale}
params, buffers = fdl.tree.unflatten_dict(flat), {"norm": like["norm"] | moving}

# Check
images, labels = torch.from_numpy(x), torch.from_numpy(y)
quiet = eqx.nn.inference_mode(net)
expected = interop.from_jax(forward(quiet, norms)[0])
evaluated, _ = model.apply(params, buffers, images)
torch.testing.assert_close(evaluated, expected, atol=1e-5, rtol=1e-5)
opt = optim.sgd(0.1)
step = fdl.train_step(fdl.supervised(model, losses.cross_entropy), opt)
state = fdl.TrainState.create(model, opt, key=random.key(0), params=params)
state = state._replace(buffers=buffers)
for _ in range(10):
    state, metrics = step(state, (images, labels))
    net, norms, loss = train(net, norms)
    torch.testing.assert_close(metrics["loss"].value.item(), loss.item())
