# %% [markdown]
# # 12 Many models at once
#
# **You will learn** that a population of models is one state with one more axis, trained by the step
# you already have under `vmap`; and what that is good for: sweeps over learning rates and seeds,
# ensembles, and bagging.

# %%
import statistics
import time

import matplotlib.pyplot as plt
import torch
from torch.func import vmap

import fdl
from fdl import data, losses, metrics, nn, optim, population, random, tree

plt.style.use("fdl.mplstyle")
everything, test = data.fashion_mnist_sample(), data.fashion_mnist_sample(train=False)
train, validation = data.split(random.key(9), everything, 0.1)              # 5,400 and 600
x_test = test.x[:, None].float() / 255

model = nn.sequential(nn.flatten(), nn.linear(784, 64), nn.relu, nn.linear(64, 10))
loss = fdl.supervised(model, losses.cross_entropy, {"accuracy": metrics.accuracy})
opt = optim.sgd(lr=0.1)
step = fdl.train_step(loss, opt)

# %% [markdown]
# ## A sweep
# **Imperative.** A loop over settings, with a fresh module and a fresh optimizer in each turn. The
# models are independent, but they wait for each other.
#
# **Functional.** 6 learning rates × 4 seeds are 24 members of one population. Every leaf gets an
# axis of 24 in front; the rate is a tensor in the optimizer's state, so it gets one too.
# The four seeds six times over, beside each rate four times in a row, make every pair.

# %%
rates, seeds = torch.logspace(-1.7, 0.1, 6), torch.arange(4)
keys = torch.stack([random.key(int(s)) for s in seeds]).repeat(6, 1)         # [24, 2]
lrs = rates.repeat_interleave(4)                                            # [24]
states = population.create(model, opt, keys, {"lr": lrs})
print({path: list(leaf.shape) for path, leaf in tree.flatten_dict(states.params).items()})

# %% [markdown]
# One batch serves all. The epoch is a scan of the vmapped step.

# %%
def epoch(states, images, rows):
    def all_step(states, row):
        return vmap(step, (0, None))(states, data.to_float(data.batch(images, row)))
    return fdl.scan(all_step, states, rows)

train_all = fdl.jit(epoch)                                                  # one program
start = states
for e in range(4):
    rows = data.epoch_indices(random.fold_in(random.key(1), e), len(train.x), 200)
    states, found = train_all(states, train, rows)

# %% [markdown]
# Which member is the best? Not the one that does best on the *test* images: of 24 members some have
# luck with just these, and the winner's figure would promise too much. So 600 of the training images were
# set aside by `data.split`. They choose, and the test images are asked once, by the winner.

# %%
def accuracy(state, images):
    x = images.x[:, None].float() / 255
    return (model.apply(state.params, x).argmax(1) == images.y).double().mean()

grid = vmap(accuracy, (0, None))(states, validation).view(6, 4)
_, ax = plt.subplots(figsize=(6, 2.8))
picture = ax.imshow(grid.T.numpy(), cmap="viridis", aspect="auto", vmin=0.5)
for i in range(6):
    for j in range(4):
        dark = grid[i, j] < 0.66                                            # so that it can be read
        ax.text(i, j, f"{grid[i, j]:.2f}", ha="center", va="center",
                color="white" if dark else "black")
ax.set(xticks=range(6), xticklabels=[f"{lr:.2g}" for lr in rates], yticks=range(4),
       xlabel="learning rate", ylabel="seed", title="validation accuracy after 4 epochs")
ax.grid(False)
plt.colorbar(picture)
plt.show()

# %% [markdown]
# Down a column only the seed differs: that is the size of luck. Two rates whose columns overlap
# cannot be told apart by one run each. At the largest rate training falls apart.
#
# `python -m train sweep mlp --grid lr=0.02:1.26:6log --grid seed=0:4` does this from the command line, on all
# images, with memory estimated first, a table, and the best member kept as an ordinary run.
#
# ### A member is the model trained alone
# Nothing leaks between members. Here are three of them once more, as the loop would have it: a module,
# an optimizer and an epoch each. In float64, so that equal means equal.

# %%
def in_float64(row):
    return tree.cast(data.to_float(data.batch(train, row)), torch.float64)

few = [0, 9, 14]
rows = data.epoch_indices(random.key(2), len(train.x), 200)
together, _ = fdl.scan(lambda states, row: vmap(step, (0, None))(states, in_float64(row)),
                       tree.cast(tree.map(lambda leaf: leaf[few], start), torch.float64), rows)

for i, member in enumerate(few):
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 64), torch.nn.ReLU(),
                                 torch.nn.Linear(64, 10)).double()
    module.load_state_dict(tree.flatten_dict(population.member(start, member).params))
    sgd = torch.optim.SGD(module.parameters(), lr=float(lrs[member]))
    for at in range(len(rows.index)):
        batch = in_float64(tree.map(lambda leaf, at=at: leaf[at], rows))
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(module(batch.x), batch.y).backward()
        sgd.step()
    alone = tree.unflatten_dict(dict(module.state_dict()))
    assert tree.allclose(population.member(together, i).params, alone, rtol=1e-10, atol=1e-12)

# %%
winner = population.best(states, -grid.flatten())                           # an ordinary state
print(f"best of 24: {grid.max():.3f} on validation images, {accuracy(winner, test):.3f} on test images")

