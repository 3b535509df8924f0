# %% [markdown]
# # 07 Weight decay and dropout
# Curriculum: M2, M3
#
# **You will learn** two ways to keep a model from learning its examples by heart: weight decay,
# written in three places that give the same numbers; and dropout, whose masks here follow from a
# key instead of hidden state.

# %%
import matplotlib.pyplot as plt
import torch
from torch.func import grad, vmap
from torch.testing import assert_close

import fdl
import models
from fdl import data, losses, metrics, nn, optim, random, tree

plt.style.use("fdl.mplstyle")

# %% [markdown]
# ## M2 Twenty examples, 200 weights
# y = 0.05 + Σ 0.01 xᵢ + noise, with 200 features xᵢ and 20 examples to learn from. Infinitely many
# weights fit 20 examples exactly, and nearly all of them say nonsense about others. 100
# examples are kept back to see that.

# %%
drawn = data.synthetic_linear(random.key(0), [0.01] * 200, 0.05, n=120, noise=0.01)
train, test = (data.Dataset(drawn.x[rows], drawn.y[rows])
               for rows in (slice(20), slice(20, None)))
model = models.linreg(200, std=1.0)         # weights start at N(0, 1), much too large

# %% [markdown]
# Weight decay adds the penalty λ · ½ Σ w² to the loss, so its gradient adds λw to that of w: each
# step also shrinks the weights by the factor 1 − ηλ. The bias shifts the fit and cannot
# overfit, so it does not decay. That is the `mask`.
#
# λ is a tensor in the optimizer's state, so models for many λ can be trained side by side, by
# `vmap` over the step (notebook 12). All start from the same key.

# %%
decays = torch.tensor([0.0, 3.0, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0, 30.0, 100.0])
opt = optim.chain(optim.add_decayed_weights(1.0, mask="weight"), optim.sgd(lr=0.003))
loss = fdl.supervised(model, losses.squared_loss)
same_key = random.key(1).expand(len(decays), 2)
states = fdl.population.create(model, opt, same_key, {"weight_decay": decays})

step = vmap(fdl.train_step(loss, opt), in_dims=(0, None))
evaluate = vmap(fdl.eval_step(loss), in_dims=(0, None))

# %%
curves = []
for epoch in range(100):
    both = [evaluate(states, part)["loss"].value for part in (train, test)]
    curves.append(torch.stack([*both, states.params["weight"].norm(dim=(1, 2)).double()]))
    rows = data.epoch_indices(random.fold_in(random.key(2), epoch), n=20, batch_size=1)
    for row in zip(*rows, strict=True):
        states, _ = step(states, data.to_float(data.batch(train, row)))
curves = torch.stack(curves)                # [epochs, (train, test, ‖w‖), λ]

# %%
_, axes = plt.subplots(1, 2, figsize=(6, 2.7), sharey=True)
for i, ax in enumerate(axes):
    ax.semilogy(curves[:, 0, i], label="20 training examples")
    ax.semilogy(curves[:, 1, i], "--", label="100 test examples")
    ax.set(title=f"λ = {decays[i]:g}", xlabel="epoch")
axes[0].set(ylabel="mean of ½ (ŷ − y)²")
axes[0].legend()
plt.show()

# %%
for i in (0, 1):
    fit, other, norm = curves[-1, :, i].tolist()
    print(f"λ = {decays[i]:g}: training {fit:.1e}, test {other:.1e}, ‖w‖ = {norm:.3f}")
assert curves[-1, 1, 0] > 1e6 * curves[-1, 0, 0]     # without decay: by heart
assert curves[-1, 1, 1] < curves[-1, 1, 0] / 1000

# %% [markdown]
# Without decay the training loss falls to what float32 can tell from 0, and the test loss stays
# where it began. With λ = 3 they fall together. But does decay find the weights 0.01? The true ones
# have the norm 0.01 · √200 ≈ 0.14. The whole row of λ answers:

# %%
order = decays.argsort()[1:]
_, axes = plt.subplots(1, 2, figsize=(6, 2.5), sharex=True)
axes[0].loglog(decays[order], curves[-1, 0, order], "o-", label="training")
axes[0].loglog(decays[order], curves[-1, 1, order], "s--", label="test")
axes[0].set(xlabel="λ", ylabel="mean of ½ (ŷ − y)²")
axes[0].legend()
axes[1].loglog(decays[order], curves[-1, 2, order], "^-")
axes[1].axhline(0.01 * 200**0.5, color="k", linestyle=":", label="true weights")
axes[1].set(xlabel="λ", ylabel="‖w‖")
axes[1].legend()
plt.show()

