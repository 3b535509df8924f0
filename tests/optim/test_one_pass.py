"""Eager updates in one pass over each leaf: equal to those leaf by leaf, in every respect."""

import pytest
import torch

from fdl import optim, tree
from fdl._compiler import _dispatch
from fdl._numerics import root
from fdl.optim import _foreach, _one_pass
from fdl.optim._foreach import map_columns
from fdl.optim._one_pass import SYMBOLS, in_one_pass
from tests.optim.test_leaves_foreach import (
    BY_PATH,
    RULES,
    extremes,
    pair,
    run,
    same,
    sizes,
    strides,
)
from tests.support.asserts import draw
from tests.support.every_optimizer import EVERY

DTYPES = [torch.float32, torch.float64]
MATHS = {name: RULES[name] for name in ("scalars", "signs", "reuse", "one twice")}
MATHS |= {"root": lambda g, p: g / (root(p) + 1) + root(g * p) + abs(g).sqrt() + 0 * g}


@pytest.fixture
def passes(monkeypatch, pytestconfig):
    """For each call that could be one pass, whether it was, in a list; one leaf is enough."""
    if _dispatch._extension().result() is None and pytestconfig.getoption("--quick"):
        pytest.skip("the extension is not built yet, which make quick does not do")
    found = []

    def counted(f, columns):
        results = in_one_pass(f, columns)
        found.append(results is not None)
        return results

    monkeypatch.setattr(_foreach, "in_one_pass", counted)
    monkeypatch.setattr(_foreach, "FEW", 1)
    return found