# %% [markdown]
# ## What it buys in time
# The same 24 models, a step of each: one `vmap`, or one after the other, both compiled. How far a
# population gets ahead depends on how much of the machine one model leaves idle: on a CPU a net of this
# size leaves the time it takes to start each small operation, on a GPU nearly the whole device.

# %%
batch = data.to_float(data.batch(train, data.take(rows, 0)))
one_step, all_steps = fdl.jit(step), fdl.jit(vmap(step, (0, None)))
members = [population.member(states, i) for i in range(24)]
ways = {"one by one": lambda: [one_step(s, batch) for s in members],
        "vmap": lambda: all_steps(states, batch)}
times = {name: [] for name in ways}
for turn in range(12):
    for name, way in ways.items():
        began = time.perf_counter()
        way()
        if turn > 1:                                                        # after compiling
            times[name].append(time.perf_counter() - began)
ratio = statistics.median(times["one by one"]) / statistics.median(times["vmap"])
print(f"one by one takes {ratio:.1f} times as long as vmap, on this machine")

# %% [markdown]
# ## Ensembles
# Members differ by their first weights and by what they saw. Averaging their *probabilities* cancels
# part of their mistakes. **Bagging** gives each its own sample with replacement: indices get an axis of
# members too, and the step is vmapped over both.

# %%
count = 16
keys = random.split(random.key(5), count)
flock = population.create(model, optim.sgd(lr=0.2), keys)
step = fdl.train_step(loss, optim.sgd(lr=0.2))

def own_epoch(states, images, rows):                                        # rows [steps, members, batch]
    def own_step(state, row):
        return step(state, data.to_float(data.batch(images, row)))
    return fdl.scan(vmap(own_step), states, rows)

for e in range(6):
    at = vmap(lambda key, e=e: random.fold_in(key, e))(keys)
    rows = vmap(lambda key: data.bootstrap_indices(key, len(train.x), 200), out_dims=1)(at)
    flock, _ = own_epoch(flock, train, rows)

# %%
probabilities = vmap(model.apply, (0, None))(flock.params, x_test).softmax(-1)    # [16, 1000, 10]
assert torch.allclose(population.ensemble(model.apply, flock.params, x_test),
                      probabilities.mean(0), atol=1e-6)

def of_subset(key, size):
    chosen = random.permutation(key, count)[:size]
    guesses = probabilities[chosen].mean(0).argmax(1)
    return (guesses == test.y).double().mean()

sizes = [1, 2, 3, 4, 6, 8, 12, 16]
scores = torch.stack([vmap(lambda key, n=n: of_subset(key, n))(random.split(random.key(8), 200))
                      for n in sizes])                                      # [sizes, subsets]
_, ax = plt.subplots()
ax.fill_between(sizes, scores.quantile(0.1, 1), scores.quantile(0.9, 1), alpha=0.25,
                label="80 % of random subsets")
ax.plot(sizes, scores.mean(1), "o-", label="mean")
ax.set(xlabel="members", ylabel="test accuracy", xticks=sizes)
ax.legend(loc="lower right")
plt.show()
print(f"one member {scores[0].mean():.3f}, all sixteen {scores[-1, 0]:.3f}")
assert scores[-1, 0] > scores[0].mean()

# %% [markdown]
# Most of the gain comes from the first few members, and at first the spread shrinks as well: with an
# ensemble one need not be lucky. (How the band closes on the right says nothing: large subsets of the same
# sixteen have most members in common.)
#
# ## Exercises
# **1.** Where do the members disagree? Show the test images on which the most classes get a vote.
#
# <details><summary>Answer</summary>
#
# ```python
# votes = torch.nn.functional.one_hot(probabilities.argmax(-1), 10).sum(0)       # [1000, 10]
# asked = (votes > 0).sum(1).topk(3)
# assert asked.values[0] >= 3
# print([data.LABELS[test.y[i]] for i in asked.indices])
# ```
#
# </details>
#
# **2.** Give each member another weight decay as well as another rate. Which names may stand in the
# dictionary of `population.create`?
#
# <details><summary>Answer</summary>
#
# Those of `optim.hyperparams`. A rate that is 0 when the optimizer is made is left out of its state,
# so it must be made with some other value.
#
# ```python
# decayed = optim.sgd(lr=0.1, weight_decay=1e-4)
# assert {"lr", "weight_decay"} <= optim.hyperparams(decayed.init(winner.params)).keys()
# two = population.create(model, decayed, random.split(random.key(0), 2),
#                         {"lr": torch.tensor([0.1, 0.2]), "weight_decay": torch.tensor([0.0, 0.01])})
# assert population.size(two) == 2
# ```
#
# </details>
#
# **3.** A member whose loss becomes infinite: does it harm the others? And what does `best` do with it?
#
# <details><summary>Answer</summary>
#
# `vmap` keeps members apart, so no. `best` never prefers what is not finite.
#
# ```python
# reckless = population.create(model, opt, random.split(random.key(0), 2),
#                              {"lr": torch.tensor([1e6, 0.1])})
# reckless, seen = epoch(reckless, train, data.epoch_indices(random.key(2), len(train.x), 200))
# final = seen["loss"].value[-1]
# chosen = population.best(reckless, final)
# assert tree.allclose(chosen, population.member(reckless, 1))
# ```
#
# </details>
#
# Next: [13 Per-sample gradients, Hessians, MAML](13_gradients_of_gradients.ipynb)
