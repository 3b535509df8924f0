"""Eager updates by torch's foreach functions: equal to those leaf by leaf, in every respect."""

import contextlib

import pytest
import torch
from torch import Tensor
from torch.autograd.forward_ad import dual_level
from torch.func import grad, vmap

from fdl import jit, optim, tree
from fdl._numerics import root
from fdl.optim import _foreach, _leaves
from fdl.optim._foreach import map_columns, map_leaves
from fdl.optim._leaves import Leaves
from tests.support.asserts import draw, equal_bits
from tests.support.every_optimizer import EVERY

FORMAT = torch.contiguous_format
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Those whose maths are not elementwise.
LEAF_BY_LEAF = {
    *("adafactor", "adaptive_grad_clip", "add_noise", "centralize", "scale_by_trust_ratio"),
}
# Of "w" and "b" alone, by their paths.
BY_PATH = {"freeze", "masked", "multi_transform", "muon", "scale_by_muon"}


@pytest.fixture
def one_by_one(monkeypatch):
    """A context in which every function is called leaf by leaf."""

    @contextlib.contextmanager
    def context():
        with monkeypatch.context() as patch:
            patch.setattr(_foreach, "_is_plain", lambda: False)
            yield

    return context


@pytest.fixture
def batches(monkeypatch):
    """The numbers of leaves computed together, in a list; two leaves are enough."""
    counts = []

    def compute(results):
        columns = _leaves.compute(results)
        counts.append(len(columns[0]))
        return columns

    monkeypatch.setattr(_foreach, "in_one_pass", lambda f, columns: None)
    monkeypatch.setattr(_foreach, "compute", compute)
    monkeypatch.setattr(_foreach, "FEW", 1)
    return counts


def pair(dtype):
    return {"w": draw(0, 2, 3).to(dtype), "b": draw(1, 2).to(dtype)}


def sizes(dtype):
    shapes = [(2, 3), (2,), (1,), (), (0,), (3, 0), (1, 1, 4), (33,), (17, 5)]
    return {f"layer{i}": {"w": draw(i, *shape).to(dtype)} for i, shape in enumerate(shapes)}


def strides(dtype):
    wide = draw(0, 4, 6).to(dtype)
    return {
        "plain": draw(1, 3, 4).to(dtype),
        "transposed": draw(2, 4, 3).to(dtype).T,
        "sliced": wide[:, ::2],
        "row": wide[1],
        "channels_last": draw(3, 2, 3, 4, 5).to(dtype).to(memory_format=torch.channels_last),
        "pixel": draw(4, 3, 4, 1, 1).to(dtype).to(memory_format=torch.channels_last),
        "expanded": draw(5, 1, 3).to(dtype).expand(4, 3),
        "last": draw(6, 3).to(dtype),
    }


def tied(dtype):
    leaf = draw(0, 3).to(dtype)
    return [leaf, leaf, leaf.view(3), torch.nn.Parameter(draw(1, 2).to(dtype), False)]


def mixed(dtype):
    others = [torch.float32, torch.float64, torch.bfloat16, dtype]
    return [draw(i, 3).to(others[i % 4]) for i in range(8)]


def extremes(dtype):
    tiny, huge = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    numbers = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, tiny, -tiny, tiny / 4, huge, -huge]
    return [torch.tensor(numbers[i:] + numbers[:i], dtype=dtype) for i in range(len(numbers))]


def empty(dtype):
    return {}


TREES = [sizes, strides, tied, mixed, extremes, empty]


def grads_of(params, step):
    """Gradients that depend on the parameters; like them in form, but for some of another dtype."""

    def of_leaf(p):
        g = (p * 3 - 0.5 * step).detach()
        return (
            g.double()
            if p.shape == (33,)
            else g.as_strided(p.shape, p.stride())
            if 0 in p.stride()
            else g
        )

    return tree.map(of_leaf, params)


def run(opt, params, steps=3, absent=False):
    """All that the steps return."""
    state, history = opt.init(params), []
    for step in range(1, steps + 1):
        grads = grads_of(params, step)
        if absent:
            leaves, structure = _foreach.flatten(grads)
            leaves = [None if i % 3 == 1 else g for i, g in enumerate(leaves)]
            grads = _foreach.unflatten(leaves, structure)
        updates, state = opt.update(grads, state, params, value=torch.tensor(1.0 / step))
        params = optim.apply_updates(params, updates)
        history.append((updates, state, params))
    return history


