"""`testing.check_laws`: each law is broken by something, and held by what is pure."""

import itertools

import pytest
import torch

import fdl
from fdl import losses, nn, optim, random, tree
from fdl.testing import check_laws
from tests.support.asserts import draw, unchanged
from tests.support.faults import counted, own_tanh

X = draw(1, 3, 2, 2, 2)
OF_VALUES = ["inputs unchanged", "pure", "jit = eager", "vmap = loop", "scan = loop"]
OF_DERIVATIVES = ["jvp = grad", "vmap of grad = loop", "jit of grad = eager"]


def broken(fn, *args):
    """The names of the laws that do not hold."""
    with pytest.raises(AssertionError) as raised:
        check_laws(fn, *args)
    lines = str(raised.value).splitlines()
    return [line[2:-1] for line in lines if line.startswith("  ") and line[2] != " "]


@pytest.mark.slow
def test_a_loss_keeps_all_laws(plain_backend):
    model = nn.sequential(nn.linear(3, 2), nn.tanh)
    args = tree.cast(model.init(random.key(0)), torch.float64), draw(1, 4, 3)
    with unchanged(args):
        assert check_laws(model.apply, *args) == OF_VALUES + OF_DERIVATIVES


def test_a_training_step_keeps_all_laws():
    model = nn.sequential(nn.linear(3, 2), nn.batch_norm(2), nn.dropout(0.5))
    opt = optim.adam(0.1)
    state = tree.cast(fdl.TrainState.create(model, opt, key=random.key(0)), torch.float64)
    step = fdl.train_step(fdl.supervised(model, losses.cross_entropy), opt)
    batch = draw(1, 4, 3), torch.tensor([0, 1, 1, 0])
    with fdl.disable_jit():
        assert check_laws(step, state, batch) == OF_VALUES + OF_DERIVATIVES


def test_a_derivative_that_is_rounding_alone_breaks_no_law():
    def f(x, shift):
        return (x + shift).softmax(0).sin()  # does not depend on the shift

    with fdl.disable_jit():
        check_laws(lambda shift: f(X.flatten(), shift), torch.tensor(0.3, dtype=torch.float64))


def test_without_floating_values_there_are_no_laws_of_derivatives(plain_backend):
    assert check_laws(lambda key: random.split(key, 3), random.key(0)) == OF_VALUES
    assert check_laws(lambda x: x > 0, X) == OF_VALUES


def compiled_otherwise(x):
    return x if fdl._modes.is_tracing() else 2 * x


def batched_otherwise(x):
    return x if fdl._modes.under_vmap() else 2 * x


def differentiated_otherwise(x):
    return 3 * x if fdl._modes.in_transform() and fdl._modes.is_tracing() else 2 * x


def alternating():
    signs = itertools.chain([0.0], itertools.repeat(-0.0))
    return lambda x: torch.full_like(x, next(signs))


EAGER = {
    "a write": (lambda x: x.mul_(2), ["inputs unchanged", *OF_DERIVATIVES]),
    "a counter": (counted(), [*OF_VALUES[1:], *OF_DERIVATIVES]),
    "torch's generator": (torch.rand_like, [*OF_VALUES[1:], "vmap of grad = loop"]),
    "a branch on a value": (
        lambda x: x if x.sum() > -99 else -x, ["vmap = loop", "vmap of grad = loop"]
    ),
    "batched otherwise": (batched_otherwise, ["vmap = loop", "vmap of grad = loop"]),
    "reverse mode": (own_tanh(lambda y: 1 - y, lambda y: 1 - y * y), ["jvp = grad"]),
    "a sign of 0": (alternating(), ["pure"]),
}  # fmt: skip
COMPILED = {
    "compiled otherwise": (
        compiled_otherwise,
        ["jit = eager", "scan = loop", "jit of grad = eager"],
    ),
    "the gradient compiled otherwise": (differentiated_otherwise, ["jit of grad = eager"]),
}


@pytest.mark.parametrize(("fn", "laws"), EAGER.values(), ids=EAGER)
def test_what_breaks_a_law(fn, laws):
    with fdl.disable_jit():
        assert broken(fn, X) == laws


@pytest.mark.slow
@pytest.mark.parametrize(("fn", "laws"), COMPILED.values(), ids=COMPILED)
def test_what_breaks_a_law_of_programs(fn, laws, plain_backend):
    assert broken(fn, X) == laws


def test_errors():
    with pytest.raises(TypeError, match="fn must be a function, got a tensor"):
        check_laws(X, X)
    with pytest.raises(TypeError, match="each leaf of the arguments must be a tensor"):
        check_laws(torch.mul, X, 2.0)
    with pytest.raises(TypeError, match="each leaf of the result must be a tensor"):
        check_laws(lambda x: 3, X)
    with pytest.raises(ValueError, match="at least one tensor, got none"):
        check_laws(lambda: X)
