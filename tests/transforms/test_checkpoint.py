"""`checkpoint` keeps values and gradients and saves memory; `stop_gradient` stops both modes."""

from functools import partial

import pytest
import torch
from torch.func import grad, jvp, vjp, vmap

import fdl
from fdl import nn, random, tree
from fdl.transforms import checkpoint, stop_gradient
from tests.support.asserts import close, draw, equal_bits

block = nn.sequential(nn.linear(3, 4), nn.tanh, nn.dropout(0.4), nn.linear(4, 3), nn.tanh)
params = tree.cast(block.init(random.key(0)), torch.float64)
x = draw(1, 5, 3)
tangent = tree.map(lambda p: draw(p.numel(), *p.shape), params)
key = random.key(4)


def plain(params, x):
    return block.apply(params, x, train=True, key=key).square().sum()


def kept(params, x):
    return checkpoint(block.apply)(params, x, train=True, key=key).square().sum()


def norm(f):
    """A function of parameters that itself takes a derivative."""
    return lambda p, x: sum((g**2).sum() for g in tree.leaves(grad(f)(p, x)))


WAYS = {
    "f": lambda f: f(params, x),
    "grad": lambda f: grad(f, argnums=(0, 1))(params, x),
    "vmap(grad)": lambda f: vmap(grad(f), (None, 0))(params, x[:, None]),
    "jvp": lambda f: jvp(lambda p: f(p, x), (params,), (tangent,)),
    "jvp(grad)": lambda f: jvp(lambda p: grad(f)(p, x), (params,), (tangent,)),
    "vmap(jvp(grad))": lambda f: vmap(lambda v: jvp(lambda p: grad(f)(p, x), (params,), (v,))[1])(
        tree.stack([tangent, params])
    ),
    "grad(jvp)": lambda f: grad(lambda p: jvp(lambda q: f(q, x), (p,), (tangent,))[1])(params),
    "grad(grad)": lambda f: grad(norm(f))(params, x),
    "grad(grad(grad))": lambda f: grad(norm(norm(f)))(params, x),
    "jit(grad)": lambda f: fdl.jit(grad(f))(params, x),
    "jit(vmap(grad))": lambda f: fdl.jit(vmap(grad(f), (None, 0)))(params, x[:, None]),
    "jit(jvp(grad))": lambda f: fdl.jit(lambda p, v: jvp(lambda p: grad(f)(p, x), (p,), (v,))[1])(
        params, tangent
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_values_and_derivatives_are_those_of_the_function(way, plain_backend):
    got, expected = WAYS[way](kept), WAYS[way](plain)
    close(got, expected)
    if way in ("f", "grad", "jit(grad)"):
        pairs = zip(tree.leaves(got), tree.leaves(expected), strict=True)
        assert all(equal_bits(a, b) for a, b in pairs)


def test_forward_over_reverse_of_a_plain_sum():
    """Its cotangent is expanded: all of its elements are one in memory."""
    w = torch.linspace(-1, 1, 4, dtype=torch.float64)

    def f(w):
        return torch.tanh(w * w)

    def hvp(f):
        return jvp(grad(lambda w: f(w).sum()), (w,), (torch.ones_like(w),))[1]

    close(hvp(checkpoint(f)), hvp(f))


@pytest.mark.usefixtures("plain_backend", "real_loops")
def test_a_tangent_of_a_step_that_takes_a_gradient_of_it():
    f = checkpoint(lambda w, x: torch.tanh(w * x))

    def step(w, x):
        return w - 0.1 * grad(lambda w: f(w, x).sum())(w), w

    w, xs = torch.tensor([0.5], dtype=torch.float64), draw(2, 4, 6)
    slope = lambda w: jvp(lambda w: fdl.scan(step, w, xs)[0], (w,), (w,))  # noqa: E731
    close(fdl.jit(slope)(w), slope(w))


def test_backward_and_twice():
    def twice(f):
        leaves = tree.map(lambda p: p.clone().requires_grad_(), params)
        flat = tree.leaves(leaves)
        first = torch.autograd.grad(f(leaves, x), flat, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), flat)

    close(twice(kept), twice(plain))


@pytest.mark.slow
def test_inside_torch_compile_it_is_the_function():
    w, rows = draw(2, 3, 3), draw(3, 4, 1, 3)
    for way in (lambda f: vmap(grad(f), (None, 0)), lambda f: grad(norm(f))):
        torch._dynamo.reset()
        compiled = torch.compile(way(deep(checkpoint(four))), backend="aot_eager", fullgraph=True)
        close(compiled(w, rows), way(deep(four))(w, rows))


def test_the_second_run_draws_from_the_same_key():
    drawn = lambda x, key: x * random.normal(key, x.shape, x.dtype)  # noqa: E731
    got = grad(lambda x: checkpoint(drawn)(x, key).sum())(x)
    close(got, random.normal(key, x.shape, x.dtype))


def deep(layer):
    def of_layers(w, x):
        for _ in range(4):
            x = layer(w, x)
        return x.square().sum()

    return of_layers


def four(w, x):
    for _ in range(4):
        x = torch.tanh(torch.sin(x @ w) + 1)
    return x


def peak(f, *args):
    """Peak of the bytes allocated while `f` runs, from the profiler's records."""
    f(*args)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        f(*args)
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def backward(f):
    def run(w, x):
        w = w.clone().requires_grad_()
        return torch.autograd.grad(f(w, x), w)

    return run


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # torch 2.11's own
@pytest.mark.parametrize(
    "way", [grad, backward, lambda f: fdl.jit(grad(f))], ids=["grad", "backward", "jit"]
)
def test_memory_falls(way):
    w, rows = torch.randn(8, 8), torch.randn(4096, 8)
    layers = peak(way(deep(four)), w, rows)
    kept = peak(way(deep(checkpoint(four))), w, rows)
    assert layers > 1.5 * kept > 1.5 * 4 * rows.nbytes


def test_arguments_may_be_no_tensors_and_results_are_trees():
    def f(p, *, scale, offset=None, flags):
        assert offset is None and flags == ("a", 2)
        return {"y": (p["w"] * scale).sin(), "z": [p["w"].sum()]}

    def use(f):
        def total(p):
            result = f(p, scale=torch.arange(3), flags=("a", 2))
            return (result["y"] * 2).sum() + result["z"][0]

        return total

    p = {"w": draw(2, 3)}
    close(grad(use(checkpoint(f)))(p), grad(use(f))(p))


def test_a_model_of_checkpointed_blocks():
    inner = nn.Model(block.init, checkpoint(block.apply))
    one, two = nn.sequential(block, block), nn.sequential(inner, inner)
    start = tree.cast(one.init(random.key(0)), torch.float64)
    of = lambda m: grad(lambda p: m.apply(p, x, train=True, key=key).square().sum())(start)  # noqa: E731
    close(of(two), of(one))
    whole = nn.Model(two.init, checkpoint(two.apply))  # one inside another
    close(of(whole), of(one))


def test_closing_over_what_is_differentiated_is_an_error():
    closed = lambda w: checkpoint(lambda x: (x * w["a"]).sum())(x[0])  # noqa: E731
    w = {"a": draw(5, 3)}
    partly = lambda w: checkpoint(partial(lambda w, x: (w["a"] * x).sum(), w))(x[0])  # noqa: E731
    match = "closes over .*a, and a gradient is being taken.*pass it as an argument"
    for f in (closed, partly):
        for transformed in (grad(f), vmap(grad(f)), lambda w, f=f: jvp(f, (w,), (w,))):
            with pytest.raises(ValueError, match=match):
                transformed({"a": w["a"].expand(3, 3)})
        with pytest.raises(ValueError, match=match):
            f({"a": w["a"].clone().requires_grad_()})
        close(vmap(f)(tree.stack([w, w]))[1], (x[0] * w["a"]).sum())  # nothing is lost


def test_constants_may_be_closed_over():
    scale = draw(6, 3)
    f = lambda x: (x * scale).sin().sum()  # noqa: E731
    close(grad(checkpoint(f))(x[0]), grad(f)(x[0]))


def test_results_must_be_floating():
    with pytest.raises(ValueError, match=r"checkpoint: the result.*\n.*1: torch\.int64"):
        checkpoint(lambda x: (x, torch.arange(3)))(x)


def test_stop_gradient():
    f = lambda x: (x * stop_gradient({"a": x})["a"]).sum()  # noqa: E731
    close(grad(f)(x), x)
    close(jvp(f, (x,), (x,))[1], (x * x).sum())
    close(vmap(grad(f))(x), x)
    close(grad(lambda x: grad(f)(x).sum())(x), torch.zeros_like(x))
    assert vjp(lambda x: stop_gradient(x), x)[1](x)[0].abs().max() == 0
    y = x.clone().requires_grad_()
    assert not stop_gradient([y])[0].requires_grad
    with pytest.raises(TypeError, match=r"a: 1\.0"):
        stop_gradient({"a": 1.0})