def same(together, alone):
    """Compare structure, bits, strides, and which tensors share memory."""
    (ours, form), (theirs, expected) = _foreach.flatten(together), _foreach.flatten(alone)
    assert form == expected
    for x, y in zip(ours, theirs, strict=True):
        assert type(x) is type(y)
        if isinstance(x, Tensor):
            assert x.stride() == y.stride() and x.requires_grad == y.requires_grad
            assert torch.equal(x.isnan(), y.isnan())
            x, y = (z.detach().nan_to_num(7.0).clone(memory_format=FORMAT) for z in (x, y))
            assert equal_bits(x, y)
    assert sharing(ours) == sharing(theirs)


def sharing(leaves):
    """For each tensor the first one in its memory."""
    seen = {}
    where = [x.untyped_storage()._cdata if isinstance(x, Tensor) else id(x) for x in leaves]
    return [seen.setdefault(place, i) for i, place in enumerate(where)]


def every_case():
    """Each optimizer with each tree, for two of all dtypes, with and without missing gradients."""
    pairs = [
        (name, make)
        for name in EVERY
        for make in [pair, *TREES]
        if "lbfgs" not in name and (make is pair or name not in BY_PATH)
    ]
    variants = [(dtype, absent) for absent in (False, True) for dtype in DTYPES]
    return [(*each, *variants[j % 8]) for i, each in enumerate(pairs) for j in (i, i + 5)]


@pytest.mark.parametrize("name, make, dtype, absent", every_case())
def test_together_equals_leaf_by_leaf(name, make, dtype, absent, one_by_one, batches):
    params = make(dtype)
    with one_by_one():
        alone = run(EVERY[name], params, absent=absent)
    assert not batches
    same(run(EVERY[name], params, absent=absent), alone)


@pytest.mark.parametrize("name", [n for n in EVERY if n not in BY_PATH and "lbfgs" not in n])
def test_elementwise_optimizers_are_computed_together(name, batches):
    opt, params = EVERY[name], [draw(i, 2, 3 + i) for i in range(5)]
    opt.update(grads_of(params, 1), opt.init(params), params, value=torch.tensor(1.0))
    assert (sum(batches) < len(tree.leaves(params))) == (name in LEAF_BY_LEAF), batches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_of_many_leaves_is_few_batches(dtype, batches):
    params = [draw(i, 4).to(dtype) for i in range(200)]
    run(optim.adamw(0.1), params, steps=1)
    assert batches == [200, 200]  # the chain, and apply_updates


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_rule_that_is_not_elementwise_does_not_slow_down_its_neighbours(dtype, batches):
    params = [draw(i, 4).to(dtype) for i in range(20)]
    opt = optim.lamb(0.1, weight_decay=0.1)  # whose trust ratio comes third of four
    updates, _ = opt.update(params, opt.init(params), params)
    assert batches == [20, 20, 20]
    assert all(u.dtype is dtype for u in updates)


def test_leaves_of_each_dtype_are_a_batch(batches):
    params = [draw(i, 3).to(dtype) for i in range(5) for dtype in DTYPES]
    run(optim.sgd(0.1, 0.9), params, steps=1)
    assert batches == [5] * 8


def test_large_leaves_are_computed_alone_and_the_others_in_small_batches(batches, monkeypatch):
    monkeypatch.setitem(_foreach.MOST, "cpu", 12)
    monkeypatch.setattr(_foreach, "FEW", 2)
    params = [torch.ones(4), torch.ones(7), *torch.ones(4, 5).unbind()]
    moved = optim.apply_updates(params, params)
    assert batches == [2, 2] and all((p == 2).all() for p in moved)


