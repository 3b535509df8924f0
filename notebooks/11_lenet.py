# %% [markdown]
# # 11 Convolutions and LeNet
# Curriculum: C1, C2
#
# **You will learn** what a convolution computes, by hand and as a layer; LeNet as a page of maths; why
# its training seems to sleep at first; and what its filters look for once it has woken up.

# %%
import math
from collections import OrderedDict

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.func import grad
from torch.testing import assert_close

import fdl
import models
from fdl import data, losses, metrics, nn, optim, random, tree

plt.style.use("fdl.mplstyle")
train, test = data.fashion_mnist(), data.fashion_mnist(train=False)

# %% [markdown]
# ## C1 A convolution, by hand
# A kernel of k × k numbers slides over an image. At every place it is multiplied with the pixels below
# it, and the products are added up. (Strictly this is a cross-correlation; a convolution would turn
# the kernel around first. As the numbers are learned, it makes no difference.)

# %%
def by_hand(x, kernel):                                   # [h, w], [k, k]
    k = len(kernel)
    places = x.unfold(0, k, 1).unfold(1, k, 1)            # [h − k + 1, w − k + 1, k, k]
    return (places * kernel).sum((2, 3))

image = train.x[0].double() / 255                         # an ankle boot
vertical = torch.tensor([[1.0, 0.0, -1.0]] * 3, dtype=torch.float64)     # left minus right
edges = {"image": image, "vertical edges": by_hand(image, vertical),
         "horizontal edges": by_hand(image, vertical.T)}
assert_close(edges["vertical edges"],
             F.conv2d(image[None, None], vertical[None, None])[0, 0], rtol=0, atol=1e-12)

_, axes = plt.subplots(1, 3, figsize=(6, 2.2))
for ax, (name, picture) in zip(axes, edges.items(), strict=True):
    limit = picture.abs().max().item()
    ax.imshow(picture.numpy(), cmap="gray_r" if name == "image" else "RdBu",
              vmin=0 if name == "image" else -limit, vmax=limit)
    ax.set_title(name)
    ax.axis("off")
plt.show()

# %% [markdown]
# One kernel with 9 numbers finds left borders and right borders anywhere in the image. A linear
# layer would need a weight for each pair of pixels, and would have to learn the same border at each
# place anew.
#
# ### The shape of the result
# Padding p puts zeros around, a stride s skips places. Along each axis there are
# `⌊(n + 2p − k) / s⌋ + 1` places. For 8 × 8 with k = 3, p = 1, s = 2 that is 4 × 4.

# %%
def places(n, k, p, s):
    return (n + 2 * p - k) // s + 1

assert places(8, 3, 1, 2) == 4
for k in range(1, 6):
    for p in range(3):
        for s in range(1, 4):
            imperative = torch.nn.Conv2d(1, 2, k, padding=p, stride=s)
            functional = nn.conv2d(1, 2, k, padding=p, stride=s)
            params = functional.init(random.key(0))
            imperative.load_state_dict(params)            # same names, same shapes
            x = random.normal(random.key(1), (1, 1, 8, 8))
            y = functional.apply(params, x)
            assert list(y.shape) == [1, 2, places(8, k, p, s), places(8, k, p, s)]
            assert torch.equal(y, imperative(x))
print("45 convolutions have the shape that the formula says, and the values of nn.Conv2d")

# %% [markdown]
# **Imperative** the layer holds its kernel and has a state dict; **functional** it is two functions, and
# the state dict is what `init` returned.
#
# ## C2 LeNet
# Two blocks of convolution, sigmoid and pooling turn 28 × 28 pixels into 16 pictures of 4 × 4; three
# linear layers turn these into 10 scores. Each place of a 4 × 4 picture sees a 16 × 16 window of the
# image, so the second kernels can find what the first ones' edges add up to.

# %%
model = models.lenet()
params = model.init(random.key(0))
print(tree.summary(params))

# %% [markdown]
# **Imperative.** The twin, with the same names, so parameters go across in either direction unchanged.

# %%
class LeNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Sequential(
            torch.nn.Conv2d(1, 6, 5), torch.nn.Sigmoid(), torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(6, 16, 5), torch.nn.Sigmoid(), torch.nn.MaxPool2d(2))
        self.fc = torch.nn.Sequential(
            torch.nn.Linear(256, 120), torch.nn.Sigmoid(),
            torch.nn.Linear(120, 84), torch.nn.Sigmoid(), torch.nn.Linear(84, 10))

    def forward(self, x):
        return self.fc(self.conv(x).flatten(1))

