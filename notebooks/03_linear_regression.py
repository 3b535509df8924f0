# %% [markdown]
# # 03 Linear regression
# Curriculum: L1, L2, L3, L4
#
# **You will learn** a whole training run on the smallest model there is, first with nothing but
# tensors, then with layers and optimizers; and that a step of training is a function from one state
# to the next, which you can print.

# %%
from collections import OrderedDict

import matplotlib.pyplot as plt
import torch
from torch.func import grad
from torch.testing import assert_close

import fdl
from fdl import data, losses, nn, optim, random, tree

plt.style.use("fdl.mplstyle")
DOUBLE = torch.float64      # so that a difference of two ways is no rounding

# %% [markdown]
# ## L1 From scratch
# 1,000 examples of y = x·w + b + ε with w = (2, −3.4), b = 4.2, features from N(0, 1) and noise
# ε from N(0, 0.01²). The task: find w and b from the examples.

# %%
data_key, init_key, shuffle_key = random.split(random.key(0), 3)
true_w, true_b = torch.tensor([2.0, -3.4], dtype=DOUBLE), 4.2
train = data.synthetic_linear(data_key, true_w, true_b, n=1000, noise=0.01)

_, axes = plt.subplots(1, 2, figsize=(6, 2.6), sharey=True)
for i, ax in enumerate(axes):
    ax.plot(train.x[:, i], train.y, ".", markersize=3)
    ax.set(xlabel=f"feature {i + 1}")
axes[0].set(ylabel="y")
plt.show()

# %% [markdown]
# y rises with the first feature and falls with the second. Each cloud is wide since the other
# feature moves y too, not because of the noise, which is far too small to see.
#
# Both ways below start from the same weights, w from N(0, 0.01²) and b = 0, and take the same
# batches of 10: three epochs, each an array of indices of shape [100, 10].

# %%
batch_size, lr, epochs = 10, 0.03, 3
start = {"w": 0.01 * random.normal(init_key, (2,), DOUBLE),
         "b": torch.zeros((), dtype=DOUBLE)}
orders = [data.epoch_indices(random.fold_in(shuffle_key, epoch), 1000, batch_size).index
          for epoch in range(epochs)]

# %% [markdown]
# **Imperative.** Two flagged tensors, `backward`, an update in place that must not be recorded, and
# gradients to zero. The loss of an example is ½(ŷ − y)².

# %%
w, b = start["w"].clone().requires_grad_(), start["b"].clone().requires_grad_()
imperative = []
for index in torch.cat(orders):
    x, y = train.x[index], train.y[index, 0]
    loss = ((x @ w + b - y) ** 2 / 2).mean()
    loss.backward()
    with torch.no_grad():
        w -= lr * w.grad
        b -= lr * b.grad
        w.grad.zero_()
        b.grad.zero_()
    imperative.append(loss.item())

# %% [markdown]
# **Functional.** The model, the loss and the step are three functions. A step takes parameters and
# returns parameters; what it does not return has not changed.

# %%
def predict(params, x):
    return x @ params["w"] + params["b"]

def mean_loss(params, x, y):
    return ((predict(params, x) - y) ** 2 / 2).mean()

def sgd_step(params, x, y):
    grads = grad(mean_loss)(params, x, y)
    return tree.map(lambda p, g: p - lr * g, params, grads)

# %%
params, functional = start, []
for index in torch.cat(orders):
    x, y = train.x[index], train.y[index, 0]
    functional.append(mean_loss(params, x, y).item())
    params = sgd_step(params, x, y)

assert_close(functional, imperative, rtol=0, atol=1e-12)
assert_close([params["w"], params["b"]], [w.detach(), b.detach()], rtol=0, atol=1e-12)
assert_close(params["w"], true_w, rtol=0, atol=0.01)
print("w:", [round(w, 4) for w in params["w"].tolist()], " b:", round(params["b"].item(), 4))

# %% [markdown]
# What it buys: `start` is still the start. So the run can be replayed, from there or from any state
# one has kept, with other rates or with more to look at. Here again, with the loss over all 1,000
# examples after each epoch:

# %%
again = start
for epoch, order in enumerate(orders, start=1):
    for index in order:
        again = sgd_step(again, train.x[index], train.y[index, 0])
    whole = mean_loss(again, train.x, train.y[:, 0])
    print(f"epoch {epoch}: loss {whole:.6f}")
