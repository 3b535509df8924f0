"""What the tests of L-BFGS minimise, and how they take a step."""

import pytest
import torch
from torch.func import grad_and_value

from fdl import nn, optim, tree
from tests.support.asserts import draw

SHAPES = {"scalar": (), "vector": (3,), "nested.matrix": (2, 3), "nested.kernel": (2, 1, 2, 2)}
SEARCH = {"line_search_fn": "strong_wolfe"}
either_search = pytest.mark.parametrize("kwargs", [{}, SEARCH], ids=["fixed", "strong_wolfe"])


def begin():
    drawn = {path: draw(i, *shape) for i, (path, shape) in enumerate(SHAPES.items())}
    return tree.unflatten_dict(drawn)


def flat(params):
    return torch.cat([leaf.reshape(-1) for leaf in tree.leaves(params)])


ROOT, TILT, INPUTS, NOISE = draw(20, 18, 18), draw(21, 18), draw(22, 40, 3), draw(23, 40)


def quadratic(params):
    x = flat(params)
    return (ROOT @ x).square().sum() / 36 + x @ x / 20 - TILT @ x


def rosenbrock(params):
    x = flat(params)
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def logistic(params):
    """A small network that uses every leaf, with enough of a penalty to be benign."""
    hidden = torch.tanh(INPUTS @ params["nested"]["matrix"].T + params["vector"][:2])
    image = hidden[:, None, :, None] * hidden[:, None, None, :]
    image = nn.conv2d(1, 2, 2, bias=False).apply({"weight": params["nested"]["kernel"]}, image)
    logits = image.sum((1, 2, 3)) + params["scalar"] + params["vector"][2]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, (NOISE > 0).double())
    return loss + flat(params).square().sum() / 100


def step(f, opt, params, state):
    grads, value = grad_and_value(f)(params)
    updates, state = opt.update(grads, state, params, value=value, value_fn=f)
    return optim.apply_updates(params, updates), state


def run(take, params, state, calls):
    for _ in range(calls):
        params, state = take(params, state)
    return params, state


def moved(a, b):
    return (flat(a) - flat(b)).norm().item()