def test_few_leaves_are_computed_alone(batches, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(_foreach, "compute", batches.append)
    run(optim.adam(), pair(torch.float32), steps=1)
    assert not batches


def test_leaves_on_another_device_are_computed_alone(batches):
    params = [torch.ones(3), torch.ones(2, device="meta"), torch.ones(1)]
    updates, _ = optim.sgd(0.1).update(params, optim.sgd(0.1).init(params), params)
    assert [u.device.type for u in updates] == ["cpu", "meta", "cpu"] and batches == [2]


def after_three(lr, params):
    opt = optim.chain(optim.scale_by_adam(), optim.scale_by_learning_rate(lr))
    state = opt.init(params)
    for step in range(3):
        grads = tree.map(lambda p, s=step: (p + s).sin(), params)
        updates, state = opt.update(grads, state, params)
        params = optim.apply_updates(params, updates)
    return sum((p**2).sum() for p in tree.leaves(params))


def test_autograd_records_an_update(batches):
    """Of a leaf, or of the learning rate alone: as torch.func differentiates it."""
    lr, params = torch.tensor(0.1, dtype=torch.float64), sizes(torch.float64)
    by_lr, by_params = grad(after_three, argnums=(0, 1))(lr, params)
    assert not batches
    recorded = lr.clone().requires_grad_()
    after_three(recorded, params).backward()
    assert torch.equal(recorded.grad, by_lr) and by_lr != 0
    batches.clear()
    scaled = map_leaves(lambda p: p * recorded, [torch.ones(3)] * 5)
    assert all(p.grad_fn is not None for p in scaled) and not batches
    leaves = tree.map(lambda p: p.clone().requires_grad_(), params)
    after_three(lr, leaves).backward()
    assert not tree.diff(by_params, tree.map(lambda p: p.grad, leaves), rtol=1e-12, atol=1e-15)
    one = {path: p.clone() for path, p in tree.flatten_dict(params).items()}
    one["layer1.w"].requires_grad_()
    after_three(lr, tree.unflatten_dict(one)).backward()
    assert torch.allclose(one["layer1.w"].grad, by_params["layer1"]["w"])
    with torch.no_grad():
        assert not after_three(recorded, leaves).requires_grad and batches


def test_what_is_traced_or_transformed_is_computed_leaf_by_leaf(batches, monkeypatch):
    params = sizes(torch.float32)

    def update(params):
        return run(optim.adam(0.1), params, steps=1)

    eager = update(params)
    assert batches
    batches.clear()
    monkeypatch.setattr(_foreach, "_batches", pytest.fail)
    assert not tree.diff(eager, jit(update)(params), rtol=1e-6, atol=1e-7)
    rows = vmap(update)(tree.stack([params, params]))
    assert not tree.diff(eager, tree.unstack(rows)[0], rtol=1e-6, atol=1e-7)
    with dual_level():
        dual = tree.map(
            lambda p: torch.autograd.forward_ad.make_dual(p, torch.ones_like(p)), params
        )
        moved = tree.leaves(optim.apply_updates(dual, params))
        assert all(torch.autograd.forward_ad.unpack_dual(p).tangent is not None for p in moved)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        same(update(params), eager)
    assert not batches


def test_a_function_mode_sees_each_operation(batches):
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen, params = [], [torch.ones(3)] * 5
    with Mode():
        optim.apply_updates(params, params)
    assert seen.count(Tensor.add) == 5 and not batches
    with torch.device("meta"):  # a mode, which changes only where tensors are made
        moved = map_leaves(lambda p: 2.0 * p + p, params)
    assert batches == [5] and all((p == 3).all() for p in moved)


def test_a_rule_may_use_whatever_acts_on_one_leaf(batches, one_by_one):
    """What is not elementwise, or not known, runs leaf by leaf; the same rule, the same bits."""
    table = torch.arange(3.0)
    rules = [
        lambda g, p: g - g.mean(),
        lambda g, p: g.cumsum(0) if p.ndim == 1 else g,
        lambda g, p: g * table,
        lambda g, p: g * p.numel(),
        lambda g, p: g.clone().mul_(2),
        lambda g, p: torch.stack([g, p]).amax(0),
        lambda g, p: g if p.sum() > 0 else -g,
        lambda g, p: torch.autograd.functional.vjp(torch.sin, p, g)[1],
        lambda g, p: vmap(torch.sin)(g),
        lambda g, p: torch.tensor(g.tolist()),
        lambda g, p: torch.add(g, p, alpha=2),
    ]
    params = [draw(i, 3) for i in range(6)]
    for rule in rules:
        opt = optim.leafwise("own", lambda g, p, t, rule=rule: (rule(g, p), {}), {})
        with one_by_one():
            alone = run(opt, params, steps=1)
        batches.clear()
        same(run(opt, params, steps=1), alone)
        assert batches == [6]  # of apply_updates


RULES = {
    "numbers": lambda g, p: 2 * g + 0.1 - g / 3 - (1 - p) + 1 / (p + 4),
    "scalars": lambda g, p, s: s * g + s - g / s - (s - p) + s / (p + 4) - (g - s) + (s + g),
    "whole numbers": lambda g, p, s: s.long() * g + p / (s.long() + 2) + (s > 0) * g,
    "bounds": lambda g, p, s: torch.maximum(s, g) + torch.minimum(g, -s) + g.clamp(-s, s) + p,
    "signs": lambda g, p: -g.abs().sign() + (-p).abs(),
    "roots": lambda g, p: g.abs().sqrt() + (p * p + 1).rsqrt() + abs(g) ** 0.5 + 2**p,
    "root": lambda g, p: 1 / root(0 * g) + 0 * g + root(p) + root(g * p),
    "choices": lambda g, p: torch.where(g > p, g, torch.where(p != 0, 0.0, p)) + (g <= 1) * p,
    "reuse": lambda g, p: (g + p) * (g + p) + (g * 2) * (g * 2) + g,
    "one twice": lambda g, p: (lambda x: x * x + x)(g - p),
    "lerp": lambda g, p: torch.lerp(g, p, torch.tensor(0.3).to(g.dtype)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_every_operation_equals_that_of_a_leaf(name, dtype, batches, one_by_one):
    rule, params = RULES[name], [draw(i, 3 + i).to(dtype) for i in range(5)]
    scalars = [torch.tensor(0.7, dtype=torch.float64)] if "s" in rule.__code__.co_varnames else []

    def f(g, p):
        return (rule(g, p, *scalars),)

    grads = [0.5 * p - 0.2 for p in params]
    with one_by_one():
        alone = map_columns(f, grads, params)
    batches.clear()
    same(map_columns(f, grads, params), alone)
    assert batches == [5]


def test_arguments_are_not_overwritten(batches):
    params, kept = [draw(i, 3) for i in range(5)], [draw(i, 3) for i in range(5)]
    map_leaves(lambda p: (p + p) * 2 - p, params)
    same(params, kept)
    assert batches == [5]


def test_a_result_that_is_an_argument_or_another_result_is_a_view(batches):
    params = [draw(i, 3) for i in range(5)]
    first, second, third = map_columns(lambda p: (p, *[p + 1] * 2), params)
    for p, x, y, z in zip(params, first, second, third, strict=True):
        assert x is not p and x.data_ptr() == p.data_ptr()
        assert y is not z and y.data_ptr() == z.data_ptr() != p.data_ptr()
    assert batches == [5]


def test_nothing_is_kept_until_garbage_is_collected():
    import gc
    import weakref

    params = [torch.ones(3) for _ in range(8)]
    opt = optim.adam()
    state = opt.init(params)
    gc.disable()
    try:
        updates, new = opt.update(params, state, params)
        moved = optim.apply_updates(params, updates)
        leaves = tree.leaves((params, state, updates, new, moved))
        old = [weakref.ref(leaf) for leaf in leaves]
        del params, state, updates, new, moved, leaves
        assert not any(ref() is not None for ref in old)
    finally:
        gc.enable()


def test_errors_are_those_of_a_leaf(batches):
    opt, params = optim.adam(), [torch.ones(3) for _ in range(6)]
    state = opt.init(params)
    with pytest.raises(ValueError, match=r"(?s)do not fit.*2: expected a floating tensor \[3\]"):
        opt.update([*params[:2], torch.ones(2), *params[3:]], state, params)
    with pytest.raises(ValueError, match=r"(?s)do not fit.*0: .*got torch.float64 \[\].*5: "):
        opt.update([torch.ones((), dtype=torch.float64)] * 6, state, params)

    scalars = [torch.ones((), dtype=torch.float64)] * 6
    with pytest.raises(
        ValueError, match=r"(?s)do not fit.*0: .*tensor \[\], got torch.float32 \[3\]"
    ):
        opt.update(params, opt.init(scalars), scalars)
    with pytest.raises(RuntimeError, match="size of tensor"):  # slots of other parameters
        opt.update(params, opt.init([torch.ones(1, 3)] * 5 + [torch.ones(2)]), params)

    def fails(g, p, t):
        raise ValueError("of the rule")

    for flag in (True, torch.tensor(True)):
        with pytest.raises(RuntimeError, match="Subtraction"):
            map_leaves(lambda p, flag=flag: p - flag, params)
    own = optim.leafwise("own", fails, {})
    for opt in (own, optim.chain(optim.sgd(0.1), own), optim.chain(own, own)):
        batches.clear()
        with pytest.raises(ValueError, match="of the rule") as caught:
            opt.update(params, opt.init(params), params)
        assert caught.value.__context__ is None


def test_leaves_have_no_values_to_read():
    leaves = _leaves.argument([], [torch.ones(3)], True)
    for read in (
        len,
        bool,
        float,
        list,
        repr,
        torch.sum,
        lambda x: x.shape,
        lambda x: x.data_ptr(),
    ):
        with pytest.raises((_leaves.NotElementwise, TypeError)):
            read(leaves)
    assert isinstance(leaves, Leaves) and leaves.dtype is torch.float32


def test_a_move_to_a_device_gives_no_memory_to_overwrite():
    """`x.to(device)` returns x itself: a gradient, which the next operation must not write to."""
    move = optim.leafwise("move", lambda g, p, t: (g.to(p.device), {}), {})
    scale = optim.leafwise("scale", lambda g, p, t, lr: (g * lr, {}), {"lr": 0.1})
    params = {str(i): torch.ones(3) for i in range(6)}
    grads, opt = tree.map(torch.ones_like, params), optim.chain(move, scale)
    updates, _ = opt.update(grads, opt.init(params), params)
    assert all(leaf.tolist() == [1.0] * 3 for leaf in tree.leaves(grads))
    assert all(leaf.tolist() == pytest.approx([0.1] * 3) for leaf in tree.leaves(updates))