assert torch.equal(again["w"], params["w"])          # the same bits

# %%
_, axes = plt.subplots(1, 2, figsize=(6, 2.6))
axes[0].semilogy(functional)
axes[0].axhline(0.5 * 0.01**2, color="k", linestyle=":", label="½σ², the noise")
axes[0].set(xlabel="step", ylabel="loss of the batch")
axes[0].legend()
for name, guess, style in (("start", start, "x"), ("end", params, ".")):
    axes[1].plot(train.y[:200, 0], predict(guess, train.x[:200]), style, label=name)
axes[1].axline((0, 0), slope=1, color="k", linestyle=":")
axes[1].set(xlabel="y", ylabel="prediction ŷ")
axes[1].legend()
plt.show()

# %% [markdown]
# The loss falls to about half the variance of the noise, and no further: that part of y no model
# can predict.
#
# Two public editions of the course print such figures too, and three of their four runs tell the
# same story (quoted; other random numbers):
#
# | | after epochs 1, 2, 3 | what it is | floor |
# |---|---|---|---|
# | zh.d2l.ai, scratch | 0.042790, 0.000162, 0.000051 | as here | ½σ² = 0.00005 |
# | ShusenTang, scratch | 0.028127, 0.000095, 0.000050 | as here | ½σ² |
# | zh.d2l.ai, concise | 0.000248, 0.000103, 0.000103 | without the ½ (see L2) | σ² = 0.0001 |
# | ShusenTang, concise | 0.000457, 0.000081, 0.000198 | without the ½, last batch only | none |
#
# The fourth rises at the end because it is the loss of ten examples, which is mostly luck.
#
# ### The gradient by hand
# With the residual r = Xw + b − y of a batch of B examples, the gradient is Xᵀr / B for w and the
# mean of r for b. `grad` finds it, and this is the check:

# %%
residual = x @ start["w"] + start["b"] - y
grads = grad(mean_loss)(start, x, y)
assert_close(grads["w"], x.T @ residual / batch_size, rtol=0, atol=1e-12)
assert_close(grads["b"], residual.mean(), rtol=0, atol=1e-12)

# %% [markdown]
# ## The closed form
# For this one model no steps are needed. Where the gradient over all examples is 0, the parameters
# solve the normal equations (XᵀX) θ = Xᵀy, with a column of ones in X for the bias. Note how near
# 300 steps of batches of ten came.

# %%
with_ones = torch.cat([train.x, torch.ones(1000, 1, dtype=DOUBLE)], dim=1)
theta = torch.linalg.solve(with_ones.T @ with_ones, with_ones.T @ train.y)[:, 0]
best = {"w": theta[:2], "b": theta[2]}
at_best = grad(mean_loss)(best, train.x, train.y[:, 0])
assert max(g.abs().max() for g in tree.leaves(at_best)) < 1e-12
distance = (params["w"] - best["w"]).norm()
print(f"distance of SGD's w from the best: {distance:.4f}, from the true w: "
      f"{(params['w'] - true_w).norm():.4f}")

# %% [markdown]
# ## L2 The concise version
# **Imperative.** Layers that hold their parameters, in three ways of naming them, initialised in
# place.

# %%
net = torch.nn.Sequential(torch.nn.Linear(2, 1)).double()           # "0.weight"
other = torch.nn.Sequential()
other.add_module("linear", torch.nn.Linear(2, 1))                   # "linear.weight"
third = torch.nn.Sequential(OrderedDict([("linear", torch.nn.Linear(2, 1))]))
assert list(other.state_dict()) == ["linear.weight", "linear.bias"]
assert list(third.state_dict()) == ["linear.weight", "linear.bias"]

torch.nn.init.normal_(net[0].weight, mean=0.0, std=0.01)
torch.nn.init.constant_(net[0].bias, 0.0)
net

# %% [markdown]
# **Functional.** A model is a pair of functions, `init: key → params` and
# `apply: (params, x) → ŷ`. How a weight is drawn is an argument of its layer. Names come by
# position or by keyword, and they are those of `state_dict()`.

