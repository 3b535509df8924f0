"""`testing.check_grads`: what it takes for wrong, and what it refuses to call right."""

import pytest
import torch
from torch.func import grad

from fdl import losses, nn, random, tree
from fdl.testing import check_grads
from tests.support.asserts import draw, unchanged
from tests.support.faults import own_tanh

X = draw(1, 4)


def right(y):
    return 1 - y * y


def normalised(x):
    return (x - x.mean(0)) / x.std(0)


RIGHT = {
    "tree of arguments": (
        lambda p, x: (p["w"] @ x).sin() + p["b"], {"w": draw(2, 3, 4), "b": draw(3, 3)}, X
    ),
    "several results": (lambda x: {"a": x.exp(), "n": torch.tensor(3), "b": [x.sum()]}, X),
    "a key and labels": (
        lambda key, z, y: losses.cross_entropy(z * random.uniform(key, (3, 4), torch.float64), y),
        random.key(1), draw(4, 3, 4), torch.tensor([0, 3, 1]),
    ),
    "a leaf without influence": (lambda a, b: a.sin(), X, draw(5, 2)),
    "a bias before a norm: its gradient is rounding": (
        lambda w, b, x: normalised(1e3 * x * w + b).sin(),
        draw(6, 3), draw(7, 3), draw(8, 6, 3),
    ),
    "linear: the second derivative is 0": (lambda x: 3 * x, X),
    "small": (lambda x: 1e-9 * x.sin(), X),
    "large": (lambda x: 1e9 * x.sin(), X),
    "far from 0": (lambda x: (x / 1e4).sin(), 1e4 * X),
    "a number": (lambda x: x.sin(), torch.tensor(0.3, dtype=torch.float64)),
}  # fmt: skip


@pytest.mark.parametrize("case", RIGHT.values(), ids=RIGHT)
def test_right_derivatives_pass(case):
    f, *args = case
    with unchanged(args):
        check_grads(f, *args)


WRONG = {
    "half detached": (lambda x: x.sin() * x.detach(), ["fwd", "rev"]),
    "one element detached": (
        lambda x: torch.cat([x[:1].detach(), x[1:]]).sin(), ["fwd", "rev"]
    ),
    "a factor at a scale of 1e-6": (
        lambda x: 1e-6 * (2 * x.sin() - x.sin().detach()), ["fwd", "rev"]
    ),
    "reverse mode": (own_tanh(lambda y: 1 - y, right), ["rev"]),
    "forward mode": (own_tanh(right, lambda y: 1 - y), ["fwd"]),
    "NaN": (lambda x: torch.where(x > 99, (x - 99).sqrt(), x), ["rev"]),
}  # fmt: skip


@pytest.mark.parametrize(("f", "modes"), WRONG.values(), ids=WRONG)
def test_wrong_derivatives_are_named(f, modes):
    with pytest.raises(AssertionError) as raised:
        check_grads(f, X, order=1)
    lines = str(raised.value).splitlines()[1:]
    assert [line.split(" by 0: ")[0].strip() for line in lines] == modes


def test_the_second_order_is_checked():
    f = own_tanh(*[lambda y: right(y).detach()] * 2)
    check_grads(f, X, order=1)
    with pytest.raises(
        AssertionError, match=r"rev of rev by 0: expected .*, got 0, relative gap 1"
    ):
        check_grads(f, X, modes=("rev",))


def test_paths_of_arguments_and_results_are_named():
    def f(params, x):
        return {"y": params["w"].detach() * x, "z": params["w"] + x}

    with pytest.raises(AssertionError) as raised:
        check_grads(f, {"w": X}, draw(2, 4), order=1)
    lines = str(raised.value).splitlines()
    assert [line.partition(":")[0] for line in lines[1:]] == [
        "  fwd by 0.w, result y", "  rev by 0.w"
    ]  # fmt: skip


def test_a_layer_and_a_step_of_another_size():
    model = nn.sequential(nn.linear(4, 3), nn.layer_norm(3), nn.gelu)
    params = tree.cast(model.init(random.key(0)), torch.float64)
    check_grads(model.apply, params, draw(1, 2, 4), eps=1e-3, rtol=1e-5)


NOTHING = {
    "a constant": (lambda x: torch.ones(2, dtype=torch.float64), X),
    "a factor that is divided by": (
        lambda x: (X * x).sum() / x,
        torch.tensor(0.3, dtype=torch.float64),
    ),
    "all detached by rounding": (lambda x: x.round(), X),
}


@pytest.mark.parametrize("case", NOTHING.values(), ids=NOTHING)
def test_nothing_to_compare_fails(case):
    f, x = case
    with pytest.raises(AssertionError, match="all derivatives and all differences are 0"):
        check_grads(f, x)


def test_errors():
    with pytest.raises(ValueError, match="an argument must have floating values, got none"):
        check_grads(lambda n: n.double(), torch.tensor(3))
    with pytest.raises(ValueError, match="an argument must have floating values, got none"):
        check_grads(lambda x: x, X[:0])
    with pytest.raises(ValueError, match="the result must have floating values, got none"):
        check_grads(lambda x: x > 0, X)
    with pytest.raises(TypeError, match=r"an argument must be in float64.*\n  0.w: float32\[4\]"):
        check_grads(lambda p: p["w"].double(), {"w": X.float()})
    with pytest.raises(TypeError, match=r"the result must be in float64.*\n  the value: float32"):
        check_grads(lambda x: x.float(), X)
    with pytest.raises(TypeError, match=r"complex leaves are not differentiated \(0\)"):
        check_grads(lambda x: x.abs(), X + 0j)
    with pytest.raises(ValueError, match="modes must be 'fwd', 'rev' or both, got 'fwd'"):
        check_grads(torch.sin, X, modes="fwd")
    with pytest.raises(ValueError, match="order must be at least 1, got 0"):
        check_grads(torch.sin, X, order=0)
    with pytest.raises(ValueError, match="eps must be positive, got 0"):
        check_grads(torch.sin, X, eps=0.0)
    with pytest.raises(TypeError, match="f must be a function, got a tensor"):
        check_grads(X, X)


def test_it_agrees_with_the_derivative_of_a_derivative():
    check_grads(grad(lambda x: (x**3).sum()), X, order=1)
