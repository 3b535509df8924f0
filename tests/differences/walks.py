"""The same steps with the optimizers of several libraries.

All take one sequence of gradients, which does not depend on the parameters: a difference between
two libraries is then what the optimizers make of it, not how a loss amplifies it.
"""

import importlib
import importlib.util
import os
from contextlib import nullcontext

import numpy as np
import torch

from fdl import optim, random, tree
from tests.support.jax import x64

STEPS = 50
SHAPES = {"matrix": (4, 3), "vector": (3,)}


def start(dtype=torch.float64):
    """Parameters of the size of weights."""
    key = random.key(0)
    return {
        name: random.normal(random.fold_in(key, i), shape, dtype=torch.float64).to(dtype)
        for i, (name, shape) in enumerate(SHAPES.items())
    }


def noise(dtype=torch.float64, steps=STEPS):
    """A sequence of gradients: normal numbers around 0.3, so that momentum has a direction."""
    key = random.key(1)
    return [
        {
            name: (0.3 + random.normal(random.fold_in(key, 2 * t + i), shape).double()).to(dtype)
            for i, (name, shape) in enumerate(SHAPES.items())
        }
        for t in range(steps)
    ]


def constant(value, dtype, steps=1):
    """A sequence of gradients of one value."""
    return [{name: torch.full(shape, value, dtype=dtype) for name, shape in SHAPES.items()}] * steps


def library(name):
    """A library that may not be installed: the module, or None."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    if importlib.util.find_spec(name) is None:
        return None
    if name == "optax":
        importlib.import_module("optax.contrib")
    return importlib.import_module(name)


def walk_fdl(opt, params, gradients):
    """The parameters after each step."""
    state, path = opt.init(params), []
    for g in gradients:
        updates, state = opt.update(g, state, params)
        params = optim.apply_updates(params, updates)
        path.append(params)
    return path


def walk_torch(make, params, gradients):
    """With a class of `torch.optim`, or one like it, in the default settings of torch."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer, path = make(list(leaves.values())), []
    if hasattr(optimizer, "train"):
        optimizer.train()  # schedulefree
    for g in gradients:
        for name, leaf in leaves.items():
            leaf.grad = g[name].clone()
        optimizer.step()
        path.append({name: leaf.detach().clone() for name, leaf in leaves.items()})
    return path


def walk_torchopt(opt, params, gradients):
    """With an optimizer of TorchOpt, never in place."""
    apply = library("torchopt").apply_updates
    state, path = opt.init(params), []
    for g in gradients:
        updates, state = opt.update(g, state, params=params, inplace=False)
        params = apply(params, updates, inplace=False)
        path.append(params)
    return path


def walk_optax(opt, params, gradients):
    """With an optimizer of optax, in the dtype of the parameters."""
    import jax
    import optax

    dtype = next(iter(params.values())).dtype
    there = str(dtype).removeprefix("torch.")

    def jaxed(values):
        exact = {name: x.double().numpy() for name, x in values.items()}
        return {name: jax.numpy.asarray(x, dtype=there) for name, x in exact.items()}

    with x64() if dtype == torch.float64 else nullcontext():
        params = jaxed(params)
        state, path = opt.init(params), []
        update = jax.jit(opt.update)
        for g in gradients:
            updates, state = update(jaxed(g), state, params)
            params = optax.apply_updates(params, updates)
            exact = {name: np.array(x, dtype=np.float64) for name, x in params.items()}
            path.append({name: torch.from_numpy(x) for name, x in exact.items()})
    return path


def walk_keras(make, params, gradients):
    """With an optimizer of Keras, whose rates have its default dtype: that of the parameters."""
    import keras

    names = list(params)
    dtype = str(next(iter(params.values())).dtype).removeprefix("torch.")
    before = keras.config.floatx()
    keras.config.set_floatx(dtype)
    try:
        variables = [keras.Variable(params[name].clone(), dtype=dtype) for name in names]
        optimizer, path = make(), []
        for g in gradients:
            optimizer.apply([g[name].clone() for name in names], variables)
            now = zip(names, variables, strict=True)
            path.append({name: v.value.detach().clone() for name, v in now})
    finally:
        keras.config.set_floatx(before)
    return path


WALKS = {
    "torch": walk_torch,
    "optax": walk_optax,
    "torchopt": walk_torchopt,
    "keras": walk_keras,
    "schedulefree": walk_torch,
}


def moved(path, begin):
    """How far the parameters are from where they began, after each step, as one vector."""
    return [
        torch.cat([(p[name].double() - begin[name].double()).flatten() for name in SHAPES])
        for p in path
    ]


def parted(ours, theirs, close=1e-10):
    """Where two runs part, and how far apart they are at last as a part of the way of ours."""
    apart = [
        float((a - b).abs().max() / a.abs().max().clamp(min=1e-300))
        for a, b in zip(ours, theirs, strict=True)
    ]
    first = next((t for t, d in enumerate(apart, 1) if not d <= close), None)
    return "equal" if first is None else f"step {first}, {apart[-1]:.0e}"


def whole(params):
    """One vector of all parameters."""
    return torch.cat([x.double().flatten() for x in tree.leaves(params)])