# %%
linear = nn.linear(2, 1, weight_init=nn.init.normal(0.01), bias_init=nn.init.zeros)
model = nn.sequential(linear)                     # paths "0.weight", "0.bias"
named = nn.sequential(linear=linear)              # paths "linear.weight", "linear.bias"
drawn = tree.cast(model.init(init_key), DOUBLE)

assert list(tree.flatten_dict(drawn)) == list(net.state_dict())
assert list(tree.flatten_dict(named.init(init_key))) == list(third.state_dict())

# %% [markdown]
# Now both train on the mean squared error with SGD. (Mind the factor: (ŷ − y)² has twice the
# gradient of ½(ŷ − y)², so at the same rate this learns twice as fast, and its floor is σ².)
#
# `fdl.supervised` makes a loss of a model and a batch, `fdl.train_step` makes the step, and
# `TrainState` is everything that training changes.

# %%
opt = optim.sgd(lr=0.03)
step = fdl.train_step(fdl.supervised(model, losses.mse), opt)
state = fdl.TrainState.create(model, opt, key=init_key, params=drawn)
net.load_state_dict(tree.flatten_dict(drawn))

batches = [data.Batch(train.x[index], train.y[index]) for index in torch.cat(orders)]
sgd = torch.optim.SGD(net.parameters(), lr=0.03)
for batch in batches:
    loss = torch.nn.functional.mse_loss(net(batch.x), batch.y)      # imperative
    sgd.zero_grad()
    loss.backward()
    sgd.step()

    state, metrics = step(state, batch)                             # functional
    assert abs(metrics["loss"].value - loss.item()) < 1e-12
assert tree.allclose(state.params, tree.unflatten_dict(dict(net.named_parameters())),
                     rtol=0, atol=1e-12)

# %% [markdown]
# ### A step, seen from outside
# The state is a tree, so "what does a step change?" has a complete answer: this table.

# %%
before = fdl.TrainState.create(model, opt, key=init_key, params=drawn)
after, _ = step(before, batches[0])

def show(leaf):
    digits = ".4g" if leaf.is_floating_point() else "d"
    return " ".join(f"{value:{digits}}" for value in leaf.flatten().tolist())

afterwards = tree.flatten_dict(after)
print(f"{'':26}{'before':24}after")
for path, leaf in tree.flatten_dict(before).items():
    print(f"{path:26}{show(leaf):24}{show(afterwards[path])}")

# %% [markdown]
# Parameters and counts have moved; the rate and the key have not. Nothing else exists: no mode
# flag, no hidden generator, no gradient buffer. Save this tree, and the run is saved.

# %% [markdown]
# ## L3 Different rates for different parts
# **Imperative.** Parameter groups, each with options of its own. **Functional.** An optimizer for
# each label, and for each label the paths it covers; a path that no label covers is an error.

# %%
def two_layers():
    return torch.nn.Sequential(OrderedDict(
        body=torch.nn.Linear(2, 4), head=torch.nn.Linear(4, 1))).double()

model = nn.sequential(body=nn.linear(2, 4), head=nn.linear(4, 1))
drawn = tree.cast(model.init(init_key), DOUBLE)

# %%
def twins(make_sgd, opt, between=lambda step, sgd, state: state):
    """Train both on the same batches; return the largest difference of any parameter."""
    net = two_layers()
    net.load_state_dict(tree.flatten_dict(drawn))
    sgd = make_sgd(net)
    step = fdl.train_step(fdl.supervised(model, losses.mse), opt)
    state = fdl.TrainState.create(model, opt, key=init_key, params=drawn)
    for i, batch in enumerate(batches[:60]):
        state = between(i, sgd, state)
        sgd.zero_grad()
        torch.nn.functional.mse_loss(net(batch.x), batch.y).backward()
        sgd.step()
        state, _ = step(state, batch)
    module = dict(net.named_parameters())
    return max((leaf - module[path]).abs().max().item()
               for path, leaf in tree.flatten_dict(state.params).items())

# %%
def groups(net):
    return torch.optim.SGD([{"params": net.body.parameters(), "lr": 0.003},
                            {"params": net.head.parameters()}], lr=0.03)

parts = optim.multi_transform({"slow": optim.sgd(lr=0.003), "fast": optim.sgd(lr=0.03)},
                              {"slow": "body.*", "fast": "head.*"})
