# %% [markdown]
# # 17 Your own images
# Curriculum: D2
#
# **You will learn** how a folder of pictures becomes a data set without loading it into memory; how to
# change images at random in training and not in validation; how sure a validation accuracy is; and
# why a run that was killed can end with the same bits as one that was not.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import fdl
import models
from fdl import data, losses, metrics, optim, random, tree
from fdl.checkpointing import Checkpointer

plt.style.use("fdl.mplstyle")
home = Path(tempfile.mkdtemp())                           # for what this notebook writes

# %% [markdown]
# ## D2 A folder of images
# Put the pictures of each class into a folder with its name: `photos/coat/0.png`, … Here are 600 of them, of
# three classes that are easy to confuse; use a folder of your own instead.

# %%
photos, names = home / "photos", ("dress", "coat", "shirt")
x, y = data.fashion_mnist_sample()
for name in names:
    (photos / name).mkdir(parents=True)
    for i, image in enumerate(x[y == data.LABELS.index(name)][:200]):
        Image.fromarray(image.numpy()).save(photos / name / f"{i}.png")

# %% [markdown]
# torchvision's `ImageFolder` lists the files, and opens one when it is asked for its number. Photographs
# differ in size and colour, and a batch is one tensor; so a transformation makes them equal. What it does is the
# same each time. Whatever is random comes later.

# %%
to_tensor = v2.Compose([v2.Grayscale(), v2.Resize((28, 28)), v2.PILToTensor()])
folder = ImageFolder(photos, transform=to_tensor)
image, label = folder[0]
print(len(folder), "images,", folder.classes, tuple(image.shape), image.dtype)
assert folder.classes[label] == "coat" and image.dtype == torch.uint8

# %% [markdown]
# **Imperative.** A `DataLoader(folder, shuffle=True)` draws the order from a hidden generator, and where it
# is within an epoch is nowhere to be read. **Functional.** The order is a tensor that follows from a key.
#
# First hold out a fifth for validation. What is split are the numbers of the images; none is opened yet.

# %%
rows, held_out = data.split(random.key(0), torch.arange(len(folder)), 0.2)
per_epoch = len(rows) // 32                               # steps of 32 images

def order(epoch):
    """The images of each step of an epoch, int64 [steps, 32]."""
    key = random.fold_in(random.key(1), epoch)
    return rows[data.epoch_indices(key, len(rows), 32, drop_last=True).index]

assert torch.equal(order(3), order(3)) and not torch.equal(order(3), order(4))
assert len(rows) == 480 and not set(rows.tolist()) & set(held_out.tolist())

# %% [markdown]
# `data.stream` opens the images in this order, some steps ahead in a thread, and hands over chunks for `scan`:
# leaves `[steps, batch, …]`.

# %%
chunk = next(data.stream(folder, order(0), steps=5))
print("a chunk:", tuple(chunk.x.shape), tuple(chunk.y.shape))
assert torch.equal(chunk.x[2, 7], folder[int(order(0)[2, 7])][0])

# %% [markdown]
# ## Changed at random, in the loss
# A coat that is moved, or seen in a mirror, is a coat. So instead of the mean loss of n images, we minimise
# its expectation over changes T as well:
#
# $$\min_\theta \; \frac{1}{n}\sum_{i=1}^{n} \; \mathbb{E}_{T}\;\ell\bigl(f_\theta(T x_i),\, y_i\bigr).$$
#
# One draw of T for each image and step gives an unbiased estimate of the gradient. The draw needs a key,
# and the loss has one in each step; without `train` there is none, and the images stay as they are.

# %%
model = models.cnn(classes=len(names))
plain = fdl.supervised(model, losses.cross_entropy, {"accuracy": metrics.accuracy})

def changed(key, x):
    crop_key, flip_key = random.split(key)
    return data.random_flip(flip_key, data.random_crop(crop_key, x, padding=2))

def augmented(params, batch, *, train=False, key=None):
    batch = data.to_float(batch)
    if train:
        key, change_key = random.split(key)
        batch = batch._replace(x=changed(change_key, batch.x))
    return plain(params, batch, train=train, key=key)

_, axes = plt.subplots(2, 8, figsize=(8, 2.2))
originals = data.to_float(chunk.x[0, :8])
for column, pair in enumerate(zip(originals, changed(random.key(2), originals), strict=True)):
    for ax, image in zip(axes[:, column], pair, strict=True):
        ax.imshow(image[0].numpy())
        ax.axis("off")
plt.show()

# %% [markdown]
# ## The run
# A chunk is a `scan` of the step. (Here eagerly; for a run of minutes write `fdl.jit(lambda …)`.)

# %%
opt = optim.adam(0.003)
step, score = fdl.train_step(augmented, opt), fdl.eval_step(augmented)

def train_chunk(state, chunk):
    return fdl.scan(step, state, chunk)

