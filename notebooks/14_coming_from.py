# %% [markdown]
# # 14 Coming from nn.Module, coming from JAX
# Curriculum: B1
#
# **You will learn** the word in `fdl` for what you already know, in two tables to be read in either
# direction; how to bring a module in, train it as a pure function and take it out again; and that a
# JAX program ported line by line gives the same numbers from the same keys.

# %%
import importlib.util
import warnings

import numpy as np
import torch
import torchvision
from torch.func import grad, grad_and_value, vmap
from torch.testing import assert_close

import fdl
from fdl import data, interop, losses, nn, optim, random, tree

key = random.key(0)

# %% [markdown]
# ## nn.Module and fdl
#
# | `torch` | `fdl` | what changes |
# |---|---|---|
# | `class Net(nn.Module)` | `Model(init, apply)` | two functions instead of an object |
# | `self.weight = nn.Parameter(…)` | an entry of the tree from `init(key)` | who holds it: you |
# | `net.named_parameters()` | `tree.flatten_dict(params)` | same paths, shapes, layouts |
# | `net.train()`, `net.eval()` | `apply(…, train=True)` | the mode is an argument |
# | `torch.manual_seed(0)` | `random.key(0)`, `split`, `fold_in` | randomness is an argument |
# | buffers, changed in place | `apply(params, buffers, x) → (y, buffers)` | an input and an output |
# | `loss.backward()`, `p.grad` | `grads = torch.func.grad(loss)(params)` | a return value |
# | `opt.zero_grad()` | | nothing to zero |
# | `with torch.no_grad():` | | nothing is recorded unless asked |
# | `opt.step()` | `opt.update(grads, opt_state, params)` | returns updates and a new state |
# | `param_groups` | `optim.multi_transform` | a label for each path |
# | `scheduler.step()` | `optim.adam(lr=schedule)` | a rate may be a function of the count |
# | `DataLoader(shuffle=True)` | `data.epoch_indices(key, …)`, `data.batch` | an order is a tensor of indices |
# | `torch.compile(net)` | `fdl.jit(epoch)` | the whole step or epoch, not the model |
# | `torch.save(net.state_dict())` | `fdl.io.save`, or `fdl.io.save_torch` | no pickle; torch's files too |
# | a checkpoint dictionary | `fdl.checkpointing.Checkpointer` | the whole `TrainState` |
# | `DistributedDataParallel(net)` | `parallel.train_step(loss, opt, mesh)` | the step is told, not the model |

# %% [markdown]
# ## B1 A module in, and out again
# **Imperative.** A small network with everything that is awkward to move: batch normalisation has
# buffers, dropout draws, and its mode is a flag.

# %%
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = torch.nn.Linear(784, 64)
        self.norm = torch.nn.BatchNorm1d(64)
        self.drop = torch.nn.Dropout(0.2)
        self.output = torch.nn.Linear(64, 10)

    def forward(self, x):
        h = torch.relu(self.norm(self.hidden(x.flatten(1))))
        return self.output(self.drop(h))

torch.manual_seed(0)
net = Net()

# %% [markdown]
# **Functional.** `from_module` copies the values and leaves the module alone. What `forward` reads
# and writes becomes arguments and results.

# %%
model, params, buffers = interop.from_module(net)
x = random.uniform(key, (32, 1, 28, 28))
y, after = model.apply(params, buffers, x, train=True, key=key)

assert after["norm"]["num_batches_tracked"] == 1           # a result
assert net.norm.num_batches_tracked == 0                   # the module has not moved
again, _ = model.apply(params, buffers, x, train=True, key=key)
other, _ = model.apply(params, buffers, x, train=True, key=random.key(1))
assert torch.equal(y, again) and not torch.equal(y, other)  # dropout follows the key

# %% [markdown]
# In evaluation nothing is drawn and nothing moves, so the outputs are the module's:

# %%
net.eval()
y, after = model.apply(params, buffers, x)
assert_close(y, net(x))
assert torch.equal(after["norm"]["running_mean"], buffers["norm"]["running_mean"])

# %% [markdown]
# It trains like any model here. Three seeds of it train at once: the module was written for one.

