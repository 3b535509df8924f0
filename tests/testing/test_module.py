"""`testing.check_equals_module`: which stage a fault is found in, what is said, what is refused.

tests/testing/test_faults.py plants faults.
"""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn as oo

import fdl
from fdl import interop, losses, nn, optim, random, tree
from fdl.testing import check_equals_module
from tests.support.asserts import draw, unchanged

BATCH = draw(1, 8, 3), torch.tensor([0, 1, 3, 2, 1, 1, 0, 2])


def module():
    torch.manual_seed(0)
    return oo.Sequential(oo.Linear(3, 4), oo.BatchNorm1d(4), oo.GELU(), oo.Linear(4, 4))


def port(**options):
    return nn.sequential(nn.linear(3, 4), nn.batch_norm(4, **options), nn.gelu, nn.linear(4, 4))


def check(model, original=None, batch=BATCH, loss=losses.cross_entropy, **options):
    check_equals_module(model, original or module(), batch, loss, **options)


def differing(error):
    """The stages that differ, and those that agree."""
    text = str(error.value)
    return [re.findall(rf"^  (.+): {word}$", text, re.M) for word in ("differ", "agree")]


OPTIMIZERS = {
    "sgd": (optim.sgd(0.1), lambda net: torch.optim.SGD(net.parameters(), 0.1)),
    # The bias before the norm moves by rounding that Adam has scaled up.
    "adam": (optim.adam(0.1), lambda net: torch.optim.Adam(net.parameters(), 0.1)),
    "of another library": (
        (lambda params: (), lambda grads, state: (tree.map(lambda g: -0.1 * g, grads), state)),
        lambda net: torch.optim.SGD(net.parameters(), 0.1),
    ),
}


