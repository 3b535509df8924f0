# %% [markdown]
# # 02 Gradients as functions
# Curriculum: A1
#
# **You will learn** that a gradient needs no flags and no tape that you see: `grad` takes a
# function and returns its derivative, a function again. So derivatives compose: of trees, in
# batches, and of themselves.

# %%
import matplotlib.pyplot as plt
import torch
from torch.func import grad, grad_and_value, jacrev, jvp, vjp, vmap
from torch.testing import assert_close

from fdl import optim, random, transforms, tree

plt.style.use("fdl.mplstyle")
torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## A1 Flags, leaves and a tape
# Take f(x) = Σ xᵢ³, with the gradient 3x². **Imperative.** A tensor is flagged; what is computed
# from it is recorded; `backward` walks the record back and *writes* into the field `.grad` of the
# leaves, the tensors that were not computed from others.

# %%
def f(x):
    return (x**3).sum()

x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
y = f(x)
y.backward()
print(f"x: leaf {x.is_leaf}, made by {x.grad_fn}, gradient {x.grad.tolist()}")
print(f"y: leaf {y.is_leaf}, made by {y.grad_fn.name()}")

# %% [markdown]
# **Functional.** `grad(f)` is the function x ↦ ∂f/∂x. It takes a plain tensor and returns a plain
# tensor.

# %%
df = grad(f)
at = torch.tensor([1.0, 2.0, 3.0])
assert_close(df(at), x.grad, rtol=0, atol=1e-12)
assert not at.requires_grad and not df(at).requires_grad
gradient, value = grad_and_value(f)(at)      # both at once (in JAX the value comes first)

# %% [markdown]
# ### Nothing to zero
# **Imperative.** `backward` *adds* to `.grad`. Forget `zero_grad` and the second step uses the sum
# of two gradients: no error, only worse training.

# %%
f(x).backward()                              # a second time, without x.grad.zero_()
assert_close(x.grad, 2 * df(at), rtol=0, atol=1e-12)
x.grad.zero_()
f(x).backward()
assert_close(x.grad, df(at), rtol=0, atol=1e-12)

# %% [markdown]
# **Functional.** A function called twice returns the same twice. If a sum over two batches is
# wanted, one writes `+`.

# %%
assert torch.equal(df(at), df(at))

# %% [markdown]
# ### `no_grad` and stop-gradient
# `torch.no_grad()` says "do not record here", mostly around an optimizer's update. Here an update
# is outside the function that is differentiated, so nothing needs saying. What remains is the wish
# to treat a value *inside* as a constant: y = x² + sg(x³), where sg stops the gradient. At x = 1
# the derivative is 2x = 2; without sg it would be 2x + 3x² = 5.

# %%
x = torch.tensor(1.0, requires_grad=True)    # imperative
with torch.no_grad():
    cube = x**3
(x**2 + cube).backward()

sg = transforms.stop_gradient                # functional: `detach`, for trees
dy = grad(lambda x: x**2 + sg(x**3))(torch.tensor(1.0))
assert x.grad == dy == 2
assert grad(lambda x: x**2 + x**3)(torch.tensor(1.0)) == 5

# %% [markdown]
# ## A1 Outputs that are vectors: `vjp` and `jvp`
# Let g take ℝ² to ℝ³. Its derivative at x is the Jacobian J, a 3 × 2 matrix. It is rarely built;
# two products with it are enough:
#
# | | asks | takes | gives |
# |---|---|---|---|
# | `vjp`, backward | how does uᵀg change with each input? | u ∈ ℝ³, like the output | uᵀJ ∈ ℝ² |
# | `jvp`, forward | how does g change if x moves along v? | v ∈ ℝ², like the input | Jv ∈ ℝ³ |
#
# `grad` is `vjp` for one output, with u = 1: however many inputs, one pass. That is why training
# goes backwards.

# %%
def g(x):
    return torch.stack([x[0] * x[1], x[0].sin(), x[1] ** 2])

x, u, v = torch.tensor([0.5, 2.0]), torch.tensor([1.0, -1.0, 0.5]), torch.tensor([0.3, 0.7])
J = torch.tensor([[2.0, 0.5],                # by hand: ∂(x₀x₁)
                  [x[0].cos(), 0.0],         #          ∂ sin x₀
                  [0.0, 4.0]])               #          ∂ x₁²