net = LeNet().double()
start = tree.cast(params, torch.float64)
net.load_state_dict(tree.flatten_dict(start))
back = tree.unflatten_dict(OrderedDict(net.state_dict()))
assert list(net.state_dict()) == list(tree.flatten_dict(params))
assert tree.diff(back, start) == []

# %% [markdown]
# Twenty steps of both, on the same batches, end at the same weights.

# %%
loss = fdl.supervised(model, losses.cross_entropy, {"accuracy": metrics.accuracy})
opt = optim.sgd(lr=0.9)
step = fdl.train_step(loss, opt)
state = fdl.TrainState.create(model, opt, key=random.key(0), params=start)
sgd = torch.optim.SGD(net.parameters(), lr=0.9)
order = data.epoch_indices(random.key(1), len(train.x), 32).index[:20]
for index in order:
    x, y = train.x[index, None].double() / 255, train.y[index]
    sgd.zero_grad()                                       # imperative
    F.cross_entropy(net(x), y).backward()
    sgd.step()
    state, _ = step(state, (x, y))                        # functional
theirs = tree.unflatten_dict(dict(net.named_parameters()))
assert tree.allclose(state.params, theirs, rtol=0, atol=1e-10)
assert not tree.allclose(state.params, start, rtol=0, atol=1e-2)

# %% [markdown]
# ## Training, and the sleep at the start
# The recipe of the course: SGD with rate 0.9, batches of 256, Xavier's initialisation. The epoch is one
# compiled program. Beside it, the same network with batch normalisation.
#
# Sigmoids pass little gradient on, so LeNet sleeps for an epoch or two, and after ten it is not ahead
# of softmax regression (0.811 and 0.829 on test images, means of three seeds). After twenty it is:
# 0.858 (0.864, 0.858 and 0.852).

# %%
def run(model, epochs, opt=opt):
    loss = fdl.supervised(model, losses.cross_entropy, {"accuracy": metrics.accuracy})
    step, score = fdl.train_step(loss, opt), fdl.eval_step(loss)
    state = fdl.TrainState.create(model, opt, key=random.key(0))

    def epoch(state, images, rows):
        return fdl.scan(lambda s, row: step(s, data.to_float(data.batch(images, row))), state, rows)

    compiled, curve = fdl.jit(epoch, donate_argnums=0), []
    for e in range(epochs):
        rows = data.epoch_indices(random.fold_in(random.key(1), e), len(train.x), 256)
        state, found = compiled(state, train, rows)
        curve.append(found["loss"].value)
        mean = {name: each.sum().value.item() for name, each in found.items()}
        print(f"epoch {e + 1}: loss {mean['loss']:.3f}, accuracy {mean['accuracy']:.3f}")
    whole = data.sequential_indices(len(test.x), 1000)
    parts = [score(state, data.to_float(data.batch(test, data.take(whole, i))))
             for i in range(10)]
    return state, torch.cat(curve), sum(part["accuracy"] for part in parts).value.item()

trained, plain, accuracy = run(model, 4)
print(f"test accuracy {accuracy:.3f}")
_, faster, accuracy_bn = run(models.lenet_bn(), 1)
print(f"with batch normalisation, after one epoch: {accuracy_bn:.3f}")

# %%
_, ax = plt.subplots()
epochs_of = torch.arange(len(plain)) / 235
ax.plot(epochs_of, plain, label="LeNet")
ax.plot(epochs_of[:len(faster)], faster, "--", label="with batch normalisation")
ax.axhline(math.log(10), color="k", linestyle=":", label="ln 10 = 2.303")
ax.set(xlabel="epoch", ylabel="loss of the batch")
ax.legend()
plt.show()
assert plain[:100].mean() > 2.2 and faster[50:100].mean() < 1.5

# %% [markdown]
# For its first hundreds of steps LeNet stays at ln 10, the loss of guessing: sigmoids have a slope of at
# most ¼, so a gradient that passes four of them has been shrunk to 1/256 or less, and the first layers hardly
# move. Then one of them gets hold of something, and the loss falls. Batch normalisation keeps the sigmoids
# where they are steep, and there is no sleep. The gradient norms say the same:

# %%
x, y = test.x[:256, None].float() / 255, test.y[:256]

def norms(params):
    grads = grad(lambda p: losses.cross_entropy(model.apply(p, x), y).mean())(params)
    return {path: leaf.norm().item() for path, leaf in tree.flatten_dict(grads).items()
            if path.endswith("weight")}

