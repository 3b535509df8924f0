# %% [markdown]
# # 06 Multilayer perceptrons
# Curriculum: M1
#
# **You will learn** what a hidden layer adds to a linear model and why it needs an activation
# function; and how to train a perceptron with 256 hidden units on all of Fashion-MNIST, an epoch
# being one compiled program.

# %%
from collections import OrderedDict

import matplotlib.pyplot as plt
import torch
from torch.func import grad, grad_and_value, vmap
from torch.testing import assert_close

import fdl
import models
from fdl import data, losses, metrics, nn, optim, random, tree

plt.style.use("fdl.mplstyle")

# %% [markdown]
# ## Two linear layers are one
# A second linear layer alone buys nothing, since (xW₁ᵀ + b₁)W₂ᵀ + b₂ is again of the form
# xWᵀ + b:

# %%
DOUBLE = torch.float64
two = nn.sequential(nn.linear(784, 256), nn.linear(256, 10))
p = tree.cast(two.init(random.key(0)), DOUBLE)
x = random.uniform(random.key(1), (5, 784), dtype=DOUBLE)

one = {"weight": p["1"]["weight"] @ p["0"]["weight"],
       "bias": p["1"]["weight"] @ p["0"]["bias"] + p["1"]["bias"]}
assert_close(nn.linear(784, 10).apply(one, x), two.apply(p, x), rtol=0, atol=1e-12)

# %% [markdown]
# ## Activation functions and their gradients
# So something that is not linear has to stand between: an *activation function*, applied to each
# number alone. Training goes along its derivative, which `grad` gives at one point and `vmap` at
# all points.
#
# **Imperative.** A scalar is needed to go backward from, so the values are summed; the derivatives
# appear in the argument.

# %%
z = torch.linspace(-5, 5, 201)
z_leaf = z.clone().requires_grad_()
torch.sigmoid(z_leaf).sum().backward()

# %% [markdown]
# **Functional.** The derivative is a function like any other.

# %%
slope = vmap(grad(torch.sigmoid))
assert_close(slope(z), z_leaf.grad)

_, axes = plt.subplots(1, 2, figsize=(6, 2.6), sharex=True)
for f, style in ((nn.relu, "-"), (nn.sigmoid, "--"), (nn.tanh, "-."), (nn.gelu, ":")):
    axes[0].plot(z, f(z), style, label=f.__name__)
    axes[1].plot(z, vmap(grad(f))(z), style, label=f.__name__)
axes[0].set(xlabel="z", ylabel="f(z)", ylim=(-1.3, 3))
axes[1].set(xlabel="z", ylabel="derivative of f")
axes[0].legend()
plt.show()

# %% [markdown]
# The sigmoid's derivative is at most 1/4 and almost 0 far out: through several such layers little
# of a gradient is left. That of ReLU, max(z, 0), is 1 wherever the unit is active.

# %%
assert slope(torch.zeros(1)) == 0.25
print(f"sigmoid's derivative at 5: {slope(torch.tensor([5.0])).item():.4f}")

# %% [markdown]
# ## What a hidden unit does
# With ReLU each hidden unit folds the plane along one line: on one side it is 0, on the other it
# rises. Here points inside a circle are to be told from those outside. One or two lines cannot
# enclose anything, three can, and more come closer to the circle. For each width eight seeds are
# trained at once (notebook 12 is about that), and the best is shown.

# %%
points = random.uniform(random.key(2), (400, 2), minval=-1, maxval=1)
inside = (points.square().sum(1) < 0.5).long()
opt = optim.adam(0.05)

def fit(width, steps=300):
    model = nn.sequential(nn.linear(2, width), nn.relu, nn.linear(width, 2))
    loss = fdl.supervised(model, losses.cross_entropy, {"accuracy": metrics.accuracy})
    step = vmap(fdl.train_step(loss, opt), in_dims=(0, None))
    states = fdl.population.create(model, opt, random.split(random.key(width), 8))
    for _ in range(steps):
        states, found = step(states, (points, inside))
    best = fdl.population.best(states, found["loss"].value)
    return model, best.params, found["accuracy"].value.max().item()

fits = {width: fit(width) for width in (1, 2, 3, 16)}

# %%
line = torch.linspace(-1, 1, 100)
grid = torch.cartesian_prod(line, line)
_, axes = plt.subplots(1, 4, figsize=(7, 2.2), sharey=True)
for ax, (width, (model, params, right)) in zip(axes, fits.items(), strict=True):
    p_inside = model.apply(params, grid).softmax(1)[:, 1].view(100, 100)
    ax.contourf(line, line, p_inside.T, levels=10, cmap="RdBu_r", alpha=0.7)
    for label, marker, color in ((0, "x", "navy"), (1, "o", "darkred")):
        ax.plot(*points[inside == label][:100].T, marker, color=color, markersize=2.5)
    ax.set(title=f"{width} hidden: {right:.0%}", aspect="equal", xticks=[], yticks=[])
    ax.grid(False)
