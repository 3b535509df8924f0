# %% [markdown]
# # 01 Tensors and keys
# Curriculum: T1, T2, T3
#
# **You will learn** how tensors are made, combined and moved, and why here nothing is changed in
# place. Random numbers come from *keys*: who holds the key can make the same numbers again,
# in any order.

# %%
import matplotlib.pyplot as plt
import torch
from einops import einsum, rearrange, reduce
from torch.testing import assert_close

from fdl import random, tree

plt.style.use("fdl.mplstyle")

# %% [markdown]
# ## T1 Creating tensors
# What is not random is the same in both worlds: a shape goes in, a tensor comes out.

# %%
made = [torch.tensor([[1, 2], [3, 4]]),    # from data: copies it, infers the dtype
        torch.zeros(2, 2),                 # float32 unless told otherwise
        torch.ones(2, 2),
        torch.eye(2),                      # ones on the diagonal
        torch.arange(0, 10, 2),            # like range, the end left out
        torch.linspace(0, 1, 5)]           # five points, both ends included
for x in made:
    print(x.dtype, x.tolist())

# %% [markdown]
# Three more take something from a tensor that is there: `new_ones` its dtype and device,
# `zeros_like` and `randn_like` its shape as well. `empty` only reserves memory: what it shows is
# whatever lay there before, so it is no function of its arguments. Use `full` or `zeros`.

# %%
like = torch.zeros(2, 3, dtype=torch.float64)
assert like.new_ones(4).dtype == torch.float64
assert torch.ones_like(like).shape == torch.randn_like(like).shape == (2, 3)
assert torch.empty(2, 3).shape == (2, 3)  # a shape is all that is promised

# %% [markdown]
# ## Random numbers: a hidden state, or a key
# **Imperative.** One generator, hidden in the library, is advanced by every draw. So what a line
# gives depends on every draw that ran before it.

# %%
torch.manual_seed(0)
first, second = torch.rand(3), torch.rand(3)    # the same call, other numbers
torch.manual_seed(0)
torch.rand(1)                                   # somebody added one draw up here ...
shifted = torch.rand(3)

assert not torch.equal(first, second)
assert not torch.equal(first, shifted)          # ... and everything below has changed
print(first, shifted, sep="\n")

# %% [markdown]
# **Functional.** A key is an argument like any other: two integers in a tensor. The same key gives
# the same numbers, whenever and wherever it is used. For other numbers, take another key.

# %%
key = random.key(0)
a, b = random.split(key)                        # two new keys; `key` is used up
weights = random.uniform(a, (3,))
random.normal(b, (1000,))                       # draw what you like from other keys

assert torch.equal(weights, random.uniform(a, (3,)))
print(key, a, b, weights, sep="\n")

# %% [markdown]
# Each of torch's usual random functions has a counterpart that takes a key. What can be written in
# one line is left out: a normal with another mean and spread is `mean + std * normal`.

# %%
k = random.split(random.key(1), 8)
shape = (1000, 4)
random.uniform(k[0], shape)                     # torch.rand(1000, 4)
random.normal(k[1], shape)                      # torch.randn(1000, 4)
random.uniform(k[2], shape, minval=-1.0)        # torch.empty(1000, 4).uniform_(-1, 1)
5.0 + 0.1 * random.normal(k[3], shape)          # torch.normal(5.0, 0.1, size=(1000, 4))
random.permutation(k[4], 10)                    # torch.randperm(10)
random.randint(k[5], shape, 0, 6)               # torch.randint(0, 6, (1000, 4))
random.bernoulli(k[6], 0.3, shape)              # torch.rand(1000, 4) < 0.3
random.normal(k[7], like.shape, like.dtype)     # torch.randn_like(like)

assert random.permutation(k[4], 10).sort().values.equal(torch.arange(10))

# %% [markdown]
# They are the distributions they claim to be: 100,000 draws against the density.