# %%
images, test = data.fashion_mnist_sample(), data.fashion_mnist_sample(train=False)
opt = optim.adam(1e-3)
loss = fdl.supervised(model, losses.cross_entropy)
step = fdl.train_step(loss, opt)
states = fdl.population.create(model, opt, random.split(key, 3))
rows = data.epoch_indices(random.key(1), len(images.x), 200, drop_last=True)
for i in range(len(rows.index)):
    batch = data.to_float(data.batch(images, data.take(rows, i)))
    states, metrics = vmap(step, (0, None))(states, (batch.x, batch.y))
print("loss of each member after an epoch:", metrics["loss"].value.tolist())

# %% [markdown]
# Back into a module, for whoever wants one. Paths must agree, and what does not is listed.

# %%
best = fdl.population.best(states, metrics["loss"].value)
trained = interop.to_module(best.params, net, best.buffers).eval()
pictures = test.x[:, None].float() / 255
assert_close(trained(pictures), model.apply(best.params, best.buffers, pictures)[0])
accuracy = (trained(pictures).argmax(1) == test.y).double().mean().item()
print(f"test accuracy of the module {accuracy:.3f}")
assert accuracy > 0.65

try:
    interop.to_module({"hidden": best.params["hidden"]}, net, best.buffers)
except ValueError as error:
    print(error)

# %% [markdown]
# **A network from torchvision** is a module like any other. Once it is a function, what a module cannot do
# comes with it: here the gradient of each photo alone.

# %%
resnet = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1],
                                   num_classes=10).eval()
pure, weights, statistics = interop.from_module(resnet)
photos, classes = random.uniform(key, (4, 3, 32, 32)), torch.arange(4)
assert torch.equal(pure.apply(weights, statistics, photos)[0], resnet(photos))

def cost(weights, photo, target):                            # of one photo
    logits, _ = pure.apply(weights, statistics, photo[None])
    return losses.cross_entropy(logits, target[None]).mean()

each = vmap(grad(cost), (None, 0, 0))(weights, photos, classes)
torch.nn.functional.cross_entropy(resnet(photos), classes).backward()
assert_close(each["conv1"]["weight"].mean(0), resnet.conv1.weight.grad, rtol=1e-3, atol=1e-5)
print("conv1, for each photo:", list(each["conv1"]["weight"].shape))

# %% [markdown]
# ## The same network, written anew
# Layers compose by name, and the paths are those of `state_dict()`. So weights go across as they are,
# and so does the answer.

# %%
native = nn.sequential(flatten=nn.flatten(), hidden=nn.linear(784, 64), norm=nn.batch_norm(64),
                       relu=nn.relu, drop=nn.dropout(0.2), output=nn.linear(64, 10))
y, _ = native.apply(best.params, best.buffers, pictures)
assert_close(y, trained(pictures))

# %% [markdown]
# Where they differ, they differ on purpose: `nn.batch_norm` takes a batch's mask and counts examples
# only, while a module of torch cannot know what is padding, so a masked batch is refused there.
#
# ### An optimizer in the middle of its run
# `optim.from_torch` takes over what Adam remembers, and the two go on alike.

# %%
twin = torch.nn.Linear(3, 1).double()
adam = torch.optim.Adam(twin.parameters(), lr=0.01)
X = random.normal(key, (50, 3), torch.float64)
Y = X.sum(1, keepdim=True)

def imperative_step():
    adam.zero_grad()
    torch.nn.functional.mse_loss(twin(X), Y).backward()
    adam.step()

for _ in range(20):
    imperative_step()
theirs = tree.unflatten_dict(dict(twin.named_parameters()))     # the very tensors it optimizes
opt, opt_state = optim.from_torch(adam, theirs)
line, copies = nn.linear(3, 1), tree.map(lambda leaf: leaf.detach().clone(), theirs)
state = fdl.TrainState.create(line, opt, key=key, params=copies)._replace(opt_state=opt_state)
step = fdl.train_step(fdl.supervised(line, losses.mse), opt)
for _ in range(20):
    imperative_step()
    state, _ = step(state, (X, Y))
assert_close(state.params["weight"], twin.weight.detach(), rtol=0, atol=1e-12)

