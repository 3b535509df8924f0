# %% [markdown]
# # 13 Per-sample gradients, Hessians, MAML
#
# **You will learn** what becomes easy once a gradient is a function like any other: the gradient of
# every single example, clipping for privacy, curvature and how it bounds the learning rate, and
# gradients *through* training: of learning rates, and of the weights that training starts from.

# %%
import matplotlib.pyplot as plt
import torch
from torch.func import grad, vmap
from torch.testing import assert_close

import fdl
import models
from fdl import data, losses, nn, optim, random, transforms, tree

plt.style.use("fdl.mplstyle")
images = data.fashion_mnist_sample()
model = models.softmax_regression()
loss = fdl.supervised(model, losses.cross_entropy)

# %% [markdown]
# ## The gradient of each example
# **Imperative.** `backward` adds the gradients of a batch up before anyone sees them. To get them
# apart one calls it once for each example.

# %%
params = model.init(random.key(0))
x, y = images.x[:256, None].float() / 255, images.y[:256]

leaves = {name: leaf.clone().requires_grad_() for name, leaf in tree.flatten_dict(params).items()}
loop = []
for i in range(256):
    value, _ = loss(tree.unflatten_dict(leaves), (x[i:i + 1], y[i:i + 1]))
    loop.append(dict(zip(leaves, torch.autograd.grad(value, leaves.values()), strict=True)))

# %% [markdown]
# **Functional.** `vmap` of `grad`, under a name that also knows masks, keys and chunks.

# %%
grads = transforms.per_sample_grads(loss)(params, (x, y))
print({name: list(leaf.shape) for name, leaf in tree.flatten_dict(grads).items()})

for name, leaf in tree.flatten_dict(grads).items():
    assert_close(leaf, torch.stack([one[name] for one in loop]), rtol=1e-4, atol=1e-6)
batch_gradient = grad(lambda p: loss(p, (x, y))[0])(params)
assert tree.allclose(tree.map(lambda g: g.mean(0), grads), batch_gradient, rtol=1e-4, atol=1e-6)

# %% [markdown]
# ### Which images pull hardest?
# Train a little, then take the norm of each example's gradient. An example that is classified with
# confidence pulls at nothing; the long tail is what the model gets wrong, or what is labelled oddly.

# %%
opt = optim.sgd(lr=0.1)
state = fdl.TrainState.create(model, opt, key=random.key(0))
rows = data.epoch_indices(random.key(1), len(images.x), 250)
step = fdl.train_step(loss, opt)
for _ in range(5):
    state, _ = fdl.scan(lambda s, row: step(s, data.to_float(data.batch(images, row))), state, rows)

x_all, y_all = images.x[:, None].float() / 255, images.y
norms = transforms.per_sample_norms(loss, chunk=500)(state.params, (x_all, y_all))
right = model.apply(state.params, x_all).argmax(1) == y_all
assert norms[right].mean() < norms[~right].mean() / 2

_, ax = plt.subplots()
bins = torch.logspace(-2, 1.5, 40).tolist()
ax.hist([norms[right].tolist(), norms[~right].tolist()], bins, stacked=True,
        label=["classified right", "wrong"])
ax.set(xscale="log", xlabel="norm of an example's gradient", ylabel="examples")
ax.legend()
plt.show()

# %%
hardest = norms.topk(8).indices
guesses = model.apply(state.params, x_all[hardest]).argmax(1)
_, axes = plt.subplots(1, 8, figsize=(8, 1.7))
for ax, i, guess in zip(axes, hardest.tolist(), guesses.tolist(), strict=True):
    ax.imshow(images.x[i].numpy())
    ax.set_title(f"{data.LABELS[y_all[i]]},\nnot {data.LABELS[guess]}", fontsize=7)
    ax.axis("off")
plt.show()

# %% [markdown]
# ### Privacy: clip each one, add noise
# In DP-SGD no example may pull harder than C, and noise hides what each of them did. The clipped sum
# is formed chunk by chunk, without ever holding all gradients.