# %%
draws = {"uniform on [-1, 1)": random.uniform(k[2], (100_000,), minval=-1.0, maxval=1.0),
         "normal, mean 0, std 1": random.normal(k[1], (100_000,))}
t = torch.linspace(-4, 4, 401)
density = {"uniform on [-1, 1)": (t.abs() <= 1) / 2,
           "normal, mean 0, std 1": (-t**2 / 2).exp() / (2 * torch.pi) ** 0.5}

_, axes = plt.subplots(1, 2, figsize=(6, 2.4), sharex=True)
for ax, (name, x) in zip(axes, draws.items(), strict=True):
    ax.hist(x.numpy(), bins=80, range=(-4, 4), density=True, color="0.75", label="draws")
    ax.plot(t, density[name], label="density")
    ax.set(title=name, xlabel="value", ylabel="density")
axes[1].legend()
plt.show()

# %% [markdown]
# ### A run is a tree of keys
# One key starts the run. `split` gives a key to each purpose, `fold_in` one to each count, such as
# an epoch or a step. So the shuffle of epoch 2 is known without having run epochs 0 and 1, and a
# layer that draws more numbers leaves the data order as it was.

# %%
root = random.key(0)
init, shuffle, noise = random.split(root, 3)
epochs = [random.fold_in(shuffle, epoch) for epoch in range(3)]

nodes = {"root": (root, 1, 2.0), "init": (init, 0, 1.0), "shuffle": (shuffle, 1, 1.0),
         "noise": (noise, 2, 1.0)}
nodes |= {f"epoch {i}": (key, i, 0.0) for i, key in enumerate(epochs)}
edges = [("root", "init"), ("root", "shuffle"), ("root", "noise")]
edges += [("shuffle", f"epoch {i}") for i in range(3)]

# %%
_, ax = plt.subplots(figsize=(6, 3))
for parent, child in edges:
    (_, x0, y0), (_, x1, y1) = nodes[parent], nodes[child]
    ax.plot([x0, x1], [y0 - 0.22, y1 + 0.22], color="0.6")
box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "tab:blue"}
for name, (key, x, y) in nodes.items():
    words = " ".join(f"{int(word):08x}" for word in key)
    ax.text(x, y, f"{name}\n{words}", ha="center", va="center", bbox=box)
ax.text(1.6, 1.5, "split(root, 3)")
ax.text(2.05, 0.5, "fold_in(shuffle, epoch)", ha="center")
ax.set(xlim=(-0.5, 2.5), ylim=(-0.4, 2.4))
ax.axis("off")
plt.show()

# %% [markdown]
# One key belongs to one call. For a batch of keys there is `torch.vmap`, and each row is exactly
# what a call on its own would have given. (torch's own generator cannot promise that: under `vmap`
# one has to choose between the same numbers in every row and others than a loop gives.)

# %%
keys = random.split(random.key(2), 5)
batched = torch.vmap(lambda key: random.normal(key, (3,)))(keys)
looped = torch.stack([random.normal(key, (3,)) for key in keys])
assert torch.equal(batched, looped)

# %% [markdown]
# ## T2 Operating on tensors
# Addition has three spellings that return a new tensor, and one that changes what is there.

# %%
x, y = torch.arange(3.0), torch.ones(3)
assert torch.equal(x + y, torch.add(x, y))
assert torch.equal(x + y, x.add(y))
z = x.clone()
z.add_(y)                             # the underscore says: in place (as are += and out=)
assert torch.equal(z, x + y)

# %% [markdown]
# ### In place, and why not
# **Imperative.** Writing into a tensor changes it for everybody who holds it. A classic: keep the
# best weights so far, train on, and find that the best weights have moved too.

# %%
net = torch.nn.Linear(2, 1)
best = net.state_dict()               # a dict of the same tensors, not of copies
before = best["weight"].clone()
with torch.no_grad():
    net.weight.sub_(0.1)              # what an optimizer's step does
assert not torch.equal(best["weight"], before)

