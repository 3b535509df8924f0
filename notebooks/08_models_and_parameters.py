# %% [markdown]
# # 08 Models and parameters
# Curriculum: B1, B2, B3, B4, B5
#
# **You will learn** to build models as pairs of pure functions, to look at their parameters,
# initialise and change them, share them, and write layers of your own; each beside the class it
# stands for, and how a class you already have is taken over.

# %%
import torch
from torch.func import grad
from torch.testing import assert_close

from fdl import interop, nn, random, tree

DOUBLE = torch.float64

# %% [markdown]
# ## B1 A class, or two functions
# **Imperative.** A module holds its parameters and says in `forward` what to do with them.

# %%
class MLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = torch.nn.Linear(20, 32)
        self.act = torch.nn.ReLU()
        self.output = torch.nn.Linear(32, 10)

    def forward(self, x):
        return self.output(self.act(self.hidden(x)))

net = MLP().double()

# %% [markdown]
# **Functional.** `init` makes parameters of a key, `apply` makes outputs of parameters. Nothing is
# held, so the same two functions serve one model or a thousand.

# %%
hidden, output = nn.linear(20, 32), nn.linear(32, 10)

def init(key):
    keys = random.split(key)
    return {"hidden": hidden.init(keys[0]), "output": output.init(keys[1])}

def apply(params, x, *, train=False, key=None):
    return output.apply(params["output"], nn.relu(hidden.apply(params["hidden"], x)))

model = nn.Model(init, apply)
params = tree.cast(model.init(random.key(0)), DOUBLE)

# %% [markdown]
# `nn.sequential` writes such pairs, and `interop.from_module` makes one of any module, with a copy
# of its parameters. All three agree in outputs, gradients and names.

# %%
in_a_row = nn.sequential(hidden=hidden, act=nn.relu, output=output)
taken, module_params, _ = interop.from_module(net)
x = random.normal(random.key(1), (4, 20), DOUBLE)
net(x).square().sum().backward()

for same in (model, in_a_row, taken):
    assert_close(same.apply(module_params, x), net(x).detach(), rtol=0, atol=1e-12)
    grads = grad(lambda p, same=same: same.apply(p, x).square().sum())(module_params)
    for path, parameter in net.named_parameters():
        assert_close(tree.flatten_dict(grads)[path], parameter.grad, rtol=0, atol=1e-12)

# %% [markdown]
# ## B2 Looking at parameters
# **Imperative.** `state_dict()` gives names and values, printing a module its layers.

# %%
print(net)
print({name: list(value.shape) for name, value in net.state_dict().items()})

# %% [markdown]
# **Functional.** Parameters are nested dicts: one layer's are an entry. `tree.flatten_dict` gives
# the dotted names of `state_dict()`, `tree.summary` a table.

# %%
flat = tree.flatten_dict(params)
assert list(flat) == list(net.state_dict())
assert params["output"]["bias"].shape == net.output.state_dict()["bias"].shape
print(tree.summary(params))

# %% [markdown]
# What two trees have in common, and what not, is one call as well:

# %%
wider = nn.sequential(hidden=nn.linear(20, 64), act=nn.relu, output=nn.linear(64, 10))
wide = tree.cast(wider.init(random.key(0)), DOUBLE)
for line in tree.diff(params, wide, values=False):
    print(line)

# %% [markdown]
# ## B3 Initialising
# An initializer is a function of key, shape and dtype, given to the layer it is for. The scheme
# is said before there are parameters, instead of overwriting them afterwards.
#
# **By layer. Imperative:** a walk over the modules that asks each for its type.

# %%
def scheme(module):
    if isinstance(module, torch.nn.Linear):
        torch.nn.init.normal_(module.weight, std=0.01)
        torch.nn.init.zeros_(module.bias)

_ = net.apply(scheme)

# %% [markdown]
# **Functional:** one function that makes such a layer.

# %%
def dense(inputs, outputs):
    return nn.linear(inputs, outputs,
                     weight_init=nn.init.normal(0.01), bias_init=nn.init.zeros)

small = nn.sequential(hidden=dense(20, 32), act=nn.relu, output=dense(32, 10))
p = small.init(random.key(0))
assert not p["hidden"]["bias"].any() and p["hidden"]["weight"].abs().max() < 0.06