_, pull_back = vjp(g, x)
_, pushed = jvp(g, (x,), (v,))
assert_close(pull_back(u)[0], u @ J, rtol=0, atol=1e-12)
assert_close(pushed, J @ v, rtol=0, atol=1e-12)
assert_close(jacrev(g)(x), J, rtol=0, atol=1e-12)

# %% [markdown]
# **Imperative.** `backward(u)` on a vector is the same `vjp`. It has no sibling for `jvp`: forward
# mode is another interface there (`torch.autograd.forward_ad`).

# %%
leaf = x.clone().requires_grad_()
g(leaf).backward(u)
assert_close(leaf.grad, pull_back(u)[0], rtol=0, atol=1e-12)

# %% [markdown]
# ## A1 Gradients of trees
# A model has many parameters. `grad` takes any tree as its argument and returns a tree of the same
# form, so "update every parameter" is one `tree.map`. Here ŷ = x wᵀ + b and the loss is the mean of
# ½(ŷ − y)².

# %%
keys = random.split(random.key(0), 3)
X = random.normal(keys[0], (20, 3), torch.float64)
y = random.normal(keys[1], (20,), torch.float64)
params = {"w": random.normal(keys[2], (3,), torch.float64), "b": torch.zeros(())}

def loss(params, X, y):
    return ((X @ params["w"] + params["b"] - y) ** 2 / 2).mean()

grads = grad(loss)(params, X, y)             # by the first argument, unless told otherwise
residual = X @ params["w"] + params["b"] - y
by_hand = {"w": X.T @ residual / 20, "b": residual.mean()}
assert tree.allclose(grads, by_hand, rtol=0, atol=1e-12)
params = tree.map(lambda p, g: p - 0.1 * g, params, grads)

# %% [markdown]
# ## Going down
# Gradient descent walks against the gradient: w ← w − η ∂f/∂w. On a valley that is ten times as
# steep across as along, a small rate η creeps, a large one zigzags, and momentum helps. The
# gradient does not know which optimizer will use it, so one line of code draws all paths.

# %%
def valley(w):
    return (w[..., 0] ** 2 + 10 * w[..., 1] ** 2) / 2

def descend(opt, w, steps=30):
    state, path = opt.init(w), [w]
    for _ in range(steps):
        updates, state = opt.update(grad(valley)(w), state, w)
        w = optim.apply_updates(w, updates)
        path.append(w)
    return torch.stack(path)

start = torch.tensor([-4.0, 1.0])
paths = {"η = 0.02": descend(optim.sgd(0.02), start),
         "η = 0.19": descend(optim.sgd(0.19), start),
         "η = 0.02, momentum 0.8": descend(optim.sgd(0.02, momentum=0.8), start)}

# %%
xs, ys = torch.linspace(-4.5, 2, 200), torch.linspace(-1.3, 1.3, 100)
heights = valley(torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1))
_, ax = plt.subplots(figsize=(6, 3.2))
ax.contour(xs, ys, heights, levels=[0.1, 0.5, 1, 2, 4, 7, 11], colors="0.75", linewidths=1)
for (name, path), marker in zip(paths.items(), "osx", strict=True):
    ax.plot(*path.T, marker=marker, markersize=4, linewidth=1, label=name)
ax.plot(0, 0, "k+", markersize=12)
ax.set(xlabel="w₀", ylabel="w₁", title="30 steps of gradient descent, minimum at +")
ax.legend(loc="lower right")
plt.show()

ends = {name: valley(path[-1]).item() for name, path in paths.items()}
print({name: f"{height:.1e}" for name, height in ends.items()})
assert ends["η = 0.02"] > 10 * max(list(ends.values())[1:])

# %% [markdown]
# **Imperative.** The same path with `backward` and `torch.optim.SGD`, to the last digits:

# %%
w = torch.nn.Parameter(start.clone())
sgd = torch.optim.SGD([w], lr=0.02, momentum=0.8)
for _ in range(30):
    sgd.zero_grad()
    valley(w).backward()
    sgd.step()