plt.show()

# %%
accuracies = [right for _, _, right in fits.values()]
assert accuracies[0] < 0.85 < accuracies[2] and accuracies[3] > 0.93

# %% [markdown]
# ## M1 The perceptron 784–256–10, from scratch
# h = relu(xW₁ᵀ + b₁), o = hW₂ᵀ + b₂, weights drawn from N(0, 0.01²), biases 0. Both ways start from
# the same numbers and take the same 24 batches in float64.

# %%
layers = {"hidden": (256, 784), "output": (10, 256)}
start = {
    name: {"weight": 0.01 * random.normal(random.fold_in(random.key(0), i), shape, DOUBLE),
           "bias": torch.zeros(shape[0], dtype=DOUBLE)}
    for i, (name, shape) in enumerate(layers.items())
}
sample = data.fashion_mnist_sample()
order = data.epoch_indices(random.key(1), n=len(sample.x), batch_size=256, drop_last=True)
batches = [data.to_float(data.batch(sample, row)) for row in zip(*order, strict=True)]
batches = [(batch.x.double(), batch.y) for batch in batches]
print(tree.summary(start))

# %% [markdown]
# **Imperative.** The layers of an `nn.Sequential` are named through an ordered dict. The loss's
# gradients pile up in `.grad`, and the optimizer changes the parameters where they are.

# %%
net = torch.nn.Sequential(OrderedDict(
    flatten=torch.nn.Flatten(),
    hidden=torch.nn.Linear(784, 256),
    act=torch.nn.ReLU(),
    output=torch.nn.Linear(256, 10),
)).double()
net.load_state_dict(tree.flatten_dict(start))       # its names are the paths of our tree
sgd = torch.optim.SGD(net.parameters(), lr=0.5)
imperative = []
for x, y in batches:
    sgd.zero_grad()
    loss = torch.nn.functional.cross_entropy(net(x), y)
    loss.backward()
    sgd.step()
    imperative.append(loss.item())

# %% [markdown]
# **Functional.** The model is a function of parameters and images, a step a function from
# parameters to parameters.

# %%
def mlp(params, x):
    hidden, output = params["hidden"], params["output"]
    h = (x.flatten(1) @ hidden["weight"].T + hidden["bias"]).clamp(min=0)
    return h @ output["weight"].T + output["bias"]

def scratch_step(params, x, y, lr=0.5):
    def objective(params):
        return losses.cross_entropy(mlp(params, x), y)
    grads, value = grad_and_value(objective)(params)
    return tree.map(lambda p, g: p - lr * g, params, grads), value

params, functional = start, []
for x, y in batches:
    params, value = scratch_step(params, x, y)
    functional.append(value.item())
assert_close(functional, imperative, rtol=0, atol=1e-12)
assert_close(tree.flatten_dict(params), dict(net.state_dict()), rtol=0, atol=1e-12)

# %% [markdown]
# `start` is still what it was, so a run can be repeated or compared with its beginning at any
# time. The other way round, the module's start is gone.

# %%
moved = tree.map(lambda a, b: (a - b).norm().item(), params, start)
print({path: round(distance, 3) for path, distance in tree.flatten_dict(moved).items()})

# %% [markdown]
# ## M1 The concise version
# `nn.sequential` takes layers by name as well, and any function is a layer. `models.mlp` is this
# for any list of widths. Its names are other ones, so the same start is given to it under those.

# %%
dense = {"weight_init": nn.init.normal(0.01), "bias_init": nn.init.zeros}
concise = nn.sequential(
    flatten=nn.flatten(),
    hidden=nn.linear(784, 256, **dense),
    act=nn.relu,
    output=nn.linear(256, 10, **dense),
)
model = models.mlp()                # 784–256–10, N(0, 0.01²)
opt = optim.sgd(lr=0.5)
print(list(tree.flatten_dict(model.init(random.key(0)))))

# %%
def run(model, params):
    step = fdl.train_step(fdl.supervised(model, losses.cross_entropy), opt)
    state = fdl.TrainState.create(model, opt, key=random.key(0), params=params)
    for batch in batches:
        state, _ = step(state, batch)
    return state.params

for path, leaf in tree.flatten_dict(run(concise, start)).items():
    assert_close(leaf, net.state_dict()[path], rtol=0, atol=1e-12)
again = run(model, {"hidden0": start["hidden"], "output": start["output"]})
assert_close(again["hidden0"], params["hidden"], rtol=0, atol=1e-12)

# %% [markdown]
# ## M1 Training on all of Fashion-MNIST
# The loop over 235 batches is `fdl.scan`, and `fdl.jit` makes one program of it: Python is called
# once for an epoch. `donate_argnums=0` lets the new state take the memory of the old one. The
# program is compiled at the first call; the epochs after that only run it.