# %% [markdown]
# **An initializer of your own:** uniform on (−10, 10), and 0 where |w| < 5. It is pure, so the same
# key gives the same weights on every device and in every order of layers.

# %%
def sparse_uniform(key, shape, dtype=torch.float32):
    w = random.uniform(key, shape, dtype, minval=-10, maxval=10)
    return torch.where(w.abs() < 5, 0.0, w)

w = nn.linear(20, 32, weight_init=sparse_uniform).init(random.key(0))["weight"]
assert torch.all((w == 0) | (w.abs() >= 5)) and w.abs().max() < 10
first = [round(value, 2) for value in w[0, :4].tolist()]
print(f"{(w == 0).double().mean():.0%} are 0; the first: {first}")

# %% [markdown]
# **By name, afterwards.** Each path has its own key, so re-initialising one leaf does not move
# another. Here the weights of every layer that is named so:

# %%
def reinitialise(params, ending, initializer, key):
    flat = tree.flatten_dict(params)
    new = {
        path: initializer(random.fold_in(key, i), leaf.shape, leaf.dtype)
        if path.endswith(ending) else leaf
        for i, (path, leaf) in enumerate(flat.items())
    }
    return tree.unflatten_dict(new, like=params)

xavier = reinitialise(params, "weight", nn.init.xavier_uniform(), random.key(2))
print(tree.diff(params, xavier))

# %% [markdown]
# **Editing values. Imperative:** in place and under `no_grad`, for everybody who holds the module.

# %%
with torch.no_grad():
    net.hidden.weight += 1
    net.hidden.weight[0, 0] = 42

# %% [markdown]
# **Functional:** a new tree. `tree.map` changes all leaves; for a single one, copy the dicts on
# its path. What is not changed is shared, not copied, and the old parameters are still there.

# %%
shifted = tree.map(lambda leaf: leaf + 1, params)
weight = params["hidden"]["weight"].clone()
weight[0, 0] = 42
edited = {**params, "hidden": {**params["hidden"], "weight": weight}}

print(tree.diff(params, edited))
assert edited["output"] is params["output"]
assert not tree.diff(params, tree.map(lambda leaf: leaf - 1, shifted), atol=1e-12)

# %% [markdown]
# ## B4 Sharing parameters
# **Imperative.** The same object used twice is one parameter, and its gradient sums over both uses.

# %%
linear = torch.nn.Linear(4, 4).double()
shared = torch.nn.Sequential(linear, torch.nn.ReLU(), linear)
x4 = random.normal(random.key(3), (8, 4), DOUBLE)
shared(x4).square().sum().backward()
print([name for name, _ in shared.named_parameters()])

# %% [markdown]
# **Functional.** To share is to use a value twice. `nn.tied` says so for a model that is there; the
# parameters hold the shared ones once.

# %%
layer = nn.linear(4, 4)
tied = nn.tied(nn.sequential(layer, nn.relu, layer), {"2": "0"})
start = {"0": {name: value.detach() for name, value in linear.named_parameters()}}
assert list(tree.flatten_dict(tied.init(random.key(0)))) == ["0.weight", "0.bias"]

total = grad(lambda p: tied.apply(p, x4).square().sum())(start)
assert_close(total["0"]["weight"], linear.weight.grad, rtol=0, atol=1e-12)

# %% [markdown]
# That it is a sum can be seen by giving the two uses different names: differentiate by both, and
# add.

# %%
untied = nn.sequential(layer, nn.relu, layer)
both = {"0": start["0"], "2": start["0"]}
parts = grad(lambda p: untied.apply(p, x4).square().sum())(both)
summed = tree.map(torch.add, parts["0"], parts["2"])
assert not tree.diff(total["0"], summed, atol=1e-12)

# %% [markdown]
# ## B5 Layers of your own
# **Without parameters.** Centering takes off the mean. **Imperative:**

# %%
class Center(torch.nn.Module):
    def forward(self, x):
        return x - x.mean()

centered_net = torch.nn.Sequential(torch.nn.Linear(20, 8), Center()).double()

# %% [markdown]
# **Functional:** a function is a layer already.