# %%
bound = 0.5
clipped = transforms.clipped_grad_sum(loss, max_norm=bound, chunk=64)(params, (x, y))
scale = (bound / transforms.per_sample_norms(loss)(params, (x, y))).clamp(max=1)
by_hand = tree.map(lambda g: torch.einsum("n,n...->...", scale, g), grads)
assert tree.allclose(clipped, by_hand, rtol=1e-4, atol=1e-5)

# %% [markdown]
# What the clipping promises: whoever leaves the data moves the sum by C at most. Noise of a multiple of
# C then covers it, and descent goes on with what remains; the optimizer is one like any other.

# %%
without = transforms.clipped_grad_sum(loss, max_norm=bound, chunk=64)(params, (x[1:], y[1:]))
moved = tree.map(lambda a, b: a - b, clipped, without)
assert sum((leaf**2).sum() for leaf in tree.leaves(moved)).sqrt() <= bound * 1.001

noise = optim.add_noise(random.key(3), eta=(1.1 * bound / 256) ** 2, gamma=0)    # a variance
private = optim.chain(noise, optim.sgd(lr=0.5))
now, opt_state = params, private.init(params)
for _ in range(30):
    total = transforms.clipped_grad_sum(loss, max_norm=bound, chunk=64)(now, (x, y))
    mean = tree.map(lambda g: g / 256, total)
    updates, opt_state = private.update(mean, opt_state, now)
    now = optim.apply_updates(now, updates)
print(f"loss {loss(params, (x, y))[0]:.2f}, after 30 private steps {loss(now, (x, y))[0]:.2f}")
assert loss(now, (x, y))[0] < 0.75 * loss(params, (x, y))[0]

# %% [markdown]
# ## Curvature
# The Hessian H of the loss says how the gradient changes. For 7,850 parameters it has 62 million
# entries, but a product H·v costs two gradients: the derivative of the gradient along v.

# %%
def f(params):
    return loss(params, (x, y))[0]

v = tree.map(torch.ones_like, params)
product = transforms.hvp(f, params, v)

# %%
# Against a difference of gradients, in float64.
p64, v64, x64 = tree.cast((params, v, x), torch.float64)

def f64(params):
    return losses.cross_entropy(model.apply(params, x64), y).mean()

def gradient_at(distance):
    return grad(f64)(tree.map(lambda p, d: p + distance * d, p64, v64))

difference = tree.map(lambda a, b: (a - b) / 2e-4, gradient_at(1e-4), gradient_at(-1e-4))
assert tree.allclose(transforms.hvp(f64, p64, v64), difference, rtol=1e-4, atol=1e-7)

# %% [markdown]
# ### The largest eigenvalue bounds the learning rate
# Multiply by H again and again, and v turns to the direction of the largest curvature λ. A step of
# gradient descent multiplies the distance along it by 1 − ηλ. On a parabola it grows beyond η = 2/λ;
# on a real loss λ changes on the way, so that is where trouble begins, not where training ends.

# %%
def normalised(v):
    norm = sum((leaf**2).sum() for leaf in tree.leaves(v)).sqrt()
    return tree.map(lambda leaf: leaf / norm, v), norm

draws = random.split(random.key(4), 2)
v = {name: random.normal(key, leaf.shape)
     for key, (name, leaf) in zip(draws, tree.flatten_dict(params).items(), strict=True)}
v, _ = normalised(tree.unflatten_dict(v, like=params))
for _ in range(40):
    v, largest = normalised(transforms.hvp(f, params, v))
print(f"largest eigenvalue {largest:.2f}, so 2/λ is {2 / largest:.4f}")

# %%
def descend(eta, steps=60):
    values, now = [], params
    for _ in range(steps):
        values.append(f(now))
        now = tree.map(lambda p, g: p - eta * g, now, grad(f)(now))
    return torch.stack(values)

shares = torch.tensor([0.5, 0.95, 1.5, 3.0])
curves = vmap(descend)(shares * 2 / largest)          # four descents at once
_, ax = plt.subplots()
for share, curve, style in zip(shares.tolist(), curves, ["-", "--", "-.", ":"], strict=True):
    ax.semilogy(curve, style, label=f"{share:g} × 2/λ")
ax.set(xlabel="step", ylabel="loss of the 256 images")
ax.legend()
plt.show()

