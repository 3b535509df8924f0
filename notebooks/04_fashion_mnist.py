# %% [markdown]
# # 04 Fashion-MNIST
# Curriculum: D1
#
# **You will learn** to treat a data set as two tensors and an epoch as an array of indices: then a
# shuffle is a pure function of a key, every batch has one shape, and nothing is loaded twice.

# %%
import gzip
import math
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torchvision
from torch.utils.data import DataLoader

from fdl import data, metrics, random

plt.style.use("fdl.mplstyle")

# %% [markdown]
# ## D1 The data
# 60,000 training and 10,000 test images of clothes, 28 × 28 grey pixels, in ten classes.

# %%
train, test = data.fashion_mnist(), data.fashion_mnist(train=False)
for name, (x, y) in {"train": train, "test": test}.items():
    print(f"{name:5}  images {list(x.shape)} {x.dtype}  labels {list(y.shape)} {y.dtype}")
print("examples of each class:", train.y.bincount().unique().tolist())

# %%
_, axes = plt.subplots(2, 5, figsize=(6, 2.9))
for ax, image, label in zip(axes.flat, train.x, train.y, strict=False):
    ax.imshow(image.numpy())
    ax.set_title(data.LABELS[label])
    ax.axis("off")
plt.show()

# %% [markdown]
# The images stay as they come, one byte a pixel, on the device where they will be used. Only a
# *batch* becomes floats. So the whole set takes a quarter of the memory.

# %%
megabytes = train.x.nbytes / 1e6
print(f"as uint8: {megabytes:.0f} MB, as float32: {4 * megabytes:.0f} MB")
assert train.x.min() == 0 and train.x.max() == 255

# %% [markdown]
# **Imperative.** The usual way is an object that yields examples: torchvision's data set makes a
# PIL image of each, transforms it to floats in [0, 1], and a `DataLoader` shuffles and stacks them.
# (torchvision wants its files unpacked in a folder of its own, so the function makes one.)