# %% [markdown]
# It can also pull the ground from under a gradient: the derivative of exp needs exp(x) again, and
# that value is gone.

# %%
x = torch.ones(3, requires_grad=True)
y = x.exp()
y.add_(1)
try:
    y.sum().backward()
except RuntimeError as error:
    print(str(error).split(":")[0])

# %% [markdown]
# **Functional.** A new tensor for a new value. The old one stays what it was as long as somebody
# holds it, so a snapshot is a name and costs nothing. Inside a compiled program the compiler may
# still reuse memory, where it can prove that nobody will look.

# %%
params = {"weight": random.normal(random.key(3), (1, 2)), "bias": torch.zeros(1)}
best = params
params = tree.map(lambda p: p - 0.1, params)
assert_close(best["weight"] - params["weight"], torch.full((1, 2), 0.1))

# %% [markdown]
# ### Shapes: view, reshape, clone, and einops
# `view` and usually `reshape` show the same memory in another shape, so a write into one is seen
# in the other; `clone` copies. If nothing is written, the difference does not matter, and that is
# one worry less. einops says what the axes *are*, and checks it.

# %%
x = torch.arange(12)
assert x.view(3, 4).data_ptr() == x.data_ptr()          # the same memory
assert x.clone().data_ptr() != x.data_ptr()
assert torch.equal(x.reshape(3, -1), x.view(3, 4))      # -1: work it out

images = random.uniform(random.key(4), (6, 1, 8, 8))    # [batch, channel, height, width]
rows = rearrange(images, "b c h w -> b (c h w)")
assert torch.equal(rows, images.view(6, -1))
grid = rearrange(images, "(r s) 1 h w -> (r h) (s w)", r=2)      # a sheet of 2 × 3 images
assert torch.equal(grid[8:, 16:], images[5, 0])
pooled = reduce(images, "b c (h 2) (w 2) -> b c h w", "mean")    # average pooling
assert_close(pooled, torch.nn.functional.avg_pool2d(images, 2))

# %% [markdown]
# ### Linear algebra
# `einsum` writes a product by its indices: an index that does not appear on the right is summed.
# It makes a good check of what each named function does.

# %%
k1, k2, k3 = random.split(random.key(5), 3)
A, B = random.normal(k1, (4, 4), torch.float64), random.normal(k2, (4, 4), torch.float64)
u, v = random.normal(k3, (2, 3), torch.float64)

assert_close(A.trace(), A.diag().sum())                 # diag: the diagonal as a vector
assert torch.equal(A.triu() + A.tril(diagonal=-1), A)   # upper and strictly lower triangle
assert torch.equal(A.t(), rearrange(A, "i j -> j i"))
assert_close(torch.mm(A, B), einsum(A, B, "i k, k j -> i j"))
assert_close(torch.addmm(A, A, B), A + A @ B)           # one call, one pass over memory
assert_close(torch.dot(u, v), einsum(u, v, "i, i ->"))
across = torch.cross(u, v, dim=0)                       # at right angles to both
assert_close(torch.stack([torch.dot(across, u), torch.dot(across, v)]),
             torch.zeros(2, dtype=torch.float64))

# %%
As, Bs = torch.stack([A, B, A]), torch.stack([B, A, A])         # [3, 4, 4]
assert_close(torch.bmm(As, Bs), einsum(As, Bs, "n i k, n k j -> n i j"))
assert_close(torch.bmm(As, Bs), torch.vmap(torch.mm)(As, Bs))   # `mm`, mapped over a batch
assert_close(torch.addbmm(A, As, Bs), A + torch.bmm(As, Bs).sum(0))

assert_close(A @ torch.inverse(A), torch.eye(4, dtype=torch.float64))
U, S, Vh = torch.linalg.svd(A)
assert_close(U @ S.diag() @ Vh, A)
print("singular values:", S.round(decimals=3).tolist())