# %% [markdown]
# Too little decay leaves the start's noise in the weights, and very much leaves nothing but the
# bias. A test loss of 0.01 is that of answering 0.05 to everything: ½ · 200 · 0.01². Twenty
# examples do not say much more than that; what decay buys here is that the model no longer
# claims to know.

# %% [markdown]
# ## M2 Three places for the same λ
# **Imperative.** `SGD(weight_decay=λ)`, with parameter groups to spare the bias.

# %%
DOUBLE, decay, lr = torch.float64, 3.0, 0.003
start = tree.cast(model.init(random.key(1)), DOUBLE)
x, y = train.x.double(), train.y.double()

net = torch.nn.Linear(200, 1).double()
net.load_state_dict(start)
sgd = torch.optim.SGD([{"params": [net.weight], "weight_decay": decay},
                       {"params": [net.bias]}], lr=lr)
for _ in range(50):
    sgd.zero_grad()
    losses.squared_loss(net(x), y).mean().backward()
    sgd.step()

# %% [markdown]
# **Functional.** A penalty in the loss, for whatever part of the parameters it is given:

# %%
def penalised(params, batch, **options):
    value, found = loss(params, batch, **options)
    return value + decay * losses.l2_penalty(params["weight"]), found

def run(loss, opt):
    step = fdl.train_step(loss, opt)
    state = fdl.TrainState.create(model, opt, key=random.key(1), params=start)
    for _ in range(50):
        state, _ = step(state, (x, y))
    return state.params

by_penalty = run(penalised, optim.sgd(lr))

# %% [markdown]
# or a part of the optimizer, which needs no change in the loss:

# %%
decayed = optim.add_decayed_weights(decay, mask="weight")
by_optimizer = run(loss, optim.chain(decayed, optim.sgd(lr)))

for params in (by_penalty, by_optimizer):
    assert_close(params["weight"], net.weight.detach(), rtol=0, atol=1e-12)
    assert_close(params["bias"], net.bias.detach(), rtol=0, atol=1e-12)
print(f"‖w‖ from {start['weight'].norm():.2f} to {by_optimizer['weight'].norm():.2f}, three times")

# %% [markdown]
# The penalty also counts in the loss that is minimised, while `found["loss"]` stays the loss of the
# data. The mask is a glob on paths (`"*.weight"`) or a function of path and leaf, so it fits any
# model; a parameter group is a list of objects, made anew for each.

# %% [markdown]
# ## M3 Dropout
# In training each hidden number is set to 0 with probability p, and the others are divided by
# 1 − p, so that the mean stays. No unit can rely on another one being there. In evaluation nothing
# is dropped. Here are pixels of an image under it:

# %%
image = data.fashion_mnist_sample().x[0].float() / 255
_, axes = plt.subplots(1, 4, figsize=(6, 1.9))
for i, (ax, rate) in enumerate(zip(axes, (0.0, 0.2, 0.5, 0.8), strict=True)):
    key = random.fold_in(random.key(3), i)
    dropped = nn.dropout(rate).apply({}, image, train=True, key=key)
    ax.imshow(dropped.numpy(), vmin=0, vmax=2)
    ax.set_title(f"p = {rate}")
    ax.axis("off")
plt.show()

# %% [markdown]
# **Imperative.** A module knows its mode, and torch's generator knows where it is. Both are changed
# from elsewhere, and the mask cannot be asked for again unless the generator is set back.

# %%
module = torch.nn.Dropout(0.5)
h = torch.ones(8)
torch.manual_seed(0)
first, second = module(h), module(h)
assert not torch.equal(first, second)           # same call, other result
module.eval()
assert torch.equal(module(h), h)

# %% [markdown]
# **Functional.** Mode and randomness are arguments: `train` and `key`. The same key gives the same
# mask, another key another one.

# %%
layer, key = nn.dropout(0.5), random.key(4)
first = layer.apply({}, h, train=True, key=key)
assert torch.equal(first, layer.apply({}, h, train=True, key=key))
assert torch.equal(first, torch.where(random.uniform(key, (8,)) >= 0.5, h / 0.5, 0))
assert torch.equal(layer.apply({}, h), h)       # train=False is the default
print(first.tolist())

# %% [markdown]
# To train and forget the key is an error, rather than dropout silently switched off:

# %%
try:
    layer.apply({}, h, train=True)