# %% [markdown]
# ## JAX and fdl
#
# | JAX, optax, Flax | `fdl`, `torch.func` | note |
# |---|---|---|
# | `jax.numpy` | `torch` | float32 by default in both |
# | `jax.grad`, `jax.value_and_grad` | `torch.func.grad`, `grad_and_value` | gradient first, then value |
# | `jax.vmap(f, in_axes)` | `torch.vmap(f, in_dims)` | |
# | `jax.jvp`, `vjp`, `jacrev`, `jacfwd` | the same in `torch.func` | |
# | `jax.jit(f, donate_argnums)` | `fdl.jit(f, donate_argnums=…)` | runs eagerly without it |
# | `jax.lax.scan` | `fdl.scan` | |
# | `jax.checkpoint` | `fdl.transforms.checkpoint` | |
# | `jax.lax.stop_gradient` | `fdl.transforms.stop_gradient` | `detach`, for trees |
# | `jax.random.key`, `split`, `normal` … | `fdl.random` | the same numbers |
# | `jax.tree.map` | `fdl.tree.map` | torch's pytree |
# | `optax.adam`, `chain`, `masked` | `optim.adam`, `chain`, `masked` | numbers are torch.optim's |
# | `optax.inject_hyperparams` | | rates always are in the state |
# | `flax.linen.Dense` | `nn.linear` | weight `[out, in]`, not `[in, out]` |
# | `flax` conv, `HWIO`, `NHWC` | `nn.conv2d`, `OIHW`, `NCHW` | `interop.from_flax` converts |
# | `mutable=["batch_stats"]` | `StatefulModel` | |
# | `orbax` | `fdl.checkpointing.Checkpointer` | |
#
# **The same keys give the same numbers**, so a port can be checked step by step. Bits, uniform numbers and
# permutations are equal to the last bit; normal ones nearly so, for each library computes the inverse error
# function in its own way. Below, the left half of a program in JAX and optax and the right half here.
# (Without JAX installed, the cells of the left half are skipped.)

# %%
have_jax = importlib.util.find_spec("jax") and importlib.util.find_spec("optax")
if have_jax:
    import jax
    import jax.numpy as jnp
    import optax

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                      # what JAX says about absent GPUs
        theirs = jax.random.key(0)
    a, b = jax.random.split(theirs)
    ours_a, ours_b = random.split(random.key(0))
    same = np.asarray(jax.random.uniform(a, (4,)))
    assert np.array_equal(same, random.uniform(ours_a, (4,)).numpy())
    assert np.array_equal(jax.random.permutation(b, 10), random.permutation(ours_b, 10).numpy())
    print("both draw", same)
else:
    print("JAX and optax are not installed: pip install jax optax")

# %% [markdown]
# A two-layer network on 200 points, 30 steps of momentum. **JAX:**