# %%
def torchvision_set():
    floats = torchvision.transforms.ToTensor()
    packaged = Path("/usr/share/datasets/fashion-mnist")     # where Debian puts them
    if not packaged.exists():
        return torchvision.datasets.FashionMNIST("data", download=True, transform=floats)
    with tempfile.TemporaryDirectory() as root:              # it reads them once
        raw = Path(root, "FashionMNIST", "raw")
        raw.mkdir(parents=True)
        for path in packaged.glob("*.gz"):
            (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
        return torchvision.datasets.FashionMNIST(root, transform=floats)

theirs = torchvision_set()
image, label = theirs[0]
print(type(theirs).__name__, list(image.shape), image.dtype, data.LABELS[label])

# %% [markdown]
# **Functional.** Indices go in, a batch comes out. The values are the same:

# %%
def every(count):
    return torch.arange(count), torch.ones(count, dtype=torch.bool)

batch = data.to_float(data.batch(train, every(100)))
assert all(torch.equal(batch.x[i], theirs[i][0]) for i in range(100))
assert torch.equal(train.x, theirs.data) and torch.equal(train.y, theirs.targets)

# %% [markdown]
# ## An epoch is an array of indices
# `epoch_indices` shuffles 0 … n − 1 and cuts them into rows, one for each step. The same key gives
# the same epoch. To restart in the middle of epoch 7, one needs the number 7 and the step, and no
# saved state of any loader.

# %%
shuffle_key = random.key(0)

def epoch_order(epoch):
    return data.epoch_indices(random.fold_in(shuffle_key, epoch), 60_000, batch_size=256)

index, mask = epoch_order(7)
print("index", list(index.shape), " first row begins", index[0, :5].tolist())
assert torch.equal(index[117], epoch_order(7).index[117])       # step 117, directly
assert torch.equal(index[mask].sort().values, torch.arange(60_000))     # each example once

# %% [markdown]
# ### The last batch
# 60,000 is 234 · 256 + 96: in the last row only 96 places are examples, the rest is padding. Every
# step then has one shape, so one compiled program serves them all, and the mask says what counts.

# %%
print("examples in the last rows:", mask.sum(1)[-3:].tolist())

values = train.x.float().mean((1, 2))   # any number per example: its mean brightness
means = [metrics.mean(values[i], m) for i, m in zip(index, mask, strict=True)]
total = sum(means[1:], start=means[0])          # sums and counts add up, means do not
assert abs(total.value - values.double().mean()) < 1e-9

padded = values[index].mean()                   # padding counted as if it were data
unequal = torch.stack([m.value for m in means]).mean()     # all batches given one weight
print(f"exact {total.value:.5f}, padding counted {padded:.5f}, mean of means {unequal:.5f}")

# %% [markdown]
# The differences are small here, but they are errors, and they grow as the data shrinks. `fdl`'s
# losses and metrics take the mask, so all figures in these notebooks are means over examples.

# %% [markdown]
# ## D1 One pass over the data
# Both ways are given the same batches and yield the same images; the question is how long it takes
# to have them. The time is taken once for each, in one process.

# %%
rows = [i[m].tolist() for i, m in zip(index, mask, strict=True)]
loader = DataLoader(theirs, batch_sampler=rows)

def pass_over(batches):
    """Return how long it takes to walk over the batches, and the first images of each."""
    start = time.perf_counter()
    seen = [batch[0][0].sum() for batch in batches]
    return time.perf_counter() - start, torch.stack(seen)

imperative, loaded = pass_over(loader)
steps = zip(index, mask, strict=True)
functional, gathered = pass_over(data.to_float(data.batch(train, row)) for row in steps)
assert torch.equal(loaded, gathered)
print(f"the DataLoader took {imperative / functional:.0f} times as long as data.batch")

# %% [markdown]
# What takes the time is Python, 60,000 times: one image, one PIL object, one transformation. Worker
# processes spread that over cores: behind a `DataLoader` with four of them a step of softmax
# regression takes 15.1 ms, and here, eagerly, 2.1 ms ([benchmark](../docs/benchmark.md)). If a data
# set fits in memory, indexing it is all there is to loading. (If it does not, use a loader; a step
# takes its batches just as well: two tensors.)

# %% [markdown]
# ## Sampling with replacement
# Since an epoch is an array, other ways to sample are other arrays. The *bootstrap* draws n
# examples with replacement: some come up several times, and a share of 1/e = 0.368 not at all.
# Models trained on different bootstraps differ, which an ensemble can use.

# %%
drawn, mask = data.bootstrap_indices(random.key(1), 60_000, batch_size=256)
times = drawn[mask].bincount(minlength=60_000)
share = (times.bincount() / 60_000).tolist()
poisson = [1 / (math.e * math.factorial(k)) for k in range(len(share))]

_, ax = plt.subplots(figsize=(6, 2.4))
ax.bar(range(len(share)), share, color="0.75", label="drawn")
ax.plot(poisson, "o", label="1 / (e · k!)")
ax.set(xlabel="k, how often an example was drawn", ylabel="share of examples")
ax.legend()
plt.show()
assert abs(share[0] - 0.368) < 0.01

# %% [markdown]
# ## What does a class look like?
# The mean of all images of a class, in one indexed sum:

# %%
pixels = train.x.flatten(1).float() / 255
class_means = torch.zeros(10, 784).index_add(0, train.y, pixels) / 6000
_, axes = plt.subplots(2, 5, figsize=(6, 2.9))
for ax, mean, label in zip(axes.flat, class_means, data.LABELS, strict=True):
    ax.imshow(mean.view(28, 28).numpy(), vmin=0, vmax=1)
    ax.set_title(label)
    ax.axis("off")
plt.show()

# %% [markdown]
# Trousers and bags have shapes of their own; pullover, coat and shirt are nearly one grey shape,
# and models confuse them, as the next notebook shows. As a first classifier, give a test image the
# class whose mean is nearest:

# %%
distances = torch.cdist(test.x.flatten(1).float() / 255, class_means)
baseline = metrics.accuracy(-distances, test.y).value
print(f"test accuracy of the nearest mean: {baseline:.3f}; of guessing: 0.1")
assert 0.6 < baseline < 0.75

# %% [markdown]
# That took no gradient. Whatever is trained from here on has to beat it.
#
# ## Exercises
# **1.** Write `validation_split(key, n, share)`, which splits the indices 0 … n − 1 at random into
# two disjoint parts. Why does it return indices and not images?
#
# <details><summary>Answer</summary>
#
# Indices are small, and the images need not be copied: an epoch of the larger part is
# `part[epoch_indices(key, len(part), 256).index]`.
#
# ```python
# def validation_split(key, n, share):
#     order = random.permutation(key, n)
#     cut = round(n * share)
#     return order[cut:], order[:cut]
#
# fit, held_out = validation_split(random.key(2), 60_000, 0.1)
# assert len(held_out) == 6000
# assert torch.equal(torch.cat([fit, held_out]).sort().values, torch.arange(60_000))
# ```
#
# </details>
#
# **2.** Write a pure function `augment(key, batch)` that mirrors each image left-right with
# probability ½, each by its own coin. Why does a training step not need a new data set for it?
#
# <details><summary>Answer</summary>
#
# A step has a key of its own, so the augmentation is one more function inside the step.
#
# ```python
# def augment(key, batch):
#     flip = random.bernoulli(key, 0.5, (len(batch.x),))
#     mirrored = torch.where(flip[:, None, None, None], batch.x.flip(-1), batch.x)
#     return batch._replace(x=mirrored)
#
# once, again = augment(random.key(3), batch), augment(random.key(3), batch)
# assert torch.equal(once.x, again.x)
# assert not torch.equal(once.x, batch.x)
# assert torch.equal(once.x.sum((1, 2, 3)).round(decimals=2),
#                    batch.x.sum((1, 2, 3)).round(decimals=2))
# ```
#
# </details>
#
# **3.** A class is rare in your data, and you want every batch of 256 to hold as many of it as of
# the others. Make the indices.
#
# <details><summary>Answer</summary>
#
# Draw the classes evenly, then an example of each class.
#
# ```python
# members = train.y.argsort(stable=True).view(10, 6000)      # rows: the examples of a class
# class_key, member_key = random.split(random.key(4))
# classes = random.randint(class_key, (235, 256), 0, 10)
# places = random.randint(member_key, (235, 256), 0, 6000)
# index = members[classes, places]
# assert torch.equal(train.y[index], classes)
# ```
#
# Where the classes differ in size, the bound of the second draw is the size of each class, a tensor
# that broadcasts. (For *exactly* as many, use `arange(256) % 10` for the classes.)
#
# </details>
#
# Next: [05 Softmax regression](05_softmax_regression.ipynb)
