# %% [markdown]
# # 15 A small residual net
# Curriculum: C3
#
# **You will learn** why deep networks were hard to train and what an addition changes; how to write such
# a network as a page of maths; and how to shift and mirror images at random, inside the training
# step and still as a pure function.

# %%
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.func import grad, vmap
from torch.testing import assert_close

import fdl
import models
from fdl import data, losses, metrics, nn, optim, random, tree
from models.torch_modules import ResNet  # the imperative twin of models.resnet

plt.style.use("fdl.mplstyle")
train, test = data.fashion_mnist_sample(), data.fashion_mnist_sample(train=False)

# %% [markdown]
# ## C3 An addition
# A layer computes h ← f(h). A *residual* layer computes h ← h + f(h): it has to learn only what is to
# be corrected.
#
# **Imperative.** A module that holds the layers and adds its input.

# %%
class Residual(torch.nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)

imperative = Residual(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))

# %% [markdown]
# **Functional.** A function from a layer to a layer. It has no parameters of its own, so the paths stay.

# %%
functional = nn.residual(nn.sequential(nn.linear(8, 8), nn.tanh, nn.linear(8, 8)))
params = functional.init(random.key(0))
imperative.load_state_dict(tree.flatten_dict(params))     # same names, same shapes
x = random.normal(random.key(1), (5, 8))
assert_close(functional.apply(params, x), imperative(x), rtol=1e-6, atol=1e-6)
nothing = tree.map(torch.zeros_like, params)
assert torch.equal(functional.apply(nothing, x), x)       # weights of 0 change nothing

# %% [markdown]
# The last line is the point. A plain layer with small weights destroys its input; a residual one passes
# it on. So does the gradient: ∂(h + f(h))/∂h = 1 + f′(h), and a product of many such factors does not vanish as
# that of many f′(h) does. Stack more and more layers, and look at the gradient of the first one.

# %%
def stack(depth, wrap):
    """Layers `wrap(tanh(W h + b))` of 32 units, with torch's initial weights."""
    return nn.sequential(*[wrap(nn.sequential(nn.linear(32, 32), nn.tanh)) for _ in range(depth)])

def first_gradient(model):
    params, x = model.init(random.key(0)), random.normal(random.key(1), (64, 32))
    grads = grad(lambda p: model.apply(p, x).square().sum(1).mean())(params)
    return grads["0"]["0"]["weight"].norm().item()

depths = [1, 2, 4, 8, 16, 32]
kinds = {"plain": lambda layer: layer, "residual": nn.residual}
norms = {name: [first_gradient(stack(depth, wrap)) for depth in depths]
         for name, wrap in kinds.items()}
_, ax = plt.subplots()
for (name, values), style in zip(norms.items(), ("o--", "s-"), strict=True):
    ax.loglog(depths, values, style, label=name)
ax.set(xlabel="number of layers", ylabel="gradient of the first layer")
ax.legend()
plt.show()
assert norms["plain"][-1] < 1e-6 * norms["plain"][0]
assert norms["residual"][-1] > norms["residual"][0]

# %% [markdown]
# Thirty-two plain layers hand on less than a millionth of the gradient, and the first layers never learn.
# (The residual stack's gradient grows instead, as each block adds to h. Normalising before each
# convolution keeps that in bounds.)
#
# ### The network as a page of maths
# `models.resnet` has three residual blocks, h ← h + W₂ ∗ relu(norm(W₁ ∗ relu(norm(h)))). Norm and ReLU
# come *before* the convolution, so that nothing stands on the path of the sums. Norms keep running
# statistics, so the model has buffers: they go in and come out.

# %%
model = models.resnet(width=8)
params, buffers = model.init(random.key(0))
print(f"{tree.size(params):,} parameters, {tree.size(buffers)} numbers in buffers")
pictures = data.to_float(data.batch(train, torch.arange(64))).x
before = tree.map(torch.clone, buffers)
_, after = model.apply(params, buffers, pictures, train=True)
assert tree.diff(before, buffers) == []                   # what went in is as it was
assert after["block1"]["0"]["num_batches_tracked"] == 1

# %% [markdown]
# ## Images that are never twice the same
# A shirt that is moved by a pixel or seen in a mirror is still a shirt. To say so to a network, change the
# images of every step at random.
#
# **Imperative.** A transformation draws from a hidden generator, image by image, in worker processes
# whose seeds one must remember. **Functional.** A function of a key and a batch, in the step itself:
# the same key gives the same bits, eager, compiled and under `vmap`.

# %%
crop_key, flip_key = random.split(random.key(7))
moved = data.random_crop(crop_key, pictures, padding=3)
seen = data.random_flip(flip_key, moved)
assert torch.equal(moved, data.random_crop(crop_key, pictures, padding=3))

keys = random.split(random.key(8), 6)                     # a key for each image, as another way to call it
six = vmap(lambda key, image: data.random_crop(key, image, 3))(keys, pictures[:6])
assert torch.equal(six[4], data.random_crop(keys[4], pictures[4], 3))

_, axes = plt.subplots(2, 8, figsize=(8, 2.2))
for column in range(8):
    for row, images in enumerate((pictures, seen)):
        axes[row, column].imshow(images[column, 0].numpy())
        axes[row, column].axis("off")
plt.show()

# %% [markdown]
# By hand, a crop is an index: pixel (i, j) comes from (i + a, j + b), and a zero where there is none.

# %%
shifts = random.randint(crop_key, (64, 2), -3, 4)
for image, (a, b), new in zip(pictures[:8], shifts.tolist(), moved, strict=False):
    padded = F.pad(image, (3, 3, 3, 3))
    assert torch.equal(padded[:, 3 + a:31 + a, 3 + b:31 + b], new)

