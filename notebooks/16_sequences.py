# %% [markdown]
# # 16 Sequences: GRU and attention
# Curriculum: R1, R2
#
# **You will learn** that a recurrent network is a `scan`, and what a gate does to its gradients; that
# attention is a weighted mean, and can be written as a `scan` too; and how a transformer is made of it.

# %%
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.func import grad, jvp, vmap
from torch.testing import assert_close

import fdl
import models
from fdl import losses, metrics, nn, optim, random, tree

plt.style.use("fdl.mplstyle")
float64 = torch.float64

# %% [markdown]
# ## R1 A network over time
# A recurrent network reads a sequence step by step, and a state h carries what it has seen:
# hₜ = f(hₜ₋₁, xₜ). That is a `scan`: `(carry, x) -> (carry, y)`.
#
# **Imperative.** A Python loop around a cell.

# %%
features, units, length = 3, 5, 7
xs = random.normal(random.key(0), (length, features), float64)
imperative = torch.nn.GRUCell(features, units).double()
h = torch.zeros(units, dtype=float64)
for x in xs:
    h = imperative(x, h)

# %% [markdown]
# **Functional.** The maths of the gated recurrent unit (Cho et al., 2014), and `scan`. The reset gate r
# says how much of the state enters the proposal n; the update gate z says how much of the state is kept.

# %%
def gru(params, h, x):
    from_x = params["weight_ih"] @ x + params["bias_ih"]
    from_h = params["weight_hh"] @ h + params["bias_hh"]
    (r_x, z_x, n_x), (r_h, z_h, n_h) = from_x.chunk(3), from_h.chunk(3)
    r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + r * n_h)
    return (1 - z) * n + z * h

def last_state(params, xs):
    def step(h, x):
        h = gru(params, h, x)
        return h, h                                       # the carry, and the output of this step
    return fdl.scan(step, xs.new_zeros(units), xs)[0]

params = tree.unflatten_dict({name: p.detach() for name, p in imperative.named_parameters()})
assert_close(last_state(params, xs), h.detach(), rtol=0, atol=1e-12)

# %% [markdown]
# `backward` runs back through time; so does `grad`. The layer `nn.gru` is this scan, for batches, layers and
# both directions, with the parameters of `torch.nn.GRU`.

# %%
h.sum().backward()
through_time = grad(lambda p: last_state(p, xs).sum())(params)
assert_close(through_time["weight_hh"], imperative.weight_hh.grad, rtol=0, atol=1e-12)

layer, module = nn.gru(features, units), torch.nn.GRU(features, units, batch_first=True).double()
weights = tree.unflatten_dict({name: p.detach() for name, p in module.named_parameters()})
y, end = layer.apply(weights, xs[None])
assert_close(y, module(xs[None])[0].detach(), rtol=0, atol=1e-12)

# %% [markdown]
# What is a pure function can be transformed. `torch.nn.GRU` can neither be mapped over its weights nor
# differentiated forwards; here are ten networks at once, and a derivative along a direction.

# %%
ten = vmap(layer.init)(random.split(random.key(1), 10))
ys, _ = vmap(layer.apply, (0, None))(tree.cast(ten, float64), xs[None])
print("ten networks:", list(ys.shape))
first = tree.map(lambda p: p[0].double(), ten)
assert_close(ys[0], layer.apply(first, xs[None])[0], rtol=0, atol=1e-12)

direction = random.normal(random.key(2), (length, features), float64)
_, slope = jvp(lambda xs: last_state(params, xs), (xs,), (direction,))
small = 1e-6
difference = (last_state(params, xs + small * direction)
              - last_state(params, xs - small * direction)) / (2 * small)
assert_close(slope, difference, rtol=1e-6, atol=1e-8)

# %% [markdown]
# ### What the gate is for
# How much does the last state depend on an early input? Without gates the gradient passes W and tanh at
# each step, and shrinks. A GRU whose update gate is open, z ≈ 1, copies its state: as in a residual net, the
# path is an addition. Start it so, with a bias of 3 for z.

# %%
steps, size = 60, 32
inputs = random.normal(random.key(3), (1, steps, size), float64)

def influence(layer, params):
    """The norm of the gradient of the last output by the input of each step."""
    grads = grad(lambda x: layer.apply(params, x)[0][0, -1].sum())(inputs)
    return grads[0].norm(dim=1)