# %%
train, test = data.fashion_mnist(), data.fashion_mnist(train=False)
loss = fdl.supervised(model, losses.cross_entropy, {"accuracy": metrics.accuracy})
step, evaluate = fdl.train_step(loss, opt), fdl.eval_step(loss)

def epoch(state, train, order):
    return fdl.scan(lambda state, row: step(state, data.to_float(data.batch(train, row))), state, order)

compiled = fdl.jit(epoch, donate_argnums=0)
everything = data.Batch(test.x[:, None].float() / 255, test.y)
state, history = fdl.TrainState.create(model, opt, key=random.key(0)), []
for number in range(10):
    order = data.epoch_indices(random.fold_in(random.key(1), number), 60_000, 256)
    state, found = compiled(state, train, order)
    held_out = evaluate(state, everything)["accuracy"].value.item()
    history.append([found[m].sum().value.item() for m in ("loss", "accuracy")] + [held_out])

# %%
for number in (0, 4, 9):
    print("epoch {:2}: loss {:.3f}, train accuracy {:.3f}, test accuracy {:.3f}".format(
        number + 1, *history[number]))
print(compiled.report()[0].route, "for", len(compiled.report()), "form of the arguments")
assert history[9][0] < 0.33 and max(row[2] for row in history) > 0.83

# %%
loss_curve, train_curve, test_curve = zip(*history, strict=True)
epochs = range(1, 11)
_, axes = plt.subplots(1, 2, figsize=(6, 2.5))
axes[0].plot(epochs, loss_curve, "o-")
axes[0].set(xlabel="epoch", ylabel="mean loss", xticks=range(2, 11, 2))
axes[1].plot(epochs, train_curve, "o-", label="training, while it changes")
axes[1].plot(epochs, test_curve, "s--", label="test, after the epoch")
axes[1].set(xlabel="epoch", ylabel="accuracy", xticks=range(2, 11, 2), ylim=(0.55, 0.9))
axes[1].legend(loc="lower right")
plt.show()

# %% [markdown]
# At lr 0.5 the test accuracy jumps from epoch to epoch. Over three seeds the tenth epoch's mean is
# 0.857, where softmax regression has 0.829 (the README's table). What the hidden layer looks for:
# the pixels' weights of the 16 units with the largest ones, red for a pixel that excites.

# %%
weight = state.params["hidden0"]["weight"]
strongest = weight.norm(dim=1).topk(16).indices
_, axes = plt.subplots(2, 8, figsize=(6, 1.8))
for ax, row in zip(axes.flat, weight[strongest], strict=True):
    ax.imshow(row.view(28, 28).numpy(), cmap="RdBu_r", vmin=-0.3, vmax=0.3)
    ax.axis("off")
plt.show()

# %% [markdown]
# ## Exercises
# **1.** Start with all weights 0 instead of N(0, 0.01²). What does the gradient of the hidden
# layer look like, and why does nothing ever change that?
#
# <details><summary>Answer</summary>
#
# With h = 0 the output weights get no gradient, and with output weights 0 nothing flows back to
# the hidden layer. Only the last bias can learn. If all weights were the same number other than 0, all
# hidden units would stay copies of each other: random weights break that symmetry.
#
# ```python
# x, y = batches[0]
# zero = tree.map(torch.zeros_like, start)
# grads = grad(lambda p: losses.cross_entropy(mlp(p, x), y))(zero)
# assert not grads["hidden"]["weight"].any() and not grads["output"]["weight"].any()
# assert grads["output"]["bias"].any()
# ```
#
# </details>
#
# **2.** A hidden unit that is 0 on all images learns nothing any more: it is *dead*. How many of
# the 256 are?
#
# <details><summary>Answer</summary>
#
# ```python
# hidden = nn.linear(784, 256).apply(state.params["hidden0"], everything.x.flatten(1))
# dead = (hidden <= 0).all(0)
# print(int(dead.sum()), "of 256")
# objective = grad(lambda p: losses.cross_entropy(model.apply(p, everything.x), everything.y))
# assert not objective(state.params)["hidden0"]["weight"][dead].any()
# ```
#
# </details>
#
# **3.** Swap two hidden units: the rows of W₁ and b₁ and the columns of W₂. What happens to the
# outputs?
#
# <details><summary>Answer</summary>
#
# Nothing: the order of hidden units has no meaning, so each such network is one of 256! that compute the same.
#
# ```python
# swap = random.permutation(random.key(3), 256)
# hidden, output = start["hidden"], start["output"]
# twin = {"hidden": tree.map(lambda leaf: leaf[swap], hidden),
#         "output": {**output, "weight": output["weight"][:, swap]}}
# assert_close(mlp(twin, x), mlp(start, x), rtol=0, atol=1e-12)
# ```
#
# </details>
#
# Next: [07 Weight decay and dropout](07_weight_decay_and_dropout.ipynb)
