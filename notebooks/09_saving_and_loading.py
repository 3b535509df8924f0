# %% [markdown]
# # 09 Saving and loading
# Curriculum: B6
#
# **You will learn** to save tensors, parameters and whole training states in files that hold data
# and no code, that notice damage, and that PyTorch can read; and to resume a run so that it ends
# with the same bits as one that never stopped.

# %%
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

import fdl
from fdl import losses, nn, optim, random, tree

home, folder = Path.cwd(), tempfile.TemporaryDirectory()
os.chdir(folder.name)           # so that file names are short here

# %% [markdown]
# ## B6 A tensor, a list, a dict
# **Imperative.** `torch.save` pickles any object.

# %%
x, y = torch.arange(4.0), torch.zeros(2, 3)
for name, thing in {"tensor": x, "list": [x, y], "dict": {"x": x, "y": y}}.items():
    torch.save(thing, f"{name}.pt")
    again = torch.load(f"{name}.pt")
    assert not tree.diff(thing, again)

# %% [markdown]
# **Functional.** `fdl.io.save` writes any tree to one safetensors file, `fdl.io.load` gives it back:
# containers, the order of keys, every bit, and numbers and texts among the tensors.

# %%
nested = {"list": [x, (y, None)], "rate": 0.1, "name": "a tree", "odd": torch.tensor(
    [float("nan"), -0.0, float("inf")])}
fdl.io.save("nested.safetensors", nested)
again = fdl.io.load("nested.safetensors")
assert list(again) == list(nested) and not tree.diff(nested, again)
assert again["odd"].view(torch.int32).equal(nested["odd"].view(torch.int32))    # each bit
print(again["list"][1], again["rate"], again["name"])

# %% [markdown]
# ## B6 Parameters, and a clone that gives the same outputs
# **Imperative.** The file has the values, the class has the model: to load, build an object first
# and overwrite what it drew.

# %%
def make_net():
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))

net = make_net()
torch.save(net.state_dict(), "net.pt")
clone = make_net()
clone.load_state_dict(torch.load("net.pt"))
inputs = random.normal(random.key(0), (5, 4))
assert torch.equal(clone(inputs), net(inputs))

# %% [markdown]
# **Functional.** The model is two functions, so a clone is its parameters and nothing else.

# %%
model = nn.sequential(nn.linear(4, 8), nn.relu, nn.linear(8, 2))
params = model.init(random.key(1))
fdl.io.save("params.safetensors", params, metadata={"epoch": 3, "test accuracy": 0.85})
clone = fdl.io.load("params.safetensors")
assert torch.equal(model.apply(clone, inputs), model.apply(params, inputs))

# %% [markdown]
# What is in a file is told by its header, without reading the tensors. (`python -m train inspect
# FILE` prints the same.) Of a large file one branch can be read alone.

# %%
info = fdl.io.inspect("params.safetensors")
print(info, "\n", info.metadata)
assert not tree.diff(info.read("2"), params["2"])

# %% [markdown]
# ## Files of PyTorch, both ways
# The names are those of `state_dict()`, so each side reads what the other wrote.

# %%
from_torch = fdl.io.load_torch("net.pt")
assert torch.equal(model.apply(from_torch, inputs), net(inputs))

fdl.io.save_torch("params.pt", params)
net.load_state_dict(torch.load("params.pt"))
assert torch.equal(net(inputs), model.apply(params, inputs))
assert list(load_file("params.safetensors")) == sorted(net.state_dict())

# %% [markdown]
# ## A file that does not fit
# With `like` a file must have that structure, those shapes and dtypes. Every difference is listed,
# where a wrong layer would otherwise be found at the first product.

# %%
wider = nn.sequential(nn.linear(4, 8), nn.relu, nn.linear(8, 3)).init(random.key(2))
try:
    fdl.io.load("params.safetensors", like=wider)
except ValueError as error:
    print(error)

# %% [markdown]
# Fine-tuning wants just that: what fits, and new values for the rest.

# %%
tuned, differences = fdl.io.load_matching("params.safetensors", wider)
assert tuned["0"]["weight"].equal(params["0"]["weight"])
assert tuned["2"]["weight"].equal(wider["2"]["weight"]) and len(differences) == 2

# %% [markdown]
# ## Damage, and files with intentions
# One flipped bit of the last byte. A plain safetensors reader returns other numbers; `fdl.io.load`
# verifies the SHA-256 of each tensor.

# %%
damaged = bytearray(Path("params.safetensors").read_bytes())
damaged[-1] ^= 1
Path("damaged.safetensors").write_bytes(damaged)

print("safetensors:", sum(not a.equal(b) for a, b in zip(
    load_file("damaged.safetensors").values(), load_file("params.safetensors").values(),
    strict=True)), "tensor is another one, silently")
try:
    fdl.io.load("damaged.safetensors")
except ValueError as error:
    print("fdl:", error)

# %% [markdown]
# A pickle is a program: what `__reduce__` returns is *called* while it is being read.

# %%
class Present:
    def __reduce__(self):
        return print, ("this line was printed by a file",)

torch.save({"weight": Present()}, "present.pt")
_ = torch.load("present.pt", weights_only=False)

# %% [markdown]
# `fdl.io.load_torch` refuses it before anything runs. Files of `fdl.io.save` hold JSON and numbers, and
# cannot even ask.

# %%
try:
    fdl.io.load_torch("present.pt")
except ValueError as error:
    print(error)