assert_close(w.detach(), paths["η = 0.02, momentum 0.8"][-1], rtol=0, atol=1e-12)

# %% [markdown]
# ## Gradients compose
# `grad(f)` is a function, so `grad(grad(f))` is its second derivative; and `grad` of a function of
# *one* point becomes one for many points by `vmap`. The curve h(x) = sin(2x)·exp(−x²/4), its slope
# and its curvature:

# %%
def h(x):
    return torch.sin(2 * x) * torch.exp(-(x**2) / 4)

x = torch.linspace(-4, 4, 201)
curves = {"h": h(x), "h′ = grad(h)": vmap(grad(h))(x),
          "h″ = grad(grad(h))": vmap(grad(grad(h)))(x)}
_, ax = plt.subplots()
for (name, curve), style in zip(curves.items(), ["-", "--", ":"], strict=True):
    ax.plot(x, curve, style, label=name)
ax.set(xlabel="x", ylabel="value")
ax.legend()
plt.show()

# %%
slope = (h(x + 1e-5) - h(x - 1e-5)) / 2e-5   # a central difference, good to about 1e-10
assert_close(curves["h′ = grad(h)"], slope, rtol=0, atol=1e-8)

# %% [markdown]
# **Imperative.** The second derivative takes `create_graph=True`, two calls and a sum as a trick to
# get from many points to one number. The numbers are the same.

# %%
points = x.clone().requires_grad_()
(first,) = torch.autograd.grad(h(points).sum(), points, create_graph=True)
(second,) = torch.autograd.grad(first.sum(), points)
assert_close(second, curves["h″ = grad(grad(h))"], rtol=0, atol=1e-12)

# %% [markdown]
# The sum works because point i does not reach output j. `vmap(grad(…))` needs no such argument, and
# gives what `backward` needs a loop for: the gradient of *each example's* loss by shared
# parameters.

# %%
per_example = vmap(grad(loss), in_dims=(None, 0, 0))(params, X, y)
print({name: list(leaf.shape) for name, leaf in per_example.items()})
mean = tree.map(lambda g: g.mean(0), per_example)
assert tree.allclose(mean, grad(loss)(params, X, y), rtol=0, atol=1e-12)

# %% [markdown]
# ## Exercises
# **1.** Rounding has derivative 0 almost everywhere, so nothing behind it learns. Write a function
# that rounds in the value, and is the identity in the gradient (the *straight-through* estimator).
#
# <details><summary>Answer</summary>
#
# Add the difference as a constant.
#
# ```python
# def round_through(x):
#     return x + transforms.stop_gradient(x.round() - x)
#
# x = torch.tensor([0.2, 1.7])
# assert torch.equal(round_through(x), torch.tensor([0.0, 2.0]))
# assert torch.equal(grad(lambda x: round_through(x).sum())(x), torch.ones(2))
# ```
#
# </details>
#
# **2.** What is the largest η with which plain gradient descent still goes down the `valley`? Say
# it from the formula, then test it.
#
# <details><summary>Answer</summary>
#
# Each coordinate is multiplied by 1 − η·c in a step, with c = 1 along and c = 10 across. It shrinks
# while |1 − 10η| < 1, so η < 0.2.
#
# ```python
# assert valley(descend(optim.sgd(0.199), start, 500)[-1]) < 1e-3
# assert valley(descend(optim.sgd(0.201), start, 500)[-1]) > 1e3
# ```
#
# </details>
#
# **3.** The Hessian of `valley` is the diagonal matrix of 1 and 10. Get it from `grad` and
# `jacrev`, and get the product H·v without building H.
#
# <details><summary>Answer</summary>
#
# H·v is how the gradient changes along v: a `jvp` of a `grad`.
#
# ```python
# w, v = torch.tensor([0.3, -0.2]), torch.tensor([1.0, 2.0])
# H = jacrev(grad(valley))(w)
# _, product = jvp(grad(valley), (w,), (v,))
# assert_close(H, torch.diag(torch.tensor([1.0, 10.0])), rtol=0, atol=1e-12)
# assert_close(product, H @ v, rtol=0, atol=1e-12)
# ```
#
# </details>
#
# Next: [03 Linear regression](03_linear_regression.ipynb)