# %% [markdown]
# Below 2/λ the loss falls at each step. At 1.5 × 2/λ it zigzags, and comes down all the same: the steep
# direction flattens out as the weights leave the start. At 3 × 2/λ the first steps throw the weights far away, and
# the loss swings for the rest of the picture.

# %%
assert (curves[0].diff() < 0).all() and curves[3].max() > 1.5 * curves[3][0]

# %% [markdown]
# ### The whole spectrum of a small model
# A small enough Hessian can be had in full: a tree of blocks, here for 4 × 4 pixels and 170 weights. A few
# directions are steep, most are almost flat, and 17 are flat exactly: to add the same to the weights of
# all ten classes, for any of 16 pixels or the bias, changes no probability.

# %%
small = nn.linear(16, 10)
pooled = torch.nn.functional.avg_pool2d(x, 7).flatten(1)
theta = small.init(random.key(5))
H = transforms.hessian(lambda p: losses.cross_entropy(small.apply(p, pooled), y).mean())(theta)
matrix = torch.cat([torch.cat([H[a][b].reshape(theta[a].numel(), -1) for b in theta], 1)
                    for a in theta])
eigenvalues = torch.linalg.eigvalsh(matrix).flip(0)
assert eigenvalues[-1] > -1e-6                        # convex: nowhere does it curve down
assert (eigenvalues[-17:].abs() < 1e-6).all() and eigenvalues[-18] > 1e-6

_, ax = plt.subplots(figsize=(6, 2.4))
ax.semilogy(range(1, 171), eigenvalues.clamp(min=1e-8), ".")
ax.set(xlabel="rank", ylabel="eigenvalue of H")
plt.show()

# %% [markdown]
# ## Gradients through training
# A step is a function of the state, and rates are tensors in it. So the loss *after* some steps has a
# gradient by the rates, one for each layer, and gradient descent can learn them.

# %%
net = nn.sequential(nn.linear(1, 20), nn.tanh, nn.linear(20, 1))
start = tree.cast(net.init(random.key(6)), torch.float64)
t = torch.linspace(-2, 2, 40, dtype=torch.float64)[:, None]
target = torch.sin(2 * t)

def error(params):
    return losses.mse(net.apply(params, t), target).mean()

def after_ten_steps(log_rates):
    now = start
    for _ in range(10):
        grads = grad(error)(now)
        rate = {layer: log_rates[layer].exp() for layer in now}
        now = {layer: tree.map(lambda p, g, r=rate[layer]: p - r * g, now[layer], grads[layer])
               for layer in now}
    return error(now)

log_rates = {layer: torch.tensor(-3.0, dtype=torch.float64) for layer in start}
by_rates = grad(after_ten_steps)(log_rates)
for layer in log_rates:
    up, down = ({**log_rates, layer: log_rates[layer] + d} for d in (1e-5, -1e-5))
    assert_close(by_rates[layer], (after_ten_steps(up) - after_ten_steps(down)) / 2e-5,
                 rtol=1e-5, atol=1e-9)

# %%
opt, history = optim.adam(0.1), []                    # an optimizer of the rates of another
opt_state = opt.init(log_rates)
for _ in range(40):
    history.append(after_ten_steps(log_rates).item())
    updates, opt_state = opt.update(grad(after_ten_steps)(log_rates), opt_state, log_rates)
    log_rates = optim.apply_updates(log_rates, updates)
print({f"layer {layer}": f"{rate.exp():.3f}" for layer, rate in log_rates.items()},
      f"loss after ten steps: {history[0]:.3f}, then {history[-1]:.3f}")
assert history[-1] < 0.8 * history[0]

# %% [markdown]
# ## MAML: weights that learn quickly
# The same with the weights that training starts from. A task is a sine curve of unknown amplitude and
# phase, seen at ten points. MAML (Finn et al., 2017) looks for weights from which *one* gradient step on those
# points fits the whole curve: a gradient of a gradient step, averaged over tasks by `vmap`.

# %%
def draw_task(key, points):
    k_amplitude, k_phase, k_x = random.split(key, 3)
    amplitude = random.uniform(k_amplitude, (), minval=0.1, maxval=5.0)
    phase = random.uniform(k_phase, (), minval=0.0, maxval=torch.pi)
    x = random.uniform(k_x, (points, 1), minval=-5.0, maxval=5.0)
    return x, amplitude * torch.sin(x - phase)

