"""Rules of leaves that are alike are traced once, and the graph is the same."""

import pytest
import torch
from torch.func import grad, vmap

from fdl import jit, optim, random, scan, tree
from fdl._compiler._repeated import repeated
from fdl.optim import _foreach
from fdl.optim._foreach import map_columns, map_leaves
from tests.compiler.test_dynamic_index import traced
from tests.support.asserts import draw, equal_bits
from tests.support.every_optimizer import EVERY


def alike():
    """Leaves of a few forms, most of them several times."""
    wide = draw(9, 4, 6)
    return {
        "w": [draw(i, 2, 3) for i in range(3)],
        "scalar": [draw(i) for i in range(2)],
        "columns": [*wide.unbind(1)[:2]],
        "half": [draw(i, 2).bfloat16() for i in range(2)],
    }


@pytest.fixture
def each(monkeypatch):
    """Run a function with rules that are called for every leaf."""

    def run(f, *args):
        with monkeypatch.context() as patch:
            patch.setattr(_foreach, "repeated", lambda f: f)
            return f(*args)

    return run


def counted(f):
    calls = []

    def call(*args):
        calls.append(len(args))
        return f(*args)

    return call, calls


def step(opt):
    def update(grads, state, params):
        updates, state = opt.update(grads, state, params, value=torch.tensor(1.0))
        return optim.apply_updates(params, updates), updates, state

    return update


@pytest.mark.parametrize("name", [n for n in EVERY if "lbfgs" not in n])
def test_every_optimizer_is_traced_as_if_leaf_by_leaf(name, each):
    params = alike()
    if name in ("freeze", "masked", "multi_transform", "muon", "scale_by_muon"):  # by path
        params = {"w": draw(0, 2, 3), "b": draw(1, 3)}
    opt = EVERY[name]
    grads = tree.map(lambda p: (3 * p).sin(), params)
    if "half" in params:
        grads["w"][1] = None
    state = opt.init(params)
    expected = each(traced(step(opt)), grads, state, params)
    found = traced(step(opt))(grads, state, params)
    found, expected = tree.flatten_dict(found), tree.flatten_dict(expected)
    assert found.keys() == expected.keys()
    for path, x in found.items():
        y = expected[path]
        assert (x is y is None) or (equal_bits(x, y) and x.stride() == y.stride()), path


def test_a_rule_is_called_once_for_a_form():
    rule, calls = counted(lambda p, g: (p - g * 2, g))
    params = [draw(i, 3) for i in range(5)] + [draw(i, 2, 2) for i in range(4)]

    def f(params):
        return map_columns(rule, params, params[:1] * 5 + params[5:])

    expected = map_columns(lambda p, g: (p - g * 2, g), params, params[:1] * 5 + params[5:])
    calls.clear()
    found = traced(f)(params)
    assert len(calls) == 3  # the first argument twice is a form of its own
    assert all(map(equal_bits, tree.leaves(found), tree.leaves(expected)))


RULES = {
    "an argument": lambda p: p,
    "what it closes over": lambda p: torch.tensor(3.0) * p,
    "a view": lambda p: (p * 2).view(-1).unsqueeze(0),
    "a view of an argument": lambda p: p.view(1, -1),
    "a view and its base": lambda p: (lambda y: [y, y[:1], y])(p + 1),
    "nothing that depends on it": lambda p: torch.zeros_like(p),
    "a number": lambda p: {"x": p * 2, "n": 3, "none": None},
    "in place": lambda p: p.clone().mul_(2),
    "a loop": lambda p: scan(lambda c, x: (c * x, c), p[0], p)[0],
    "sorted": lambda p: p.sort().values,
    "a gradient": lambda p: grad(lambda p: (p**3).sum())(p),
    "a batch": lambda p: vmap(torch.sin)(p),
    "draws": lambda p: random.normal(random.key(3), p.shape) * p,
}


@pytest.mark.parametrize("name", RULES)
def test_rules_of_any_kind(name):
    params = [draw(i, 3) for i in range(4)]

    def changed(params):
        found = map_columns(lambda p: (RULES[name](p),), params)[0]
        kept = tree.map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, found)
        for i, leaf in enumerate(tree.leaves(found)):
            if isinstance(leaf, torch.Tensor) and name not in ("an argument", *SHARED):
                leaf.add_(i)  # nobody else sees it
        return [x for x in tree.leaves([kept, found]) if isinstance(x, torch.Tensor)]

    expected = changed([p.clone() for p in params])
    found = traced(changed)(params)
    assert len(found) == len(expected) and all(map(equal_bits, found, expected))


SHARED = ("a view of an argument",)  # a jitted function does not change its arguments


def test_what_is_transformed_is_traced_leaf_by_leaf():
    rule, calls = counted(lambda p: p.sin())
    params = [draw(i, 3) for i in range(4)]
    f = vmap(lambda params: map_leaves(rule, params))
    found = traced(f)(params)
    assert len(calls) == 4
    torch.testing.assert_close(found, f(params))
    slopes = grad(lambda params: sum(x.sum() for x in map_leaves(torch.sin, params)))
    torch.testing.assert_close(traced(slopes)(params), slopes(params))


def test_leaves_from_outside_are_traced_one_by_one():
    rule, calls = counted(lambda p: p * 2)
    outside = [draw(i, 3) for i in range(3)]
    found = traced(lambda x: map_leaves(rule, [*outside, x, x + 1]))(draw(5, 3))
    assert len(calls) == 4
    expected = [2 * p for p in [*outside, draw(5, 3), draw(5, 3) + 1]]
    assert all(map(equal_bits, found, expected))


def test_in_the_body_of_a_loop(each):
    opt, params = optim.adam(), {str(i): draw(i, 3) for i in range(4)}

    def run(params):
        def body(carry, _):
            params, state = carry
            updates, state = opt.update(params, state, params)
            return (optim.apply_updates(params, updates), state), ()

        return scan(body, (params, opt.init(params)), None, length=3)[0]

    expected = each(traced(run), params)
    found = traced(run)(params)
    assert all(map(equal_bits, tree.leaves(found), tree.leaves(expected)))


def test_outside_of_a_trace_it_is_the_function():
    assert repeated(torch.sin) is torch.sin


def test_compiled():
    opt, params = optim.adamw(0.1), alike()
    state, grads = opt.init(params), tree.map(torch.sin, params)
    found = jit(step(opt))(grads, state, params)
    expected = step(opt)(grads, state, params)
    for x, y in zip(tree.leaves(found), tree.leaves(expected), strict=True):
        torch.testing.assert_close(
            x, y, rtol=1e-5 if x.dtype != torch.bfloat16 else 0.02, atol=1e-6
        )