assert twins(groups, parts) < 1e-12

# %% [markdown]
# ### L3 A rate that changes while training
# **Imperative.** A scheduler object that edits the optimizer after each step, or an assignment to
# its options by hand. **Functional.** A rate may be a *schedule*, a function of the number of
# updates done. Or it is a number in the state: `with_hyperparams` returns the state with another.

# %%
def stepped(net):                     # the scheduler's step is hooked to the optimizer's
    sgd = torch.optim.SGD(net.parameters(), lr=0.03)
    scheduler = torch.optim.lr_scheduler.StepLR(sgd, step_size=20, gamma=0.1)
    sgd.register_step_post_hook(lambda *_: scheduler.step())
    return sgd

schedule = optim.schedules.step(0.03, step_size=20, gamma=0.1)
assert twins(stepped, optim.sgd(lr=schedule)) < 1e-12
counts = torch.tensor([0.0, 20.0, 40.0], dtype=DOUBLE)
print("rate after 0, 20 and 40 updates:", [f"{rate:g}" for rate in schedule(counts).tolist()])

# %%
def drop_at_30(step, sgd, state):
    if step != 30:
        return state
    sgd.param_groups[0]["lr"] = 0.001                                     # imperative
    changed = optim.with_hyperparams(state.opt_state, lr=0.001)           # functional
    return state._replace(opt_state=changed)

def plain(net):
    return torch.optim.SGD(net.parameters(), lr=0.03)

assert twins(plain, optim.sgd(lr=0.03), between=drop_at_30) < 1e-12

# %% [markdown]
# A rate in the state is a tensor like the parameters. So one can `vmap` over it, and train with
# many rates at once: here 200 runs of 100 steps in one loop of 100 steps.

# %%
model = nn.sequential(linear)
opt = optim.sgd(lr=0.03)
step = fdl.train_step(fdl.supervised(model, losses.mse), opt)
rates = torch.logspace(-4, 0.3, 200)
states = fdl.population.create(model, opt, random.split(init_key, 200), {"lr": rates})
curve = []
for batch in tree.cast(batches[:100], torch.float32):
    states, metrics = torch.vmap(step, in_dims=(0, None))(states, batch)
    curve.append(metrics["loss"].value)
last = torch.stack(curve)[-20:].mean(0)

_, ax = plt.subplots(figsize=(6, 2.6))
ax.loglog(rates, last)
ax.axvline(0.03, color="k", linestyle=":", label="0.03")
ax.set(xlabel="learning rate", ylabel="mean loss, last 20 steps", ylim=(3e-5, 1e3))
ax.legend()
plt.show()

# %% [markdown]
# Below 0.01 a hundred steps are too few; near 1 each step overshoots, and the loss explodes.

# %% [markdown]
# ## L4 A worked instance, with weight decay
# Three features, w = (1, −1, 2), b = 5, 1,000 examples, batches of 50, `SGD(lr=0.03,
# weight_decay=0.1)`, 30 epochs. `weight_decay=λ` adds λθ to the gradient of *every* parameter, the
# bias included; that is the gradient of ½λ‖θ‖². So the run ends near the minimum of
#
# `mean of (ŷ − y)² + ½ λ ‖θ‖²`
#
# which has a closed form, ridge regression: `(2/n · XᵀX + λI) θ = 2/n · Xᵀy`.

# %%
truth = torch.tensor([1.0, -1.0, 2.0], dtype=DOUBLE)
train = data.synthetic_linear(random.key(1), truth, 5.0, n=1000, noise=0.01)
model, opt = nn.linear(3, 1), optim.sgd(lr=0.03, weight_decay=0.1)
drawn = tree.cast(model.init(random.key(2)), DOUBLE)
state = fdl.TrainState.create(model, opt, key=random.key(3), params=drawn)
step = fdl.train_step(fdl.supervised(model, losses.mse), opt)

net = torch.nn.Linear(3, 1).double()
net.load_state_dict(drawn)
sgd = torch.optim.SGD(net.parameters(), lr=0.03, weight_decay=0.1)