def validate(state):
    """Loss and accuracy on the images that were held out, as they are."""
    (chunk,) = data.stream(folder, held_out.reshape(3, 40), steps=3)
    _, found = fdl.scan(lambda _, batch: ((), score(state, batch)), (), chunk)
    return {f"validation_{name}": mean.value.mean().item() for name, mean in found.items()}

# %% [markdown]
# How far has a run come? `state.step` says it: the epoch is its quotient by the steps of an epoch, and the rest
# is the place within. The keys of dropout and augmentation are in the state too. So *the state is all there
# is to save*; there is no loader whose position would be lost.

# %%
def run(state, epochs, checkpointer, die_after=None):
    """Train up to a number of epochs; return the state, and measures after each epoch.

    The training accuracy is that of the last chunk, 160 images.
    """
    history, chunks = [], 0
    while int(state.step) < epochs * per_epoch:
        epoch, done = divmod(int(state.step), per_epoch)
        for chunk in data.stream(folder, order(epoch)[done:], steps=5):
            state, found = train_chunk(state, chunk)
            chunks += 1
            ended = int(state.step) % per_epoch == 0
            measures = validate(state) if ended else {}
            checkpointer.save(state, metrics=measures)
            if ended:
                history.append({"training_accuracy": found["accuracy"].value.mean().item(), **measures})
            if chunks == die_after:
                raise KeyboardInterrupt
    return state, history

start = fdl.TrainState.create(model, opt, key=random.key(3))
with Checkpointer(home / "whole", best=("validation_loss", "min")) as checkpointer:
    end, history = run(start, 6, checkpointer)
    best = checkpointer.best("validation_loss", "min")
for epoch, measures in enumerate(history, 1):
    print(epoch, {name: round(value, 3) for name, value in measures.items()})
print("lowest validation loss after epoch", best.step // per_epoch)

# %%
_, ax = plt.subplots()
for name, style in (("training_accuracy", "--"), ("validation_accuracy", "o-")):
    ax.plot(range(1, 7), [measures[name] for measures in history], style, label=name)
ax.set(xlabel="epoch")
ax.legend()
plt.show()
assert history[-1]["validation_accuracy"] > 0.6           # a third is chance

# %% [markdown]
# **How sure is that?** Of m images each is right with probability p. The share that is right has the
# standard deviation √(p (1 − p) / m): with 120 images and p near 0.8 that is 0.037. Two runs that differ by
# less than twice that do not differ.
#
# ## Killed, and continued
# The same run once more. After eight chunks, in the middle of its third epoch, it dies.

# %%
with Checkpointer(home / "killed") as checkpointer:
    try:
        run(start, 6, checkpointer, die_after=8)
    except KeyboardInterrupt:
        print("killed")

# %% [markdown]
# Another process opens the folder, takes the newest checkpoint, and calls `run` with it. It opens the images that are
# left of the epoch, no others, and ends where the first run ended: not nearly, but bit by bit.

# %%
with Checkpointer(home / "killed") as checkpointer:
    restored = checkpointer.restore(like=start).state
    print("continues after step", int(restored.step), "of epoch", int(restored.step) // per_epoch + 1)
    continued, _ = run(restored, 6, checkpointer)
assert int(restored.step) == 40 and int(restored.step) % per_epoch != 0
assert tree.diff(continued, end) == []                    # weights, moments, key, step: all bits

# %% [markdown]
# ## Exercises
# **1.** Is a net that has learned from changed images surer of what it sees? Average its probabilities over eight
# changes of each validation image, and compare the accuracies.
#
# <details><summary>Answer</summary>
#
# One key for each change, and `vmap` over the keys. The difference is within the error from above.
#
# ```python
# from torch.func import vmap
#
# batch = next(data.stream(folder, held_out[None], steps=1))
# x, y = data.to_float(batch.x[0]), batch.y[0]
# def probabilities(x):
#     return model.apply(end.params, x).softmax(1)
# keys = random.split(random.key(4), 8)
# mean = vmap(lambda key: probabilities(changed(key, x)))(keys).mean(0)
# one, eight = ((p.argmax(1) == y).double().mean().item() for p in (probabilities(x), mean))
# print(f"{one:.3f}, averaged {eight:.3f}")
# assert abs(one - history[-1]["validation_accuracy"]) < 1e-9 and abs(one - eight) < 0.15
# ```
#
# </details>
#
# **2.** Two processes share each batch. Which images does each of them open, so that together they open those of one
# process?
#
# <details><summary>Answer</summary>
#
# Columns of the order, which is what `parallel.own_rows(indices, mesh)` gives each process.
#
# ```python
# first, second = order(0).chunk(2, dim=1)
# ours = next(data.stream(folder, first, steps=5))
# theirs = next(data.stream(folder, second, steps=5))
# together = next(data.stream(folder, order(0), steps=5))
# assert torch.equal(torch.cat([ours.x, theirs.x], 1), together.x)
# ```
#
# </details>
#
# More sources than a folder (`.npy`, Parquet, loaders) are on the page [Use data of your own](../docs/howto/data.md).
# Back to the beginning: [01 Tensors and keys](01_tensors_and_keys.ipynb)