at_first, later = norms(params), norms(trained.params)
_, ax = plt.subplots(figsize=(6, 2.6))
ax.semilogy(list(at_first), list(at_first.values()), "o--", label="at the start")
ax.semilogy(list(later), list(later.values()), "s-", label="after four epochs")
ax.set(ylabel="norm of the gradient")
ax.legend()
plt.show()
assert at_first["conv.0.weight"] < 0.1 * at_first["fc.4.weight"]

# %% [markdown]
# ## What the filters see
# The six kernels of the first layer, and what each makes of one image, after its sigmoid.

# %%
kernels = trained.params["conv"]["0"]["weight"]           # [6, 1, 5, 5]
first = {name: trained.params["conv"]["0"][name] for name in ("weight", "bias")}
maps = torch.sigmoid(F.conv2d(x[:1], **first))[0]         # [6, 24, 24]
_, axes = plt.subplots(2, 6, figsize=(7, 2.6))
limit = kernels.abs().max().item()
for i in range(6):
    axes[0, i].imshow(kernels[i, 0].numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
    axes[1, i].imshow(maps[i].numpy(), cmap="viridis")
    for ax in axes[:, i]:
        ax.axis("off")
plt.show()

# %% [markdown]
# Means over three seeds after ten epochs on all images are in the README: 0.811 for LeNet and 0.835 with
# batch normalisation, and every seed beside them, since a single run's test accuracy swings by 0.02 from epoch
# to epoch.

# %%
assert accuracy > 0.4 and accuracy_bn > 0.6

# %% [markdown]
# ## Exercises
# **1.** How large is the window of the image that one place of the *second* convolution sees? Check with a
# gradient.
#
# <details><summary>Answer</summary>
#
# Five places of the pooled picture are ten pixels of the first convolution, and each of those sees four pixels more:
# 14 × 14. A pixel matters if the gradient by it is not zero; max pooling would hide some, so average here.
#
# ```python
# see = nn.sequential(nn.conv2d(1, 1, 5), nn.avg_pool2d(2), nn.conv2d(1, 1, 5))
# p = see.init(random.key(0))
# by_pixel = grad(lambda image: see.apply(p, image)[0, 0, 2, 2])(torch.zeros(1, 1, 28, 28))[0, 0]
# assert (by_pixel != 0).sum(0).max() == 14 and (by_pixel != 0).sum(1).max() == 14
# ```
#
# </details>
#
# **2.** Which padding keeps the size of an image, for an odd kernel k and stride 1?
#
# <details><summary>Answer</summary>
#
# n + 2p − k + 1 = n, so p = (k − 1)/2. `padding="same"` says it in words.
#
# ```python
# assert all(places(28, k, (k - 1) // 2, 1) == 28 for k in (1, 3, 5, 7))
# same = nn.conv2d(1, 1, 5, padding="same")
# assert same.apply(same.init(random.key(0)), torch.zeros(1, 1, 28, 28)).shape[-2:] == (28, 28)
# ```
#
# </details>
#
# **3.** Replace the sigmoids by ReLUs, with a rate of 0.1. Is there a sleep?
#
# <details><summary>Answer</summary>
#
# Hardly. A ReLU has slope 1 where it is on, so gradients reach the first layer. (Draw the weights by
# Xavier's rule here too: with smaller ones there is a short sleep even so.)
#
# ```python
# def draw(make, *sizes):
#     return make(*sizes, weight_init=nn.init.xavier_uniform())
#
# conv, dense = nn.conv2d, nn.linear
# relu = nn.sequential(
#     draw(conv, 1, 6, 5), nn.relu, nn.max_pool2d(2), draw(conv, 6, 16, 5), nn.relu, nn.max_pool2d(2),
#     nn.flatten(), draw(dense, 256, 120), nn.relu, draw(dense, 120, 84), nn.relu, draw(dense, 84, 10))
# quick = fdl.train_step(fdl.supervised(relu, losses.cross_entropy), optim.sgd(lr=0.1))
# awake = fdl.TrainState.create(relu, optim.sgd(lr=0.1), key=random.key(0))
# rows, values = data.epoch_indices(random.key(1), len(train.x), 64), []
# for i in range(100):
#     batch = data.to_float(data.batch(train, data.take(rows, i)))
#     awake, found = quick(awake, batch)
#     values.append(found["loss"].value)
# assert sum(values[80:]) / 20 < 1.3
# ```
#
# </details>
#
# Next: [12 Many models at once](12_many_models.ipynb)