@pytest.mark.parametrize("pair", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_right_port_passes(pair):
    original = module()
    with unchanged(original.state_dict(), BATCH):
        check(port(), original, optimizers=pair)
    assert original.training and original[0].weight.dtype == torch.float32


def test_an_optimizer_with_a_closure():
    original = oo.Sequential(oo.Linear(3, 4), oo.Tanh(), oo.Linear(4, 4))
    pair = (
        optim.lbfgs(0.1, max_iter=3),
        lambda net: torch.optim.LBFGS(net.parameters(), 0.1, max_iter=3),
    )
    model = nn.sequential(nn.linear(3, 4), nn.tanh, nn.linear(4, 4))
    check(model, original, optimizers=pair, steps=3)


def test_any_module_equals_its_conversion():
    original = module()
    check(interop.from_module(original)[0], original, optimizers=OPTIMIZERS["adam"], steps=2)


def test_a_pair_of_losses_a_float32_batch_and_outputs_in_a_tree():
    class Two(oo.Module):
        def __init__(self):
            super().__init__()
            self.first = oo.Linear(3, 2)

        def forward(self, x):
            return {"y": self.first(x["x"]), "x": x["x"]}

    model = nn.Model(
        lambda key: {"first": nn.linear(3, 2).init(key)},
        lambda params, x, *, train=False, key=None: {
            "y": F.linear(x["x"], **params["first"]), "x": x["x"],
        },
    )  # fmt: skip
    batch = {"x": draw(1, 5, 3).float()}, draw(2, 5, 2).float()
    ours, theirs = (lambda z, y: (z["y"] - y).square(), lambda z, y: F.mse_loss(z["y"], y))
    check(model, Two(), batch, (ours, theirs))


def test_the_first_step_that_differs_is_named():
    ours = optim.adam(0.1, betas=(0.9, 0.99))
    with pytest.raises(AssertionError) as raised:
        check(port(), optimizers=(ours, OPTIMIZERS["adam"][1]))
    assert differing(raised)[0] == ["10 steps of training"] and len(differing(raised)[1]) == 7
    assert "first at step 2; of parameters, how far they have moved:" in str(raised.value)
    assert re.search(r"\n    3\.weight: 16 of 16 values differ, most at", str(raised.value))


def test_frozen_parameters_move_in_neither_or_are_named():
    original = module()
    original[3].requires_grad_(False)
    theirs = OPTIMIZERS["sgd"][1]
    check(port(), original, optimizers=(optim.freeze(optim.sgd(0.1), "3.*"), theirs))
    with pytest.raises(AssertionError, match=r"first at step 1.*\n    3\.weight") as raised:
        check(port(), original, optimizers=(optim.sgd(0.1), theirs))
    assert "0.weight" not in str(raised.value)


def test_frozen_statistics_stay_frozen():
    original = module()
    original[1].eval()
    original[1].running_mean += 0.3
    always = nn.batch_norm(4)
    frozen = always._replace(
        apply=lambda p, b, x, *, train=False, key=None, mask=None: always.apply(p, b, x)
    )
    layers = nn.linear(3, 4), frozen, nn.gelu, nn.linear(4, 4)
    check(nn.sequential(*layers), original, optimizers=OPTIMIZERS["sgd"], steps=2)


def test_a_small_gradient_is_not_hidden_by_large_ones():
    """A factor in a leaf whose gradients are a billionth of the largest."""

    class Scaled(oo.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = oo.Parameter(torch.ones(3)), oo.Parameter(torch.ones(3))

        def forward(self, x):
            return self.a * x + 1e-9 * self.b * x

    def apply(params, x, *, train=False, key=None):
        y = params["a"] * x
        detached = params["b"].detach() / 2 + params["b"] / 2
        return y + 1e-9 * detached * x

    model = nn.Model(lambda key: {"a": torch.ones(3), "b": torch.ones(3)}, apply)
    with pytest.raises(
        AssertionError, match=r"  b: 3 of 3 .* got is 0\.5 times expected"
    ) as raised:
        check(model, Scaled(), (BATCH[0], BATCH[0] * 3), losses.mse, optimizers=OPTIMIZERS["sgd"])
    assert differing(raised)[0] == ["gradients", "10 steps of training"]


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda z, y: (z * 0).sum(), "all are 0: the loss does not depend on the parameters"),
        (lambda z, y: z.sum() * torch.nan, "the value: expected nan, got nan"),
    ],
)
def test_nothing_to_compare_fails(loss, words):
    with pytest.raises(AssertionError, match=words):
        check(port(), loss=loss)


def test_parameters_that_do_not_move_prove_nothing():
    pair = optim.sgd(0.0), lambda net: torch.optim.SGD(net.parameters(), 0.0)
    with pytest.raises(AssertionError, match="no parameter has moved: nothing has been compared"):
        check(port(), optimizers=pair, steps=2)


NAMED = nn.sequential(a=nn.linear(3, 4), b=nn.batch_norm(4), c=nn.gelu, d=nn.linear(4, 4))


def test_names_translate_paths_and_their_beginnings():
    check(NAMED, names={"a": "0", "b.weight": "1.weight", "b": "1", "d": "3"})
    with pytest.raises(ValueError, match=r"names must have paths of the model, got \['e'\]"):
        check(NAMED, names={"e": "0"})


def test_paths_and_shapes_are_listed():
    with pytest.raises(AssertionError) as raised:
        check(NAMED)
    text = str(raised.value)
    assert "\n  0.weight: the model lacks this parameter [4, 3] of the module\n" in text
    assert "\n  a.weight: the module has no parameter 'a.weight'\n" in text
    assert "b.running_mean: the module has no buffer 'b.running_mean'" in text
    assert "in this order the shapes fit: names={'a.weight': '0.weight', 'a.bias': '0.bias'" in text

    transposed = nn.Model(lambda key: {"weight": torch.ones(3, 2), "bias": torch.ones(2)}, max)
    with pytest.raises(
        AssertionError, match=r"weight: expected \[2, 3\], got \[3, 2\]; it is stored"
    ):
        check(transposed, oo.Linear(3, 2))

    layer = oo.Linear(4, 4)
    with pytest.raises(
        AssertionError, match=r"1\.weight: the module has no .*; there it is '0.weight'"
    ):
        check(nn.sequential(nn.linear(4, 4), nn.linear(4, 4)), oo.Sequential(layer, layer))

    buffer = oo.Module()
    buffer.register_buffer("scale", torch.ones(2))
    scale = nn.Model(lambda key: {"scale": torch.ones(2)}, max)
    with pytest.raises(
        AssertionError, match=r"scale: the model lacks this buffer \[2\].*a parameter"
    ):
        check(scale, buffer)