sine = nn.sequential(nn.linear(1, 40), nn.relu, nn.linear(40, 40), nn.relu, nn.linear(40, 1))

def fit(params, x, y):
    return losses.mse(sine.apply(params, x), y).mean()

def adapt(params, x, y):                              # one step on the points of a task
    return tree.map(lambda p, g: p - 0.01 * g, params, grad(fit)(params, x, y))

def maml_loss(params, batch, *, train, key):
    def of_task(key):
        x, y = draw_task(key, 20)
        return fit(adapt(params, x[:10], y[:10]), x[10:], y[10:])
    value = vmap(of_task)(random.split(key, 25)).mean()
    return value, {"loss": fdl.metrics.mean(value.detach()[None])}

# %%
opt = optim.adam(1e-3)
meta_step = fdl.train_step(maml_loss, opt)
state = fdl.TrainState.create(sine, opt, key=random.key(0))
many = fdl.jit(lambda s: fdl.scan(lambda s, _: meta_step(s, ()), s, length=3000))
trained, found = many(state)                          # 3,000 meta-steps, one program

x, y = draw_task(random.key(7), 410)
order = x[10:, 0].argsort()
_, axes = plt.subplots(1, 2, figsize=(7, 2.8), sharey=True)
starts = {"at random": state.params, "by MAML": trained.params}
for ax, (name, now) in zip(axes, starts.items(), strict=True):
    ax.plot(x[10:][order], y[10:][order], "k", linewidth=1, label="the task")
    ax.plot(x[:10], y[:10], "k^", label="10 points")
    moved = adapt(now, x[:10], y[:10])
    for label, p, style in (("before", now, ":"), ("after one step", moved, "--")):
        ax.plot(x[10:][order], sine.apply(p, x[10:][order]), style, label=label)
    ax.set(title=f"start {name}", xlabel="x")
axes[0].legend(fontsize=7)
plt.show()

# %%
def errors(params):                                   # before and after one step, mean of 200 tasks
    def of_task(key):
        x, y = draw_task(key, 110)
        now = adapt(params, x[:10], y[:10])
        return torch.stack([fit(params, x[10:], y[10:]), fit(now, x[10:], y[10:])])
    return vmap(of_task)(random.split(random.key(9), 200)).mean(0)

untrained, learned = errors(state.params), errors(trained.params)
print("start at random:", untrained.tolist(), " by MAML:", learned.tolist())
assert learned[1] < 0.5 * learned[0] and learned[1] < 0.5 * untrained[1]

# %% [markdown]
# Training on goes further: `docs/examples/maml.py` takes five times as many
# meta-steps, for five points as well, and reaches 0.62 (5 points) and 0.39 (10 points) after one step.
#
# ## Exercises
# **1.** The trace of H without H: for random signs z, the mean of zᵀHz. Compare it with the trace of `matrix`.
#
# <details><summary>Answer</summary>
#
# ```python
# def g(p):
#     return losses.cross_entropy(small.apply(p, pooled), images.y[:256]).mean()
#
# trace = transforms.hutchinson_trace(
#     lambda z: transforms.hvp(g, theta, z), theta, random.key(8), samples=400, chunk=100)
# assert abs(trace - matrix.trace()) < 0.1 * matrix.trace()
# ```
#
# </details>
#
# **2.** First-order MAML treats the inner gradient as a constant. Change one line of `adapt`.
#
# <details><summary>Answer</summary>
#
# Stop the gradient of the gradient: the outer derivative then passes through p alone.
#
# ```python
# def first_order(params, x, y):
#     grads = transforms.stop_gradient(grad(fit)(params, x, y))
#     return tree.map(lambda p, g: p - 0.01 * g, params, grads)
#
# same = first_order(state.params, x[:10], y[:10])
# assert tree.allclose(same, adapt(state.params, x[:10], y[:10]))        # the value is the same
# ```
#
# </details>
#
# Next: [14 Coming from nn.Module, coming from JAX](14_coming_from.ipynb)