# %%
for epoch in range(30):
    order = data.epoch_indices(random.fold_in(random.key(4), epoch), 1000, 50)
    for indices in zip(*order, strict=True):
        batch = data.batch(train, indices)
        sgd.zero_grad()
        torch.nn.functional.mse_loss(net(batch.x), batch.y).backward()
        sgd.step()
        state, _ = step(state, batch)
assert_close(state.params["weight"], net.weight.detach(), rtol=0, atol=1e-12)
assert_close(state.params["bias"], net.bias.detach(), rtol=0, atol=1e-12)

# %%
n, decay, ones = 1000, 0.1, torch.ones(1000, 1, dtype=DOUBLE)
X = torch.cat([train.x, ones], dim=1)
eye = torch.eye(4, dtype=DOUBLE)
ridge = torch.linalg.solve(2 / n * X.T @ X + decay * eye, 2 / n * X.T @ train.y)[:, 0]
found = torch.cat([state.params["weight"][0], state.params["bias"]])
print("true :", [*truth.tolist(), 5.0])
print("ridge:", [round(value, 3) for value in ridge.tolist()])
print("SGD  :", [round(value, 3) for value in found.tolist()])
assert_close(found, ridge, rtol=0, atol=0.05)

# %% [markdown]
# Decay pulls every parameter towards 0 by about 5 %: the price, here, where 1,000 examples leave
# nothing to overfit. Notebook 07 shows a problem where it pays.

# %% [markdown]
# ## Exercises
# **1.** Train on ½(ŷ − y)² with lr = 0.06 instead of (ŷ − y)² with lr = 0.03. Which numbers change?
#
# <details><summary>Answer</summary>
#
# The printed loss halves. The parameters do not change: the halved gradient meets a doubled rate,
# and both factors are powers of two, so even the rounding is the same.
#
# ```python
# model, batch = nn.linear(3, 1), data.Batch(train.x[:50], train.y[:50])
# ends = []
# for criterion, lr in ((losses.mse, 0.03), (losses.squared_loss, 0.06)):
#     opt = optim.sgd(lr=lr)
#     state = fdl.TrainState.create(model, opt, key=random.key(0), params=drawn)
#     step = fdl.train_step(fdl.supervised(model, criterion), opt)
#     for _ in range(10):
#         state, _ = step(state, batch)
#     ends.append(state.params)
# assert tree.allclose(*ends, rtol=0, atol=1e-14)
# ```
#
# </details>
#
# **2.** Decay only the weights, not the bias. What does the bias become?
#
# <details><summary>Answer</summary>
#
# `add_decayed_weights` takes a mask, a glob on paths. The bias then comes back to 5, but for what
# the shrunken weights leave over.
#
# ```python
# opt = optim.chain(optim.add_decayed_weights(0.1, mask="weight"), optim.sgd(lr=0.03))
# state = fdl.TrainState.create(nn.linear(3, 1), opt, key=random.key(0), params=drawn)
# step = fdl.train_step(fdl.supervised(nn.linear(3, 1), losses.mse), opt)
# for _ in range(300):
#     state, _ = step(state, data.Batch(*train))
# assert abs(state.params["bias"].item() - 5) < 0.05
# ```
#
# </details>
#
# **3.** Write `sgd_step` with momentum 0.9 as a function `(params, velocity, x, y) → (params,
# velocity)`, and check it against `torch.optim.SGD`.
#
# <details><summary>Answer</summary>
#
# ```python
# def momentum_step(params, velocity, x, y):
#     grads = grad(mean_loss)(params, x, y)
#     velocity = tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
#     return tree.map(lambda p, v: p - 0.03 * v, params, velocity), velocity
#
# w, b = start["w"].clone().requires_grad_(), start["b"].clone().requires_grad_()
# sgd = torch.optim.SGD([w, b], lr=0.03, momentum=0.9)
# params, velocity = start, tree.map(torch.zeros_like, start)
# for batch in batches[:50]:
#     params, velocity = momentum_step(params, velocity, batch.x, batch.y[:, 0])
#     sgd.zero_grad()
#     mean_loss({"w": w, "b": b}, batch.x, batch.y[:, 0]).backward()
#     sgd.step()
# assert_close(params["w"], w.detach(), rtol=0, atol=1e-12)
# ```
#
# </details>
#
# Next: [04 Fashion-MNIST](04_fashion_mnist.ipynb)