# %% [markdown]
# The loss of the model on changed images is a loss as well. `train_step` gives it a new key in each step,
# and evaluation changes nothing.

# %%
plain = fdl.supervised(model, losses.cross_entropy, {"accuracy": metrics.accuracy})

def augmented(params, buffers, batch, *, train=False, key=None):
    if train:
        crop_key, flip_key = random.split(key)
        x = data.random_flip(flip_key, data.random_crop(crop_key, batch.x, padding=2))
        batch = batch._replace(x=x)
    return plain(params, buffers, batch, train=train, key=key)

loss = fdl.StatefulLoss(augmented)

# %% [markdown]
# ## Training
# AdamW, with a rate that rises for a few steps and falls along a cosine. A rate is a function of the
# number of updates. Decay is for kernels and weights alone: biases and norms only shift and scale.
#
# **Imperative.** Two groups of parameters, and a scheduler that has to be called. **Functional.** A
# chain of functions. Four steps of both, in 64 bits, end at the same numbers.

# %%
def cosine(count, peak, warmup, total):
    return peak * (count / warmup if count < warmup else
                   (1 + math.cos(math.pi * (count - warmup) / (total - warmup))) / 2)

def adamw(peak, warmup, total):
    return optim.chain(
        optim.scale_by_adam(),
        optim.add_decayed_weights(0.05, mask=lambda path, leaf: leaf.ndim > 1),
        optim.scale_by_learning_rate(optim.schedules.warmup_cosine(peak, warmup, total)))

opt = adamw(0.01, 2, 8)
state = tree.cast(fdl.TrainState.create(model, opt, key=random.key(0)), torch.float64)
net = ResNet(width=8).double()
net.load_state_dict(tree.flatten_dict(tree.merge(state.params, state.buffers)))
groups = [{"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": 0.05},
          {"params": [p for p in net.parameters() if p.ndim == 1], "weight_decay": 0.0}]
theirs = torch.optim.AdamW(groups, lr=1.0)
scheduler = torch.optim.lr_scheduler.LambdaLR(theirs, lambda count: cosine(count, 0.01, 2, 8))
step = fdl.train_step(plain, opt)
for i in range(4):
    rows = torch.arange(32 * i, 32 * i + 32)
    x, y = train.x[rows, None].double() / 255, train.y[rows]
    theirs.zero_grad()                                    # imperative
    F.cross_entropy(net(x), y).backward()
    theirs.step()
    scheduler.step()
    state, _ = step(state, (x, y))                        # functional
end = tree.unflatten_dict({name: p.detach() for name, p in net.named_parameters()})
assert tree.allclose(state.params, end, rtol=0, atol=1e-10)
assert not tree.allclose(state.params, tree.cast(params, torch.float64), rtol=0, atol=1e-3)

# %% [markdown]
# And now on changed images, 60 steps of 100. (A few steps on a tenth of the images, without compiling,
# show the way; `python -m train resnet-small` goes it, and the README has the accuracy.)

# %%
steps = 60
opt = adamw(0.01, 6, steps)
state = fdl.TrainState.create(model, opt, key=random.key(0))
step, score = fdl.train_step(loss, opt), fdl.eval_step(loss)
order, curve = data.epoch_indices(random.key(1), len(train.x), 100), []
for row in zip(*order, strict=True):
    state, found = step(state, data.to_float(data.batch(train, row)))
    curve.append(found["loss"].value.item())
whole = tree.map(lambda leaf: leaf[0], data.sequential_indices(len(test.x), len(test.x)))
accuracy = score(state, data.to_float(data.batch(test, whole)))["accuracy"].value.item()
print(f"test accuracy after one pass over the sample: {accuracy:.3f}")

_, ax = plt.subplots()
ax.plot(curve, label="loss of the batch")
rates = 100 * optim.schedules.warmup_cosine(0.01, 6, steps)(torch.arange(steps))
ax.plot(rates, ":", label="100 × learning rate")
ax.set(xlabel="step")
ax.legend()
plt.show()
assert accuracy > 0.6 and sum(curve[-10:]) < 0.6 * sum(curve[:10])

# %% [markdown]
# ## Exercises
# **1.** Draw the last kernel of every block as zeros. What does the network compute at the start, and
# what is the gradient of the kernel before it?
#
# <details><summary>Answer</summary>
#
# Every block passes its input on, so the network starts as a shallow one. The kernel before a zero
# kernel has no gradient in the first step; the zero kernel itself has one, and after that both learn.
#
# ```python
# zero = tree.map(torch.clone, params)
# zero["block2"]["5"]["weight"] = torch.zeros_like(zero["block2"]["5"]["weight"])
# batch = data.Batch(pictures, train.y[:64])
# grads = grad(lambda p: plain(p, buffers, batch, train=True)[0])(zero)
# assert (grads["block2"]["2"]["weight"] == 0).all()
# assert (grads["block2"]["5"]["weight"] != 0).any()
# ```
#
# </details>
#
# **2.** Average the predictions over eight random changes of each test image. How many keys does it take?
#
# <details><summary>Answer</summary>
#
# Eight, and `vmap` over them: every image gets a draw of its own from each.
#
# ```python
# x = data.to_float(data.batch(test, torch.arange(100))).x
#
# def probabilities(key):
#     logits, _ = model.apply(state.params, state.buffers, data.random_crop(key, x, 1))
#     return logits.softmax(1)
#
# mean = vmap(probabilities)(random.split(random.key(3), 8)).mean(0)
# assert mean.shape == (100, 10) and (mean.argmax(1) == test.y[:100]).double().mean() > 0.5
# ```
#
# </details>
#
# Next: [16 Sequences: GRU and attention](16_sequences.ipynb)
