# %% [markdown]
# # 10 Devices and compiling
# Curriculum: G1, T3
#
# **You will learn** to write code that runs on whatever device there is; and what compiling a step,
# or a whole epoch, buys, measured on the machine that made this page.

# %%
import statistics
import time

import matplotlib.pyplot as plt
import torch
from torch.testing import assert_close

import fdl
import models
from fdl import data, losses, optim, random, tree
from train.recipes import find_device

plt.style.use("fdl.mplstyle")

# %% [markdown]
# ## G1 Choosing and counting devices
# `find_device` is what `python -m train --device auto|cpu|cuda|cuda:1` uses. A device that is not
# there is an error at the start, not in the middle of things.

# %%
print("CUDA devices:", torch.cuda.device_count())
device = find_device("auto")
print("chosen:", device)
for absent in ("cuda:99", "gpu"):
    try:
        find_device(absent)
    except ValueError as error:
        print(error)

# %% [markdown]
# ## T3 Moving, between devices and dtypes
# **Imperative.** A module is moved in place. The state of an optimizer that has made steps is not
# moved with it, and tensors made inside `forward` have to be told where.

# %%
net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10)).to(device)
net = net.double()
assert net[1].weight.dtype == torch.float64 and net[1].weight.device.type == device.type

# %% [markdown]
# **Functional.** `tree.to` and `tree.cast` return a moved tree: parameters, a whole training
# state, or a data set. What is drawn or initialised is on the device of its key, so the device is
# said once, where the key is made, and the same code runs on a CPU and on a GPU.

# %%
model, opt = models.mlp(hidden=(64,)), optim.sgd(lr=0.1, momentum=0.9)
key = random.key(0, device=device)
state = fdl.TrainState.create(model, opt, key=key)
sample = tree.to(data.fashion_mnist_sample(), device)
assert {leaf.device.type for leaf in tree.leaves((state, sample))} == {device.type}

double = tree.cast(state, torch.float64)        # key and step count are integers, and stay
assert double.params["output"]["weight"].dtype == torch.float64
assert double.key.dtype == torch.int64

# %% [markdown]
# The same key draws the same numbers on every device. The device `meta` has no numbers at all, just
# shapes: enough to plan with.

# %%
shapes = tree.to(state, "meta")
print(f"{tree.size(shapes.params):,} parameters,",
      f"{sum(leaf.nbytes for leaf in tree.leaves(shapes)):,} bytes of state")
assert torch.equal(random.normal(key, (5,)).cpu(), random.normal(random.key(0), (5,)))

# %% [markdown]
# ## Four ways to run the same epoch
# The sample of 6,000 images in 187 batches of 32, for a perceptron of 64 hidden units: so little
# work for a batch that much of the time goes into Python, and into starting each operation.
#
# **Imperative**, step by step:

# %%
rows = data.epoch_indices(random.key(1, device=device), n=6000, batch_size=32, drop_last=True)
twin = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 64), torch.nn.ReLU(),
                           torch.nn.Linear(64, 10)).to(device)

def imperative(params, sample, rows):
    twin.load_state_dict(dict(zip(twin.state_dict(), tree.leaves(params), strict=True)))
    sgd = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for index in rows.index:
        x, y = sample.x[index].float() / 255, sample.y[index]
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(twin(x), y).backward()
        sgd.step()
    return list(twin.parameters())

# %% [markdown]
# **Functional**, three times the same `step`: as it is; compiled, in a Python loop; and the loop
# compiled with it.

# %%
step = fdl.train_step(fdl.supervised(model, losses.cross_entropy), opt)

def one(state, sample, row):
    return step(state, data.to_float(data.batch(sample, row)))[0]

def looped(one):
    def epoch(state, sample, rows):
        for row in zip(*rows, strict=True):
            state = one(state, sample, row)
        return state
    return epoch

def scanned(state, sample, rows):
    return fdl.scan(lambda s, row: step(s, data.to_float(data.batch(sample, row))), state, rows)[0]

compiled_step, compiled_epoch = fdl.jit(one), fdl.jit(scanned)

# %%
ways = {
    "nn.Module, eager": lambda: imperative(state.params, sample, rows),
    "step, eager": lambda: tree.leaves(looped(one)(state, sample, rows).params),
    "jit(step), looped": lambda: tree.leaves(looped(compiled_step)(state, sample, rows).params),
    "jit(scan(step))": lambda: tree.leaves(compiled_epoch(state, sample, rows).params),
}
results = {name: way() for name, way in ways.items()}       # compiles, too

# %% [markdown]
# All four end with the same parameters, to rounding: a compiled program adds in another order, and
# 187 steps in float32 let that grow.

# %%
for name, leaves in results.items():
    off = max((a - b).abs().max().item() for a, b in zip(
        leaves, results["step, eager"], strict=True))
    print(f"{name:18} off by at most {off:.0e}")
    assert_close(leaves, results["step, eager"], rtol=0, atol=5e-3, check_device=False)

# %% [markdown]
# ## What was compiled
# `report()` says of each program why it was made, how it runs, how long the compiler took, and how
# many kernels it wrote. There was one form of arguments each, so one program each.

# %%
def show(jitted):
    for r in jitted.report():
        print(f"{r.why}\n    {r.route}, {r.seconds:.1f} s, {r.kernels} kernels, slower ways: "
              f"{', '.join(r.fallbacks) or 'none'}")

show(compiled_step)
show(compiled_epoch)
assert len(compiled_epoch.report()) == 1