except ValueError as error:
    print(error)

# %% [markdown]
# ### The mean is preserved
# The mean over 10,000 masks, one `vmap` over keys, comes back to the input to within the noise
# √(p / (1 − p) / 10,000) ≈ 0.01:

# %%
keys = random.split(random.key(5), 10_000)
x = torch.linspace(-1, 1, 5)
masked = vmap(lambda key: layer.apply({}, x, train=True, key=key))(keys)
print("x          ", x.tolist(), "\nmean       ", [round(m, 2) for m in masked.mean(0).tolist()])
print(f"kept       {(masked[:, 0] != 0).double().mean():.3f}")
assert_close(masked.mean(0), x, rtol=0, atol=0.05)

# %% [markdown]
# ### Which masks a step used
# A layer's key follows from the step's by its position: layer i of `nn.sequential` gets
# `fold_in(key, i)`. So the masks of any step can be made again, here to compare a gradient with
# the imperative one, mask for mask, for the perceptron 784–256–256–10 with rates 0.2 and 0.5.

# %%
model = models.mlp(hidden=(256, 256), rates=(0.2, 0.5))
names = ["flatten", "hidden0", "relu0", "dropout0", "hidden1", "relu1", "dropout1", "output"]
params = tree.cast(model.init(random.key(0)), DOUBLE)
sample = data.fashion_mnist_sample()
x, y = (sample.x[:32, None].double() / 255, sample.y[:32])

def objective(params):
    return losses.cross_entropy(model.apply(params, x, train=True, key=key), y)
grads = tree.flatten_dict(grad(objective)(params))

# %%
leaves = {path: leaf.clone().requires_grad_() for path, leaf in tree.flatten_dict(params).items()}
h = x.flatten(1)
for i, rate in enumerate((0.2, 0.5)):
    h = torch.relu(h @ leaves[f"hidden{i}.weight"].T + leaves[f"hidden{i}.bias"])
    layer_key = random.fold_in(key, names.index(f"dropout{i}"))
    h = h * (random.uniform(layer_key, h.shape) >= rate) / (1 - rate)
logits = h @ leaves["output.weight"].T + leaves["output.bias"]
torch.nn.functional.cross_entropy(logits, y).backward()
for path, leaf in leaves.items():
    assert_close(grads[path], leaf.grad, rtol=0, atol=1e-12)

# %% [markdown]
# ### Under `vmap`: one mask or many
# Whether the members of a population share a mask is said by the axis of the key. Torch's
# `nn.Dropout` under `vmap` has to be told by a flag, `randomness="same"` or `"different"`.

# %%
two_keys, x2 = random.split(key), torch.ones(2, 6)
def drop(x, key):
    return layer.apply({}, x, train=True, key=key)
shared = vmap(drop, (0, None))(x2, key)
own = vmap(drop)(x2, two_keys)
assert torch.equal(shared[0], shared[1])
assert torch.equal(own[1], drop(x2[1], two_keys[1]))    # as if it were alone
print(own.tolist())

# %% [markdown]
# ## M3 What it does in training
# On the sample of 6,000 images a perceptron learns by heart sooner than on 60,000. The same model
# is trained with and without dropout, and with momentum so that it takes fewer epochs. Rates of 0
# drop nothing, but keep every layer at its position: so each layer draws from the same key, and
# both runs start from the same weights.

# %%
held_out = data.fashion_mnist_sample(train=False)
held_out = data.Batch(held_out.x[:, None].float() / 255, held_out.y)
opt = optim.sgd(lr=0.1, momentum=0.9)

def curve(rates, epochs=30):
    model = models.mlp(hidden=(256, 256), rates=rates)
    loss = fdl.supervised(model, losses.cross_entropy, {"accuracy": metrics.accuracy})
    step, evaluate = fdl.train_step(loss, opt), fdl.eval_step(loss)
    seen = data.Batch(sample.x[:, None].float() / 255, sample.y)

    @fdl.jit
    def epoch(state, sample, rows):
        return fdl.scan(lambda s, row: step(s, data.to_float(data.batch(sample, row))), state, rows)[0]

    state, found = fdl.TrainState.create(model, opt, key=random.key(0)), []
    for number in range(epochs):
        state = epoch(state, sample, data.epoch_indices(
            random.fold_in(random.key(1), number), n=6000, batch_size=256))
        found.append([evaluate(state, part)["loss"].value for part in (seen, held_out)])
    accuracy = [evaluate(state, part)["accuracy"].value for part in (seen, held_out)]
    return torch.tensor(found), torch.tensor(accuracy)