rnn, gated = nn.rnn(size, size), nn.gru(size, size)
ungated = tree.cast(rnn.init(random.key(4)), float64)
usual = tree.cast(gated.init(random.key(4)), float64)
keeps = dict(usual)
bias = keeps["bias_ih_l0"].clone()
bias[size:2 * size] = 3.0                                 # the rows of z
keeps["bias_ih_l0"] = bias
curves = {"RNN": influence(rnn, ungated), "GRU": influence(gated, usual),
          "GRU that starts open": influence(gated, keeps)}
_, ax = plt.subplots()
for (name, values), style in zip(curves.items(), ("--", "-", "-."), strict=True):
    ax.semilogy(range(steps), values, style, label=name)
ax.set(xlabel="step of the input", ylabel="influence on the last output")
ax.legend()
plt.show()
assert curves["RNN"][0] < curves["GRU"][0] < curves["GRU that starts open"][0]

# %% [markdown]
# ## R2 Attention
# Instead of passing a state through every step, let a step look back at all of them. It asks a
# question q; each place has a key k, by which it is found, and a value v, which it answers. The result is a
# mean of the values, with the weights softmax(q · k / √d).

# %%
def attention(q, k, v):                                   # [queries, d], [places, d], [places, d]
    weights = torch.softmax(q @ k.T / math.sqrt(q.shape[-1]), -1)
    return weights @ v

d, places = 8, 40
q, k, v = (random.normal(key, (places, d), float64) for key in random.split(random.key(5), 3))
assert_close(attention(q, k, v), F.scaled_dot_product_attention(q[None], k[None], v[None])[0],
             rtol=0, atol=1e-12)

# %% [markdown]
# ### … as a scan
# The weights of all queries and places are a big matrix, which need not exist at once. Read the places one after the
# other, and carry for each query the greatest score so far, the sum of the exponentials, and
# the sum of values. When a greater score comes, the sums are scaled down (Milakov and Gimelshein, 2018).
# Fast kernels for attention do this, by blocks.

# %%
def attention_by_scan(q, k, v):
    def step(carry, place):
        greatest, total, values = carry
        key, value = place
        score = q @ key / math.sqrt(d)                    # [queries]
        new = torch.maximum(greatest, score)
        scale, weight = (greatest - new).exp(), (score - new).exp()
        total = scale * total + weight
        values = scale[:, None] * values + weight[:, None] * value
        return (new, total, values), ()

    start = q @ k[0] / math.sqrt(d), q.new_zeros(len(q)), torch.zeros_like(q)
    (_, total, values), _ = fdl.scan(step, start, (k, v))
    return values / total[:, None]

assert_close(attention_by_scan(q, k, v), attention(q, k, v), rtol=0, atol=1e-12)
by_k = [grad(lambda k, f=f: f(q, k, v).square().sum())(k) for f in (attention, attention_by_scan)]
assert_close(*by_k, rtol=0, atol=1e-10)

# %% [markdown]
# **Imperative and functional.** The layer projects queries, keys and values with learned weights and attends
# with several heads. It has the parameters of torch's.

# %%
functional = nn.multihead_attention(d, 2)
module = torch.nn.MultiheadAttention(d, 2, batch_first=True).double()
weights = tree.unflatten_dict({name: p.detach() for name, p in module.named_parameters()})
sequence = q[None]
assert_close(functional.apply(weights, sequence),
             module(sequence, sequence, sequence)[0].detach(), rtol=0, atol=1e-12)

# %% [markdown]
# With `causal=True` a place sees no later one, so that a model can learn to say what comes next. The
# gradient shows who sees whom.

# %%
causal = nn.multihead_attention(d, 2, causal=True)
seen = torch.autograd.functional.jacobian(
    lambda x: causal.apply(weights, x[None])[0].sum(1), q[:6]).abs().sum(2) > 0
assert torch.equal(seen, torch.ones(6, 6).tril().bool())

# %% [markdown]
# ### A small task: what came first?
# Thirty random letters; the answer is the first of them. For attention this is a question and a key, and
# as near as any other place. A recurrent network must carry it through every step.

# %%
letters, length, width = 8, 30, 32

def position(length):
    """Add a learned vector to each place, since attention does not see where a place is."""
    return nn.Model(
        init=lambda key: {"weight": random.normal(key, (length, width))},
        apply=lambda params, x, *, train=False, key=None: x + params["weight"])

def last(x):
    return x[:, -1]