# %% [markdown]
# `bmm` is `vmap` of `mm`. That is a pattern for the whole of this course: write the function of
# *one* thing, one example, one model or one learning rate, and let `vmap` write the version for
# many.

# %% [markdown]
# ## T3 Moving between devices and dtypes
# **Imperative.** `net.double()` and `net.to(device)` change the network itself. Afterwards there is
# no float32 network any more, and an optimizer made before may hold the old tensors.

# %%
net = torch.nn.Linear(2, 1)
same = net.double()
assert same is net and net.weight.dtype == torch.float64

# %% [markdown]
# **Functional.** Parameters are a *tree*: dicts, lists and tuples, nested as you like, with tensors
# at the leaves. `fdl.tree` moves whole trees, and the one you had is still there. Integers, such as
# counts and keys, are not cast, for a key in float16 would be no key.

# %%
params = {"conv": [{"weight": random.normal(random.key(6), (6, 1, 5, 5))}],
          "fc": {"weight": torch.zeros(10, 84), "bias": torch.zeros(10)},
          "key": random.key(7)}
half = tree.cast(params, torch.bfloat16)
print(tree.summary(half))
assert params["fc"]["bias"].dtype == torch.float32      # the original is untouched

# %%
devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
for device in devices:
    there = tree.to(params, device)
    assert all(leaf.device.type == device for leaf in tree.leaves(there))
    drawn = random.uniform(there["key"], (1000,))       # lives where its key lives
    assert torch.equal(drawn.cpu(), random.uniform(params["key"], (1000,)))

# %% [markdown]
# The last line is the promise that makes experiments portable: uniform numbers are the same bits
# on the CPU and on a GPU, eager and compiled (normal ones to a few units in the last place). If you
# come from JAX: they are also the bits of `jax.random` for the same key.

# %% [markdown]
# ## Exercises
# **1.** Two layers are initialised with `random.normal(key, (4, 4))` and `random.normal(key, (8,))`
# from *one* key. What is wrong? Show it, and repair it.
#
# <details><summary>Answer</summary>
#
# The draws are not independent: a draw is a function of the key and of the position, so equal
# positions hold equal numbers.
#
# ```python
# key = random.key(0)
# one, two = random.normal(key, (4, 4)), random.normal(key, (8,))
# assert torch.equal(one.flatten()[:8], two)             # half of one layer is the other
#
# first, second = random.split(key)
# one, two = random.normal(first, (4, 4)), random.normal(second, (8,))
# assert not torch.isclose(one.flatten()[:8], two).any()
# ```
#
# </details>
#
# **2.** Without a loop, draw five shuffles of the numbers 0 to 9, one for each of the keys
# `fold_in(key, 0)` to `fold_in(key, 4)`. What does shuffle 3 cost if you need only that one?
#
# <details><summary>Answer</summary>
#
# `vmap` maps over the counts; shuffle 3 alone is one call, since no draw depends on another.
#
# ```python
# key, counts = random.key(8), torch.arange(5)
# shuffle = lambda count: random.permutation(random.fold_in(key, count), 10)
# all_five = torch.vmap(shuffle)(counts)
# assert torch.equal(all_five[3], random.permutation(random.fold_in(key, 3), 10))
# ```
#
# </details>
#
# **3.** With `rearrange`, cut an image `[1, 28, 28]` into 16 patches `[16, 49]`, and put it
# together again.
#
# <details><summary>Answer</summary>
#
# ```python
# image = random.uniform(random.key(9), (1, 28, 28))
# patches = rearrange(image, "1 (r h) (s w) -> (r s) (h w)", h=7, w=7)
# assert patches.shape == (16, 49)
# assert torch.equal(patches[5].view(7, 7), image[0, 7:14, 7:14])
# back = rearrange(patches, "(r s) (h w) -> 1 (r h) (s w)", r=4, h=7)
# assert torch.equal(back, image)
# ```
#
# </details>
#
# Next: [02 Gradients as functions](02_gradients.ipynb)
