"""Every module of torch.nn, taken over: values, derivatives of three orders, vmap.

A check is named by its derivatives, the innermost first: `rf` is a jvp of a grad. What is compared
with central differences is a directional derivative along random directions, in float64.
"""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn as oo
from torch.func import grad, jvp, vjp, vmap

import fdl
from fdl import interop, nn, random, transforms, tree
from tests.support.asserts import close, draw
from tests.support.modules import ABSTRACT, CASES, DRAWING, IDS, REFUSED

KEY = random.key(3)
H = 1e-5

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's of nested tensors, CTC, initial values


def test_every_module_of_torch_has_a_row():
    names = {name for name in oo.modules.__all__ if not name.startswith("Lazy")}
    assert names - ABSTRACT <= CASES.keys()
    assert REFUSED.keys() | DRAWING <= CASES.keys()


def weighted(y):
    """Any outputs as one number whose derivatives are not 0."""
    leaves = [x for x in tree.leaves(y) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return sum((x.sin() * (torch.arange(x.numel()).view(x.shape) + 1).cos()).sum() for x in leaves)


def made(name):
    torch.manual_seed(0)
    module = CASES[name].make().double()
    with torch.no_grad():
        for p in module.parameters():  # scales and shifts start as constants
            p.add_(0.2 * torch.randn_like(p))
    return module


@cache
def taken_over(name, train):
    """Give `f(params, floating inputs)` and where to take its derivatives."""
    inputs = CASES[name].inputs
    model, params, buffers = interop.from_module(made(name))

    def f(theta):
        params, floats = theta
        rest = iter(floats)
        given = [next(rest) if x.is_floating_point() else x for x in inputs]
        if isinstance(model, nn.StatefulModel):
            return weighted(model.apply(params, buffers, *given, train=train, key=KEY)[0])
        return weighted(model.apply(params, *given, train=train, key=KEY))

    return f, (params, [x for x in inputs if x.is_floating_point()])


def dot(a, b):
    return sum((x * y).sum() for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


def along(theta, seed):
    return tree.map(lambda x: draw(seed + x.numel(), *x.shape), theta)


def grad_along(f, v):
    return lambda theta: dot(vjp(f, theta)[1](torch.ones_like(f(theta)))[0], v)


def jvp_along(f, v):
    return lambda theta: jvp(f, (theta,), (v,))[1]


MODES = {"r": grad_along, "f": jvp_along}


def difference(f, theta, v):
    up, down = (f(tree.map(lambda x, d, h=h: x + h * d, theta, v)) for h in (H, -H))
    return (up - down) / (2 * H)


def refuses(name, check):
    return name in REFUSED and re.fullmatch(REFUSED[name][0], check)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_derivatives_equal_differences(name):
    function, theta = taken_over(name, CASES[name].train)
    directions = [along(theta, seed) for seed in (1, 2, 3)]

    def derivative(modes):
        g = function
        for mode, v in zip(modes, directions, strict=False):
            g = MODES[mode](g, v)
        return g

    def lower(order):
        """Give what to take differences of: a derivative checked before, one order less."""
        return derivative("r" * order), directions[order]

    for check in ("r", "f", "rr", "rf", "fr", "ff", "rrr", "rff"):
        if refuses(name, check):
            with pytest.raises(Exception, match=REFUSED[name][1]):
                derivative(check)(theta)
            continue
        value, v = lower(len(check) - 1)
        close(derivative(check)(theta), difference(value, theta, v), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in CASES if not refuses(name, "r")])
def test_values_and_gradients_are_the_modules(name):
    module, train = made(name), CASES[name].train and name not in DRAWING
    function, theta = taken_over(name, train)
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in CASES[name].inputs]
    value = weighted(module.train(train)(*inputs))
    value.backward()
    close(function(theta), value.detach())
    params, floats = grad(function)(theta)
    theirs = {path: dense_gradient(p) for path, p in module.named_parameters()}
    close(tree.flatten_dict(params), theirs, rtol=1e-9, atol=1e-9)
    close(floats, [x.grad for x in inputs if x.is_floating_point()], rtol=1e-9, atol=1e-9)


def dense_gradient(p):
    return torch.zeros_like(p) if p.grad is None else p.grad.to_dense()


def over(name, part):
    """Give an in_axes for a part of the arguments, and two rows to run over."""
    theta = taken_over(name, CASES[name].train)[1]
    other = tree.map(lambda x, d: x + 0.01 * d, theta, along(theta, 1))
    axes = {"params": (0, None), "inputs": (None, 0)}[part]
    rows = [
        theta,
        tuple(b if axis == 0 else a for a, b, axis in zip(theta, other, axes, strict=True)),
    ]
    pairs = zip(*rows, axes, strict=True)
    return axes, rows, tuple(tree.stack([a, b]) if axis == 0 else a for a, b, axis in pairs)