# %%
centered = nn.sequential(nn.linear(20, 8), lambda x: x - x.mean())
p = tree.unflatten_dict({path: v.detach() for path, v in centered_net.named_parameters()})
y = centered.apply(p, x)
assert_close(y, centered_net(x).detach(), rtol=0, atol=1e-12)
print(f"mean {y.mean().abs().item():.0e}, parameters {list(tree.flatten_dict(p))}")

# %% [markdown]
# **With a list of parameters:** a chain of matrices 4×4, 4×4, 4×4, 4×1. **Imperative:** a plain
# list would hide them from the optimizer, so there is a `ParameterList`.

# %%
SHAPES = [(4, 4), (4, 4), (4, 4), (4, 1)]

class Chain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.matrices = torch.nn.ParameterList(torch.randn(shape) for shape in SHAPES)

    def forward(self, x):
        for matrix in self.matrices:
            x = x @ matrix
        return x

# %% [markdown]
# **Functional:** a list is a tree. So are tuples, NamedTuples and dicts, one in the other.

# %%
def chain_init(key):
    keys = random.split(key, len(SHAPES))
    return [random.normal(key, shape) for key, shape in zip(keys, SHAPES, strict=True)]

def chain_apply(matrices, x, *, train=False, key=None):
    for matrix in matrices:
        x = x @ matrix
    return x

chain = nn.Model(chain_init, chain_apply)
matrices = tree.cast(chain.init(random.key(0)), DOUBLE)
print(tree.summary(matrices))

# %%
class_chain = Chain().double()
class_chain.load_state_dict({f"matrices.{i}": m for i, m in enumerate(matrices)})
class_chain(x4).sum().backward()
grads = grad(lambda p: chain.apply(p, x4).sum())(matrices)
for g, parameter in zip(grads, class_chain.matrices, strict=True):
    assert_close(g, parameter.grad, rtol=0, atol=1e-12)

# %% [markdown]
# Both kinds go together with every other layer, since `nn.sequential` takes models and functions
# alike:

# %%
net = nn.sequential(embed=nn.linear(20, 4), center=lambda x: x - x.mean(), chain=chain)
print(list(tree.flatten_dict(net.init(random.key(0)))))
assert net.apply(net.init(random.key(0)), x.float()).shape == (4, 1)

# %% [markdown]
# ## Exercises
# **1.** Write `residual(model)`, a model that computes x + model(x).
#
# <details><summary>Answer</summary>
#
# A layer that takes a layer is a function of one.
#
# ```python
# def residual(inner):
#     def apply(params, x, *, train=False, key=None):
#         return x + inner.apply(params, x, train=train, key=key)
#     return nn.Model(inner.init, apply)
#
# block = residual(nn.linear(4, 4, weight_init=nn.init.zeros, bias_init=nn.init.zeros))
# assert torch.equal(block.apply(block.init(random.key(0)), x4.float()), x4.float())
# ```
#
# </details>
#
# **2.** Train only the output layer: differentiate with respect to a part of the parameters.
#
# <details><summary>Answer</summary>
#
# `tree.partition` splits a tree by path, and `tree.merge` unites the parts.
#
# ```python
# head, body = tree.partition(params, "output.*")
# g = grad(lambda head: model.apply(tree.merge(head, body), x).square().sum())(head)
# assert list(tree.flatten_dict(g)) == ["output.weight", "output.bias"]
# ```
#
# </details>
#
# **3.** An autoencoder uses the encoder's weight W, transposed, as the decoder's. Write it, and
# check that the gradient of W has both parts.
#
# <details><summary>Answer</summary>
#
# No helper is needed: use the value twice.
#
# ```python
# def reconstruct(W, x):
#     return torch.tanh(x @ W.T) @ W
# W = random.normal(random.key(5), (2, 4), DOUBLE)
# whole = grad(lambda W: (reconstruct(W, x4) - x4).square().sum())(W)
# def two(W, V):
#     return (torch.tanh(x4 @ W.T) @ V - x4).square().sum()
# encoder, decoder = grad(two, argnums=(0, 1))(W, W)
# assert_close(whole, encoder + decoder, rtol=0, atol=1e-12)
# ```
#
# </details>
#
# Next: [09 Saving and loading](09_saving_and_loading.ipynb)