# %% [markdown]
# ## Stopped and resumed: the same bits
# A net with dropout, trained by Adam on random batches. What does the next step depend on?
#
# **Imperative.** On the module, the optimizer and torch's generator, each of which keeps its
# state in itself. All three have to be asked for it, and a generator that is forgotten goes
# unnoticed: the resumed run is then another run.

# %%
def make():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5),
                              torch.nn.Linear(8, 1))
    return net, torch.optim.Adam(net.parameters(), lr=0.01)

def train(net, adam, steps):
    for _ in range(steps):
        adam.zero_grad()
        net(torch.randn(16, 4)).square().mean().backward()
        adam.step()

# %%
whole, adam = make()
train(whole, adam, 20)

net, adam = make()
train(net, adam, 7)
torch.save({"net": net.state_dict(), "adam": adam.state_dict(),
            "generator": torch.get_rng_state()}, "run.pt")

# %%
def resume(with_generator):
    (net, adam), saved = make(), torch.load("run.pt")
    net.load_state_dict(saved["net"])
    adam.load_state_dict(saved["adam"])
    if with_generator:
        torch.set_rng_state(saved["generator"])
    train(net, adam, 13)
    return tree.unflatten_dict(net.state_dict())

expected = tree.unflatten_dict(whole.state_dict())
assert not tree.diff(expected, resume(with_generator=True))
assert tree.diff(expected, resume(with_generator=False))        # and no error

# %% [markdown]
# **Functional.** On its arguments. The state has parameters, optimizer state, key and step count,
# and the batch follows from the step. So there is one thing to save, and nothing to forget.

# %%
model = nn.sequential(nn.linear(4, 8), nn.dropout(0.5), nn.linear(8, 1))
opt = optim.adam(0.01)
step = fdl.train_step(fdl.supervised(model, losses.mse), opt)
start = fdl.TrainState.create(model, opt, key=random.key(0))
print(start._fields)

# %%
def run(state, until):
    while state.step < until:
        x = random.normal(random.fold_in(random.key(1), state.step), (16, 4))
        state, _ = step(state, (x, torch.zeros(16, 1)))
    return state

never_stopped = run(start, 20)

# %% [markdown]
# `Checkpointer` keeps the newest checkpoints of a run in a folder. It copies the state, returns at
# once, and writes in a thread; a file gets its name when all of it is on the disk.

# %%
with fdl.checkpointing.Checkpointer("run", keep=2) as checkpointer:
    state = start
    for until in (3, 5, 7):
        state = run(state, until)
        checkpointer.save(state, metrics={"loss": 1 / until})
print(sorted(path.name for path in Path("run").glob("*.safetensors")))

# %%
with fdl.checkpointing.Checkpointer("run") as checkpointer:
    found = checkpointer.restore(like=start)    # None in a new folder
    print("resumed from step", found.checkpoint.step)
    resumed = run(found.state, 20)
assert not tree.diff(never_stopped, resumed)

# %% [markdown]
# The last file may be damaged, by a disk or by a copy that was cut short. Then the one before it is
# taken, with a warning that names the bad one, and the run still ends with the same bits.

# %%
import warnings

newest = max(Path("run").glob("*.safetensors"))
newest.write_bytes(newest.read_bytes()[:-10])
with fdl.checkpointing.Checkpointer("run") as checkpointer, warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = checkpointer.restore(like=start)
print(len(caught), "warning; resumed from step", found.checkpoint.step)
assert not tree.diff(never_stopped, run(found.state, 20))

# %%
os.chdir(home)
folder.cleanup()

# %% [markdown]
# ## Exercises
# **1.** Save a tree in which two leaves are one tensor. Are they one again after loading? Why does
# that matter?
#
# <details><summary>Answer</summary>
#
# They are, and the file has the tensor once: otherwise a shared weight would come back as two, and
# take twice the space.
#
# ```python
# with tempfile.TemporaryDirectory() as place:
#     w = torch.ones(1000)
#     fdl.io.save(f"{place}/tied.safetensors", {"encoder": w, "decoder": w})
#     back = fdl.io.load(f"{place}/tied.safetensors")
#     assert back["encoder"] is back["decoder"]
#     assert os.path.getsize(f"{place}/tied.safetensors") < 2 * w.nbytes
# ```
#
# </details>
#
# **2.** A colleague's checkpoint has the layers `fc1` and `fc2`; yours are called `0` and `2`. Load
# it.
#
# <details><summary>Answer</summary>
#
# Names are keys of a dict, so renaming is building another dict.
#
# ```python
# with tempfile.TemporaryDirectory() as place:
#     theirs = {"fc1": params["0"], "fc2": params["2"]}
#     fdl.io.save(f"{place}/theirs.safetensors", theirs)
#     loaded = fdl.io.load(f"{place}/theirs.safetensors")
#     mine = {"0": loaded["fc1"], "2": loaded["fc2"]}
#     assert not tree.diff(mine, params)
# ```
#
# </details>
#
# **3.** Resume the run from step 7 with another learning rate. Which part of the state changes?
#
# <details><summary>Answer</summary>
#
# The rate is a tensor in the optimizer's state; `with_hyperparams` returns a state that differs
# in it alone.
#
# ```python
# at_seven = run(start, 7)
# faster = optim.with_hyperparams(at_seven.opt_state, lr=0.1)
# (line,) = tree.diff(at_seven.opt_state, faster)
# assert "lr" in line
# assert tree.diff(never_stopped, run(at_seven._replace(opt_state=faster), 20))
# ```
#
# </details>
#
# Next: [10 Devices and compiling](10_devices_and_compiling.ipynb)