# %%
if have_jax:
    def jax_loss(params, x, y):
        h = jnp.tanh(x @ params["w1"] + params["b1"])
        return ((h @ params["w2"] - y) ** 2).mean()

    def jax_init(key):
        k1, k2 = jax.random.split(key)
        return {"w1": jax.random.normal(k1, (2, 16)), "b1": jnp.zeros(16),
                "w2": jax.random.normal(k2, (16, 1)) / 4}

    tx = optax.sgd(0.05, momentum=0.9)

    @jax.jit
    def jax_step(carry, batch):
        params, opt_state = carry
        value, grads = jax.value_and_grad(jax_loss)(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

# %% [markdown]
# **Here**, line for line:

# %%
def our_loss(params, x, y):
    h = torch.tanh(x @ params["w1"] + params["b1"])
    return ((h @ params["w2"] - y) ** 2).mean()

def our_init(key):
    k1, k2 = random.split(key)
    return {"w1": random.normal(k1, (2, 16)), "b1": torch.zeros(16),
            "w2": random.normal(k2, (16, 1)) / 4}

opt = optim.sgd(0.05, momentum=0.9)

def our_step(carry, batch):
    params, opt_state = carry
    grads, value = grad_and_value(our_loss)(params, *batch)
    updates, opt_state = opt.update(grads, opt_state, params)
    return (optim.apply_updates(params, updates), opt_state), value

# %%
x = random.normal(random.key(7), (30, 200, 2))
y = x[..., :1] - 2 * x[..., 1:]
params = our_init(random.key(3))
(ours, _), our_values = fdl.scan(our_step, (params, opt.init(params)), (x, y))
print("loss, first and last:", our_values[0].item(), our_values[-1].item())
assert our_values[-1] < our_values[0] / 2

if have_jax:
    start = jax_init(jax.random.key(3))
    assert tree.allclose(interop.from_jax(start), params, rtol=1e-6, atol=1e-7)
    batches = interop.to_jax((x, y))
    (end, _), values = jax.lax.scan(jax_step, (start, tx.init(start)), batches)
    # After 30 steps only the order of sums has made a difference.
    assert_close(our_values, torch.from_numpy(np.array(values)), rtol=1e-5, atol=1e-6)
    assert tree.allclose(ours, interop.from_jax(end), rtol=1e-5, atol=1e-6)

# %% [markdown]
# **Flax** keeps a dense kernel as `[in, out]`, images with the channel last, and flattens them so.
# `from_flax` turns a tree of layers; `image` says what was flattened in front of one.

# %%
if have_jax and importlib.util.find_spec("flax"):
    from flax import linen

    class Small(linen.Module):
        @linen.compact
        def __call__(self, x):                               # [batch, height, width, channel]
            x = linen.relu(linen.Conv(4, (3, 3), padding="VALID")(x))
            return linen.Dense(10)(x.reshape(len(x), -1))

    pixels = jax.random.uniform(jax.random.key(8), (5, 8, 8, 1))
    flax_params = Small().init(jax.random.key(9), pixels)
    layers = interop.from_jax(flax_params)["params"]
    small = nn.sequential(conv=nn.conv2d(1, 4, 3), relu=nn.relu, flatten=nn.flatten(),
                          dense=nn.linear(4 * 6 * 6, 10))
    turned = interop.from_flax(layers, image={"Dense_0": (4, 6, 6)},
                               names={"Conv_0": "conv", "Dense_0": "dense"})
    logits = small.apply(turned, interop.from_jax(pixels).permute(0, 3, 1, 2))
    assert_close(logits, interop.from_jax(Small().apply(flax_params, pixels)), rtol=1e-5, atol=1e-6)
    print("Flax and fdl agree on", list(logits.shape), "logits")

# %% [markdown]
# ## Exercises
# **1.** A colleague's module keeps its own count: `self.calls += 1` in `forward`. What does
# `from_module` say, and why is that better than a number that stays 0?
#
# <details><summary>Answer</summary>
#
# A pure function cannot count its calls: compiled or vmapped, how often `forward` runs is not how
# often the model is used. So it is refused, with the place. A buffer would do.
#
# ```python
# class Counting(torch.nn.Module):
#     def __init__(self):
#         super().__init__()
#         self.calls = 0
#
#     def forward(self, x):
#         self.calls += 1
#         return x
#
# counting, _, _ = interop.from_module(Counting())
# try:
#     counting.apply({}, torch.ones(1))
# except Exception as error:
#     assert "calls" in str(error)
# else:
#     raise AssertionError("it should have been refused")
# ```
#
# </details>
#
# **2.** Freeze `hidden` and train the rest of `native` with SGD. Which torch idiom is this?
#
# <details><summary>Answer</summary>
#
# `for p in net.hidden.parameters(): p.requires_grad_(False)`. Here the parameters are as they were;
# the optimizer is told.
#
# ```python
# frozen = optim.freeze(optim.sgd(0.1), "hidden.*")
# state = fdl.TrainState.create(native, frozen, key=key, params=best.params)
# small = (pictures[:64], test.y[:64])
# new, _ = fdl.train_step(fdl.supervised(native, losses.cross_entropy), frozen)(state, small)
# assert torch.equal(new.params["hidden"]["weight"], best.params["hidden"]["weight"])
# assert not torch.equal(new.params["output"]["weight"], best.params["output"]["weight"])
# ```
#
# </details>
#
# **3.** In JAX, `jax.random.split(key)` of one key in two programs gives the same children. Give each
# step of a loop a key of its own without carrying anything but the step's number.
#
# <details><summary>Answer</summary>
#
# `fold_in` mixes a number into a key; `train_step` does exactly this with `state.step`.
#
# ```python
# keys = vmap(lambda i: random.fold_in(random.key(0), i))(torch.arange(3))
# assert len({tuple(k.tolist()) for k in keys}) == 3
# ```
#
# </details>
#
# Next: [15 A small residual net](15_residual_net.ipynb)