two = {
    "attention": nn.sequential(
        nn.embedding(letters, width), position(length),
        nn.transformer_encoder_layer(width, 2, dim_feedforward=64, dropout=0.0, norm_first=True),
        last, nn.linear(width, letters)),
    "GRU": nn.sequential(
        nn.embedding(letters, width), nn.gru(width, width), lambda outputs: last(outputs[0]),
        nn.linear(width, letters)),
}

def learn(model, steps=60):
    opt = optim.adam(optim.schedules.warmup_cosine(0.01, 10, steps))
    loss = fdl.supervised(model, losses.cross_entropy, {"accuracy": metrics.accuracy})
    step = fdl.train_step(loss, opt)
    state, curve = fdl.TrainState.create(model, opt, key=random.key(0)), []
    for key in random.split(random.key(9), steps):        # new sequences in every step
        sequences = random.randint(key, (64, length), 0, letters)
        state, found = step(state, (sequences, sequences[:, 0]))
        curve.append(found["accuracy"].value.item())
    return torch.tensor(curve)

accuracies = {name: learn(model) for name, model in two.items()}
_, ax = plt.subplots()
for (name, values), style in zip(accuracies.items(), ("-", "--"), strict=True):
    ax.plot(values.view(-1, 5).mean(1).repeat_interleave(5), style, label=name)
ax.axhline(1 / letters, color="k", linestyle=":", label="guessing")
ax.set(xlabel="step", ylabel="accuracy")
ax.legend()
plt.show()
final = {name: values[-20:].mean().item() for name, values in accuracies.items()}
print({name: round(value, 3) for name, value in final.items()})
assert final["attention"] > 0.9 and final["attention"] > final["GRU"]

# %% [markdown]
# The transformer layer here is attention and two linear layers, each with a residual sum and a norm.
# `models.transformer` cuts images into patches of 4 × 4 pixels, and reads them in the same way.

# %%
model = models.transformer()
images = models.transformer().init(random.key(0))
print(f"{tree.size(images):,} parameters in", ", ".join(images))

# %% [markdown]
# ## Exercises
# **1.** Write attention by scan for a causal mask, where query i sees the places up to i.
#
# <details><summary>Answer</summary>
#
# The place needs its number, and its score is −∞ for the queries before it. Place 0 is seen by all, so
# that no sum is empty.
#
# ```python
# def causal_by_scan(q, k, v):
#     index = torch.arange(len(q))
#
#     def step(carry, place):
#         greatest, total, values = carry
#         i, key, value = place
#         score = torch.where(index >= i, q @ key / math.sqrt(d), -math.inf)
#         new = torch.maximum(greatest, score)
#         scale, weight = (greatest - new).exp(), (score - new).exp()
#         values = scale[:, None] * values + weight[:, None] * value
#         return (new, scale * total + weight, values), ()
#
#     start = q @ k[0] / math.sqrt(d), q.new_zeros(len(q)), torch.zeros_like(q)
#     (_, total, values), _ = fdl.scan(step, start, (index, k, v))
#     return values / total[:, None]
#
# theirs = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
# assert_close(causal_by_scan(q, k, v), theirs, rtol=0, atol=1e-12)
# ```
#
# </details>
#
# **2.** A recurrence without gates, hₜ = a hₜ₋₁ + xₜ, is a weighted sum of the inputs. Which weights? And
# how can it be computed for all t in log₂ n rounds?
#
# <details><summary>Answer</summary>
#
# xₛ counts aᵗ⁻ˢ. Two steps h ← a h + b, h ← a′ h + b′ are one, h ← a′ a h + (a′ b + b′), and this
# composition is associative.
#
# ```python
# a = 0.9 * torch.ones(40, dtype=float64)
# x = random.normal(random.key(6), (40,), float64)
#
# def then(first, second):
#     return second[0] * first[0], second[0] * first[1] + second[1]
#
# _, at_once = fdl.associative_scan(then, (a, x))
# one_by_one = fdl.scan(lambda h, x: (0.9 * h + x,) * 2, x.new_zeros(()), x)[1]
# assert_close(at_once, one_by_one, rtol=0, atol=1e-12)
# ages = torch.arange(40)[:, None] - torch.arange(40)
# assert_close(at_once, torch.where(ages >= 0, 0.9**ages.double(), 0) @ x, rtol=0, atol=1e-12)
# ```
#
# </details>
#
# Next: [17 Your own images](17_your_own_images.ipynb)