# %%
starts = [models.mlp(hidden=(256, 256), rates=rates).init(random.key(0))
          for rates in ((0.0, 0.0), (0.2, 0.5))]
assert not tree.diff(*starts)

without, accuracy_without = curve((0.0, 0.0))
with_dropout, accuracy_with = curve((0.2, 0.5))
print("          training  test")
for name, pair in (("without", accuracy_without), ("dropout", accuracy_with)):
    print("{:9} {:8.3f}  {:.3f}".format(name, *pair.tolist()))

# %%
_, axes = plt.subplots(1, 2, figsize=(6, 2.6), sharey=True)
for ax, found, title in zip(axes, (without, with_dropout), ("without", "rates 0.2 and 0.5"),
                            strict=True):
    ax.plot(range(1, 31), found[:, 0], label="training images")
    ax.plot(range(1, 31), found[:, 1], "--", label="test images")
    ax.set(title=title, xlabel="epoch", ylim=(0, 1.2))
axes[0].set(ylabel="mean loss, nothing dropped")
axes[0].legend()
plt.show()
gap = [(found[-1, 1] - found[-1, 0]).item() for found in (without, with_dropout)]
print(f"gap between test and training loss: {gap[0]:.2f} without, {gap[1]:.2f} with dropout")

# %% [markdown]
# Dropout narrows the gap between images seen and not seen. It is no gift: with the course's rates
# and ten epochs of all 60,000 images, where there is little to learn by heart, the perceptron
# with dropout stays behind the smaller one without (0.832 and 0.857 in the README's table).

# %% [markdown]
# ## Exercises
# **1.** For plain SGD a penalty and a decay are the same. Are they for Adam, and which of the two
# is `adamw`?
#
# <details><summary>Answer</summary>
#
# Adam divides by the size of the gradient. A penalty's λw is part of that gradient, and so is
# divided as well; `adamw` takes the decay straight from the weights, undivided.
#
# ```python
# p, g = {"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([0.001, 10.0])}
# for make in (optim.adam, optim.adamw):
#     opt = make(lr=0.1, weight_decay=0.5)
#     print(make.__name__, opt.update(g, opt.init(p), p)[0]["w"])
# adam, adamw = (
#     opt.update(g, opt.init(p), p)[0]["w"]
#     for opt in (optim.adam(0.1, weight_decay=0.5), optim.adamw(0.1, weight_decay=0.5))
# )
# assert (adamw < adam).all()       # here adamw goes further: by lr · λ · w
# assert_close(adamw - adam, torch.tensor([-0.05, -0.05]), rtol=0, atol=1e-4)
# ```
#
# </details>
#
# **2.** Keep dropout on in evaluation, with 100 keys, and average the probabilities. What does the
# spread over the keys tell?
#
# <details><summary>Answer</summary>
#
# Each key is another thinned net, so this is an ensemble (*Monte Carlo dropout*); where its members
# disagree, the model is unsure.
#
# ```python
# p32 = tree.cast(params, torch.float32)
# keys = random.split(random.key(9), 100)
# def probabilities(key):
#     return model.apply(p32, held_out.x[:20], train=True, key=key).softmax(1)
# members = vmap(probabilities)(keys)               # [100, 20, 10]
# average, spread = members.mean(0), members.std(0)
# assert_close(average.sum(1), torch.ones(20))
# assert spread.max() > 0
# ```
#
# </details>
#
# **3.** Use λ Σ |w| as the penalty in the example with 200 weights. What is different about what it
# does to small weights?
#
# <details><summary>Answer</summary>
#
# Its gradient is ±λ however small w is, so it pushes small weights to 0 as hard as large ones,
# where λw fades. (A step overshoots 0 by up to ηλ: that is how small they get.)
#
# ```python
# linear = models.linreg(200, std=1.0)
# def absolute(params, batch, **options):
#     value, found = loss(params, batch, **options)
#     return value + 3.0 * params["weight"].abs().sum(), found
# opt = optim.sgd(0.003)
# step1 = fdl.train_step(absolute, opt)
# state = fdl.TrainState.create(linear, opt, key=random.key(1))
# for _ in range(1000):
#     state, _ = step1(state, train)
# assert state.params["weight"].abs().max() < 2 * 3.0 * 0.003
# ```
#
# </details>
#
# Next: [08 Models and parameters](08_models_and_parameters.ipynb)