@pytest.mark.parametrize("part", ["params", "inputs"])
@pytest.mark.parametrize("name", CASES)
def test_vmap_equals_a_loop(name, part):
    function, theta = taken_over(name, CASES[name].train)
    if not tree.leaves(theta[part == "inputs"]):
        return
    axes, rows, stacked = over(name, part)
    if refuses(name, "vmap"):
        with pytest.raises(Exception, match=REFUSED[name][1]):
            vmap(grad(function), (axes,))(stacked)
        return
    for g in (function, grad(function)):
        expected = tree.stack([g(row) for row in rows])
        close(vmap(g, (axes,))(stacked), expected, rtol=1e-8, atol=1e-9)


def test_the_page_names_what_is_refused():
    page = (Path(__file__).parents[2] / "docs" / "interop.md").read_text()
    table = page.partition("## Derivatives")[2].partition("## What cannot")[0]
    families = {name.split()[0].replace("3d", "2d") for name in REFUSED}
    assert {name for name in families if f"`{name}" not in table} == set()


# ------------------------------------------------- what central differences have no word about


def both_ways(f, theta, u, v):
    """Give uᵀHv by all four ways to take second derivatives."""
    return [
        outer(inner(f, v), u)(theta)
        for inner in (grad_along, jvp_along)
        for outer in (grad_along, jvp_along)
    ]


def test_the_padding_row_of_an_embedding_is_constant_in_every_mode():
    net = oo.Sequential(oo.Embedding(5, 4, padding_idx=0), oo.Tanh(), oo.Linear(4, 2)).double()
    model, params, _ = interop.from_module(net)
    u, v = along(params, 1), along(params, 2)

    def outputs(params):
        return model.apply(params, IDS)

    def loss(y):
        return (y.sin() ** 2).sum()

    assert IDS.eq(0).any()
    forward = jvp(outputs, (params,), (v,))[1]
    w = draw(3, *forward.shape)
    close(dot(forward, w), dot(vjp(outputs, params)[1](w)[0], v))
    there = dot(u, transforms.gnvp(outputs, loss, params, v))
    close(there, dot(v, transforms.gnvp(outputs, loss, params, u)))
    # By hand: the direction's padding row counts as 0, the weights' is read.
    pinned = tree.map(torch.clone, v)
    pinned["0"]["weight"][0] = 0
    plain = interop.from_module(oo.Sequential(oo.Embedding(5, 4), *net[1:]))[0]
    expected = jvp(lambda p: plain.apply(p, IDS), (params,), (pinned,))[1]
    close(forward, expected)
    close(jvp(lambda p: outputs(p).sum(), (params,), (v,))[1], expected.sum())


def test_the_vectors_of_spectral_norm_are_constants_in_every_mode():
    net = oo.utils.parametrizations.spectral_norm(oo.Linear(4, 3)).double()
    model, params, buffers = interop.from_module(net)

    def function(params):
        return weighted(model.apply(params, buffers, draw(0, 5, 4), train=True)[0])

    values = both_ways(function, params, along(params, 1), along(params, 2))
    close(values, [values[0]] * 4)


def test_gradients_of_a_sparse_embedding_are_dense():
    model, params, _ = interop.from_module(oo.Embedding(5, 4, sparse=True))
    grads = grad(lambda p: model.apply(p, IDS).sum())(params)
    assert grads["weight"].layout == torch.strided
    assert grads["weight"][:, 0].tolist() == [2, 1, 2, 0, 1]  # how often each row is read


@pytest.mark.parametrize("make", [oo.Embedding, oo.EmbeddingBag])
def test_a_gradient_by_frequency_is_refused(make):
    model, params, _ = interop.from_module(make(5, 4, scale_grad_by_freq=True))
    with pytest.raises(NotImplementedError, match="scale_grad_by_freq=True does not give"):
        model.apply(params, IDS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "compiler"),
    [
        ("BatchNorm1d", "jit"),
        ("InstanceNorm1d", "jit"),
        ("Embedding with padding", "jit"),
        ("TransformerEncoderLayer", "jit"),
        ("BatchNorm1d", "compile"),
        ("MultiheadAttention without weights", "compile"),
    ],
)
def test_second_derivatives_compile(name, compiler, plain_backend):
    function, theta = taken_over(name, CASES[name].train)
    v = along(theta, 1)

    def products(theta):
        return vjp(grad(function), theta)[1](v)[0], jvp(grad(function), (theta,), (v,))[1]

    expected = products(theta)
    if compiler == "jit":
        compiled = fdl.jit(products)
    else:
        torch._dynamo.reset()
        compiled = torch.compile(products, backend="eager", fullgraph=True)
    close(compiled(theta), expected, rtol=1e-8)