# %% [markdown]
# ## What it bought
# Times are taken in rounds, each way once per round: what else the machine does meanwhile then
# meets all of them. Medians, for one epoch.

# %%
def seconds(way):
    start = time.perf_counter()
    way()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start

rounds = [{name: seconds(way) for name, way in ways.items()} for _ in range(7)]
median = {name: statistics.median(r[name] for r in rounds) for name in ways}

# %%
_, ax = plt.subplots(figsize=(6, 2.3))
bars = ax.barh(list(median), [1000 * m for m in median.values()],
               color=["tab:gray", "tab:blue", "tab:orange", "tab:green"])
ratios = [median["nn.Module, eager"] / m for m in median.values()]
ax.bar_label(bars, [f"{ratio:.1f} × as fast" for ratio in ratios], padding=3)
ax.set(xlabel="milliseconds for 187 steps", xlim=(0, 1300 * max(median.values())))
ax.invert_yaxis()
plt.show()

# %% [markdown]
# A pure step costs more in eager mode, since `grad` and the new trees are Python too. Compiled,
# that is gone: the trees exist while the program is made, and not when it runs. Compiling has to
# be won back, though. The compiler keeps its files on disk, and this notebook had run here
# before; the README gives 7.4 s for a perceptron without them:

# %%
saved = median["nn.Module, eager"] - median["jit(scan(step))"]
here = compiled_epoch.report()[0].seconds
for took, where in ((here, "here"), (7.4, "on a machine that compiles it for the first time")):
    print(f"{took:.1f} s {where}: won back after {took / saved:.0f} epochs of 187 steps")

# %% [markdown]
# So a short run is better left eager (`python -m train --compile auto` times a few steps and
# decides). The gain is largest where steps are small; the README has the table for six recipes, and
# against JAX.

# %% [markdown]
# ## What compiles again, and what does not
# There is one program for each structure, shape, stride, dtype and device of the arguments.
# Values are free to change. A learning rate is a tensor in the state, hence a value:

# %%
slower = state._replace(opt_state=optim.with_hyperparams(state.opt_state, lr=0.01))
moved = tree.leaves(compiled_epoch(slower, sample, rows).params)
assert not torch.equal(moved[0], results["jit(scan(step))"][0])
assert len(compiled_epoch.report()) == 1                    # still one program

# %% [markdown]
# Another shape or dtype is another program, and the report names the leaf that changed:

# %%
@fdl.jit
def scale(tree_, factor):
    return tree.map(lambda leaf: leaf * factor, tree_)

scale({"w": torch.ones(3)}, torch.tensor(2.0))
scale({"w": torch.ones(3)}, torch.tensor(3.0))              # a value: nothing to compile
scale({"w": torch.ones(4)}, torch.tensor(3.0))              # a shape
show(scale)
assert len(scale.report()) == 2

# %% [markdown]
# A Python number would be baked into the program, and each new one would compile again. So `jit`
# takes none:

# %%
try:
    scale({"w": torch.ones(3)}, 2.0)
except TypeError as error:
    print(error)

# %% [markdown]
# ## Debugging
# A jitted function is traced: it runs once, on tensors that have a shape and no values. To
# `print` a value, step through with a debugger, or let Python decide by a value, switch the
# compiler off. The function is the same one.

# %%
@fdl.jit
def suspicious(x):
    y = x.log()
    print("largest:", y.max().item())
    return y

with fdl.disable_jit():
    suspicious(torch.tensor([1.0, 2.0, 0.5]))

# %% [markdown]
# Compiled, the same line is an error that says so (`FDL_JIT=0 python …` does without the compiler
# in a whole process):

# %%
try:
    suspicious(torch.tensor([1.0, 2.0, 0.5]))
except RuntimeError as error:
    print(error)

# %% [markdown]
# ## Exercises
# **1.** `epoch_indices` fills the last batch up with padding and a mask, unless `drop_last=True`.
# Why is that kinder to a compiler than a smaller last batch?
#
# <details><summary>Answer</summary>
#
# A smaller batch is another shape: another program, and no rows of one index array, so no `scan`.
# With the mask all steps have one shape, and the means are exact all the same.
#
# ```python
# full = data.epoch_indices(random.key(1), n=6000, batch_size=32)
# assert full.index.shape == (188, 32) and int(full.mask[-1].sum()) == 6000 - 187 * 32
# ```
#
# </details>
#
# **2.** Where do `print` and `time.time()` of a jitted function run, and how often?
#
# <details><summary>Answer</summary>
#
# While the function is traced, once for each program, and never again. A time that is taken there
# would be a constant in the program: only what happens to tensors is recorded.
#
# ```python
# calls = []
# @fdl.jit
# def counted(x):
#     calls.append("traced")
#     return x + 1
# before = [counted(torch.ones(2)) for _ in range(3)]
# traced = len(calls)
# counted(torch.zeros(2))
# assert len(calls) == traced
# ```
#
# </details>
#
# **3.** Double the width of the hidden layer until `jit(scan(step))` is less than 1.5 times as
# fast as the module. What takes the time then?
#
# <details><summary>Answer</summary>
#
# The products of matrices, which both leave to the same libraries. Compiling removes what is around
# them: Python, the starting of operations, and passes over memory that can be made as one. In the
# [benchmark](../docs/benchmark.md) (256 hidden units, batches of 256) a step of the module takes
# 1,996 µs, and one of the compiled epoch 1,639.
#
# </details>
#
# Next: [11 LeNet](11_lenet.ipynb)