def alone(f, *args, **kwargs):
    """The result of a function that uses `map_columns`, computed leaf by leaf."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_foreach, "_is_plain", lambda: False)
        return f(*args, **kwargs)


@pytest.mark.parametrize(
    "make, dtype, absent",
    [
        (pair, torch.float64, False),
        (sizes, torch.float32, True),
        (strides, torch.float32, False),
        (extremes, torch.float32, False),
    ],
)
@pytest.mark.parametrize("name", [n for n in EVERY if n not in BY_PATH and "lbfgs" not in n])
def test_one_pass_equals_leaf_by_leaf(name, make, dtype, absent, passes):
    params = make(dtype)
    expected = alone(run, EVERY[name], params, absent=absent)
    assert not passes
    same(run(EVERY[name], params, absent=absent), expected)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lion", "rmsprop", "adagrad", "radam"])
def test_the_usual_optimizers_take_one_pass(name, passes):
    opt, params = getattr(optim, name)(0.1), [draw(i, 2, 3 + i) for i in range(5)]
    run(opt, params)
    assert all(passes[1::2]) and (all(passes) or name == "radam"), passes


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MATHS)
def test_blocks_of_leaves_of_any_size(name, dtype, threads, passes):
    params = [draw(n, n).to(dtype) for n in (0, 1, 7, 511, 512, 513, 1024, 1300)]
    params += [draw(1, 3, 700).to(dtype), draw(2, 100_003).to(dtype), draw(3, 0, 4).to(dtype)]
    scalars = [torch.tensor(0.7, dtype=torch.float64)] if name == "scalars" else []

    def f(g, p):
        return (MATHS[name](g, p, *scalars), p * g)

    grads = [0.5 * p - 0.2 for p in params]
    expected = alone(map_columns, f, grads, params)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        same(map_columns(f, grads, params), expected)
    finally:
        torch.set_num_threads(before)
    assert passes == [True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", SYMBOLS, ids=lambda f: f.__name__)
def test_every_operation_of_extreme_numbers(operation, dtype, passes):
    tiny, huge = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    numbers = [0.0, -0.0, 1.0, torch.inf, -torch.inf, torch.nan, tiny, -tiny / 4, huge, -huge]
    x, y = torch.cartesian_prod(*[torch.tensor(numbers, dtype=dtype)] * 2).unbind(1)
    columns = [[x.contiguous()], [y.contiguous()]]

    def f(a, b):
        return (operation(a, b) if SYMBOLS[operation] in "+-*/" else operation(a) + b,)

    expected = alone(map_columns, f, *columns)
    same(map_columns(f, *columns), expected)
    assert passes == [True]


def test_what_nobody_reads_is_not_computed(passes):
    params = [draw(i, 3) for i in range(3)]

    def f(p):
        _ = root(p) * 2
        return (p + 1,)

    same(map_columns(f, params), [[p + 1 for p in params]])
    assert passes == [True]


def others():
    plain, wide = torch.ones(4), torch.ones(4, 6)
    return {
        "16 bits": [plain.bfloat16()],
        "two dtypes": [plain, plain.double()],
        "whole numbers": [plain.long()],
        "complex": [torch.ones(3, dtype=torch.complex64)],
        "elsewhere": [plain, plain.to("meta")],
        "columns": [wide.T],
        "every second": [wide[:, ::2]],
        "expanded": [torch.ones(1).expand(3)],
        "negated": [torch._neg_view(plain)],
        "sparse": [torch.eye(3).to_sparse()],
        "scalar": [torch.tensor(1.0)],
        "recorded": [plain.clone().requires_grad_()],
        "parameter": [torch.nn.Parameter(plain)],
        "none": [plain, None],
        "class": [plain, plain.as_subclass(type("Own", (torch.Tensor,), {}))],
    }


@pytest.mark.parametrize("name", others())
def test_other_leaves_take_another_way(name, passes):
    assert in_one_pass(lambda p: (p + p,), [others()[name]]) is None


def test_leaves_of_other_shapes_take_another_way(passes):
    assert in_one_pass(lambda p, u: (p + u,), [[torch.ones(3)], [torch.ones(1)]]) is None


def test_results_that_are_arguments_or_each_other_take_another_way(passes):
    params = [torch.ones(3)]
    assert in_one_pass(lambda p: (p, p + 1), [params]) is None
    assert in_one_pass(lambda p: (*[p + 1] * 2,), [params]) is None


def test_results_are_as_torch_makes_them(passes):
    with torch.no_grad():
        (made,) = map_columns(lambda p: (p + p,), [torch.nn.Parameter(torch.ones(3))])[0]
    assert type(made) is torch.Tensor and not made.requires_grad and made.is_leaf
    with torch.inference_mode():
        (made,) = map_columns(lambda p: (p + p,), [torch.ones(3)])[0]
    assert made.is_inference() and passes == [True, True]
    with torch.inference_mode():
        inside = torch.ones(3)
    same(map_columns(lambda p: (p * 2,), [inside]), [[torch.full((3,), 2.0)]])


def test_without_the_extension_leaves_are_computed_as_before(monkeypatch):
    monkeypatch.setattr(_one_pass._dispatch, "at_hand", lambda: None)
    assert in_one_pass(lambda p: (p + p,), [[torch.ones(3)]]) is None


def test_the_extension_is_loaded_where_an_earlier_process_built_it(monkeypatch, passes):
    assert _dispatch.at_hand() is _dispatch._loaded[0]
    started = []
    monkeypatch.setattr(_dispatch, "start", lambda: started.append(1))
    monkeypatch.setattr(_dispatch, "_loaded", [])
    for kept in (False, True):
        monkeypatch.setattr(_dispatch, "_is_kept", lambda kept=kept: kept)
        assert _dispatch.at_hand() is None and len(started) == kept


def test_errors_are_those_of_a_leaf(passes):
    def fails(p):
        raise ValueError("of a rule")

    with pytest.raises(ValueError, match="of a rule"):
        map_columns(fails, [torch.ones(2)])
    opt, params = optim.adam(), {"w": torch.ones(2)}
    with pytest.raises(ValueError, match="expected"):
        opt.update({"w": torch.ones(3)}, opt.init(params), params)
    assert tree.leaves(params)[0].sum() == 2