def test_what_draws_is_refused():
    drops = oo.Sequential(oo.Linear(3, 4), oo.Dropout(0.5))
    for rates, which in (((0.5, 0.0), "model"), ((0.0, 0.5), "module")):
        model = nn.sequential(nn.linear(3, 4), nn.dropout(rates[0]))
        with pytest.raises(ValueError, match=f"the {which} draws random numbers in training"):
            check(model, oo.Sequential(oo.Linear(3, 4), oo.Dropout(rates[1])))
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"nn\.dropout\(0\.0\) and torch\.nn\.Dropout\(0\.0\)"):
        check(interop.from_module(drops)[0], drops)
    assert torch.equal(torch.get_rng_state(), before)


ERRORS = {
    "a module as model": (
        lambda: check(module()), TypeError, "model must be a Model, got the torch module Sequential"
    ),
    "a model as module": (
        lambda: check(port(), port()), TypeError, "module must be an nn.Module, got a StatefulModel"
    ),
    "loss": (lambda: check(port(), loss=3), TypeError, r"loss must be a function .*, got an int"),
    "three losses": (
        lambda: check(port(), loss=(max, max, max)), TypeError, "loss must be .*, got a tuple"
    ),
    "optimizers swapped": (
        lambda: check(port(), optimizers=OPTIMIZERS["sgd"][::-1]), TypeError, "optimizers must be"
    ),
    "an optimizer alone": (
        lambda: check(port(), optimizers=optim.sgd(0.1)), TypeError, "optimizers must be a pair"
    ),
    "no optimizer made": (
        lambda: check(port(), optimizers=(optim.sgd(0.1), lambda net: None)),
        TypeError, "the second of optimizers must return an optimizer of torch, got a NoneType",
    ),
    "steps": (lambda: check(port(), steps=0), ValueError, "steps must be at least 1, got 0"),
    "rtol": (lambda: check(port(), rtol=-1.0), ValueError, "rtol must be finite and at least 0"),
    "no examples": (
        lambda: check(port(), batch=tree.map(lambda x: x[:0], BATCH)), ValueError,
        "batch must have examples, got none",
    ),
    "a mask": (
        lambda: check(port(), batch=(*BATCH, torch.ones(8))), ValueError, "batch must have no mask"
    ),
    "names": (
        lambda: check(port(), names=["0"]), TypeError, "names must be a dict .*, got a list"
    ),
    "a batch": (lambda: check(port(), batch=BATCH[0]), TypeError, "batch must be Batch"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "words"), ERRORS.values(), ids=ERRORS)
def test_errors(call, kind, words):
    with pytest.raises(kind, match=f"check_equals_module: {words}"):
        call()


def test_a_model_without_parameters():
    check_equals_module(
        nn.Model(lambda key: {}, lambda params, x, *, train=False, key=None: x.sin()),
        type("Sin", (oo.Module,), {"forward": lambda self, x: x.sin()})(),
        (BATCH[0], BATCH[0]),
        losses.mse,
    )


def test_a_key_of_the_state_is_not_what_differs():
    """The port may draw in initialisation: its values are replaced by the module's."""
    model, original = port(), module()
    state = fdl.TrainState.create(model, optim.sgd(0.1), key=random.key(7))
    assert not tree.allclose(state.params, interop.from_module(original)[1])
    check(model, original)
