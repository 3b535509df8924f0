"""Laws that every optimizer keeps: vmap, derivatives, dtypes, memory, errors."""

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from fdl import jit, optim, random, scan, tree
from fdl.tree._map import match
from tests.support.asserts import close, draw, unchanged
from tests.support.optimizers import ALL, MATRICES, SHAPES, grads_at, run, start
from tests.support.soak import repeats

each = pytest.mark.parametrize("name", ALL)


def begin(name, dtype=torch.float64):
    return start(dtype, MATRICES if name == "muon" else SHAPES)


@each
def test_vmap_over_rates_decays_and_seeds_equals_eight_runs(name):
    def train(lr, decay, key):
        leaves = tree.flatten_dict(begin(name)).items()
        params = tree.unflatten_dict(
            {
                path: leaf + random.normal(random.fold_in(key, i), leaf.shape, torch.float64)
                for i, (path, leaf) in enumerate(leaves)
            }
        )
        return run(ALL[name](lr, decay), params, 5)

    lrs = torch.logspace(-3, -1, 8, dtype=torch.float64)
    decays = torch.linspace(0.01, 0.3, 8, dtype=torch.float64)
    keys = random.split(random.key(3), 8)
    together = vmap(train)(lrs, decays, keys)
    alone = tree.stack([train(*row) for row in zip(lrs, decays, keys, strict=True)])
    # Batched matrix products round otherwise, and muon's are in bfloat16.
    rtol, atol = (1e-1, 1e-2) if name == "muon" else (1e-10, 1e-13)
    differences = tree.diff(alone, together, rtol=rtol, atol=atol)
    assert not differences, "\n".join(differences)


def after_five(name, lr, decay, params):
    """What a meta-learner sees: the loss after five inner steps, as a function of what began it."""
    opt = ALL[name](lr, decay)
    state = opt.init(params)
    for step in range(5):
        # Gradients that depend on the parameters, so that derivatives pass through every step.
        grads = tree.map(lambda p, s=step: (p + s).sin() + 0.3 * p, params)
        updates, state = opt.update(grads, state, params)
        params = optim.apply_updates(params, updates)
    return sum((p**2).sum() for p in tree.leaves(params))


@pytest.mark.parametrize("name", [n for n in ALL if n != "muon"])  # bfloat16 inside
def test_derivatives_through_five_steps_equal_finite_differences(name):
    lr, decay = (torch.tensor(x, dtype=torch.float64) for x in (0.01, 0.1))
    params = begin(name)

    def f(lr, decay, params):
        return after_five(name, lr, decay, params)

    by_lr, by_decay, by_params = grad(f, argnums=(0, 1, 2))(lr, decay, params)
    h = 1e-6

    def central(g):
        return (g(h) - g(-h)) / (2 * h)

    close(by_lr, central(lambda d: f(lr + d, decay, params)), rtol=1e-5, atol=1e-7)
    close(by_decay, central(lambda d: f(lr, decay + d, params)), rtol=1e-5, atol=1e-7)
    assert by_lr.abs() > 1e-3
    assert (by_decay.abs() > 1e-6) == (name != "rprop")  # which has no decay
    direction = tree.map(torch.cos, params)
    slope = sum(
        (g * d).sum() for g, d in zip(*map(tree.leaves, (by_params, direction)), strict=True)
    )
    moved = central(lambda d: f(lr, decay, tree.map(lambda p, v: p + d * v, params, direction)))
    close(slope, moved, rtol=1e-5, atol=1e-7)


@each
def test_a_zero_gradient_has_a_finite_derivative(name):
    """√v at v = 0: torch's own differentiable optimizers give NaN here."""
    params = begin(name)

    def f(lr):
        opt = ALL[name](lr, 0.0)
        state, p = opt.init(params), params
        for _ in range(2):
            updates, state = opt.update(tree.map(torch.zeros_like, p), state, p)
            p = optim.apply_updates(p, updates)
        return sum(leaf.sum() for leaf in tree.leaves(p))

    assert grad(f)(torch.tensor(0.1, dtype=torch.float64)).isfinite()


@pytest.mark.parametrize("name", [n for n in ALL if n != "rprop"])  # the sign of NaN is 0 there
def test_what_became_nan_stays_nan(name):
    """As in torch: a state that is lost shows, also when later gradients are finite."""
    params, opt = begin(name), ALL[name](0.1, 0.0)
    state = opt.init(params)
    bad = tree.map(lambda p: torch.full_like(p, torch.nan), params)
    _, state = opt.update(bad, state, params)
    updates, _ = opt.update(grads_at(params, 0), state, params)
    lost = {path: bool(u.isnan().all()) for path, u in tree.flatten_dict(updates).items()}
    # sgd without state would recover; asgd has its average apart from what it steps by.
    assert all(lost.values()) == (name != "asgd"), lost


@pytest.mark.slow
@each
def test_memory_stays_flat(name):
    opt, params = ALL[name](0.01, 0.1), begin(name)
    state = opt.init(params)
    counts = []
    steps = repeats(200, 1000)
    for step in range(steps):
        updates, state = opt.update(grads_at(params, step % 100), state, params)
        params = optim.apply_updates(params, updates)
        if step == 9:
            old = [weakref.ref(leaf) for leaf in tree.leaves(state)]
        if step in (9, steps - 1):
            gc.collect()
            counts.append(sum(issubclass(type(x), Tensor) for x in gc.get_objects()))
    assert counts[0] == counts[1]
    still = {id(leaf) for leaf in tree.leaves(state)}  # rates pass through
    assert all(ref() is None or id(ref()) in still for ref in old)
    assert all(leaf.grad_fn is None for leaf in tree.leaves((params, state)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each
def test_an_update_keeps_every_dtype_and_shape(name, dtype):
    params, opt = begin(name, dtype), ALL[name](0.1, 0.1)
    state = opt.init(params)
    after, new_state = run(opt, params, steps=3)
    assert tree.diff(params, after, values=False) == []
    assert tree.diff(state, new_state, values=False) == []
    match(state, new_state, "same form")
    assert all(leaf.isfinite().all() for leaf in tree.leaves(after))
    assert not any(
        torch.equal(a, b) for a, b in zip(*map(tree.leaves, (params, after)), strict=True)
    )


@each
def test_gradients_of_another_dtype_do_not_change_the_state(name):
    params, opt = begin(name, torch.float32), ALL[name](0.1, 0.1)
    state = opt.init(params)
    grads = tree.cast(grads_at(params, 0), torch.bfloat16)
    updates, new_state = opt.update(grads, state, params)
    assert tree.diff(params, updates, values=False) == []
    assert tree.diff(state, new_state, values=False) == []


@each
def test_inputs_are_never_mutated(name):
    params, opt = begin(name), ALL[name](0.1, 0.1)
    state, grads = opt.init(params), grads_at(params, 0)
    for _ in range(2):
        with unchanged(params, grads, state):
            updates, new_state = opt.update(grads, state, params)
        with unchanged(params, updates):
            optim.apply_updates(params, updates)
        state = new_state


@each
def test_a_leaf_without_gradient_stays(name):
    params, opt = begin(name), ALL[name](0.1, 0.1)
    gone = next(iter(tree.flatten_dict(params)))
    before = opt.init(params)
    after, state = run(opt, params, 5, absent=lambda path, step: path == gone)
    assert torch.equal(tree.flatten_dict(after)[gone], tree.flatten_dict(params)[gone])
    for slot, value in optim.slots(state).items():
        first = tree.flatten_dict(optim.slots(before)[slot])[gone]
        assert torch.equal(tree.flatten_dict(value)[gone], first)
    others = [path for path in tree.flatten_dict(params) if path != gone]
    alone = {path: tree.flatten_dict(params)[path] for path in others}
    expected, _ = run(opt, tree.unflatten_dict(alone), 5)
    for path, leaf in tree.flatten_dict(expected).items():
        close(tree.flatten_dict(after)[path], leaf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_centered_rmsprop_stays_where_rounding_leaves_no_variance(dtype):
    """The variance of a constant gradient is (1 − αᵗ) αᵗ g²; rounding ends that at v's last bit."""
    opt, params = (
        optim.scale_by_rms(0.9, eps=1e-12, centered=True),
        {"w": torch.zeros(3, dtype=dtype)},
    )
    g = {"w": torch.tensor([3.0, -0.7, 1e-3], dtype=dtype)}
    state, most = opt.init(params), 1 / torch.finfo(dtype).eps ** 0.5
    for step in range(1, 1000):
        updates, state = opt.update(g, state, params)
        ratio = updates["w"] / g["w"].sign()
        assert (ratio > 0).all() and (ratio < 1.01 * most * (1 - 0.9**step) ** -0.5).all()
        if step < 20:  # as the formula says, as long as it can be computed
            exact = ((1 - 0.9**step) * 0.9**step) ** -0.5
            close(ratio, torch.full_like(ratio, exact), rtol=1e-3, atol=0.0)


def test_a_centered_rmsprop_does_not_jump_where_rounding_leaves_no_variance():
    """In float32 v − m² is 0 or less for some of these after 2,000 updates; 1e8 g was the step."""
    opt = optim.scale_by_rms(centered=True)
    g = {"w": torch.tensor([0.1, 0.3, 0.7, 3.0, 1e-3, 5e-4, 0.9, 11.0])}
    state, most = opt.init(g), torch.finfo(torch.float32).eps ** -0.5
    for _ in range(2500):
        updates, state = opt.update(g, state, g)
        assert (updates["w"] > 0).all() and (updates["w"] < 1.01 * most).all()


def test_several_of_them_in_one_compiled_scan():
    """One program, whose rates change from call to call; each by itself: test_transforms.py."""
    names = ["adam", "nadam", "adafactor", "rprop"]
    params = tree.partition(start(torch.float64), ["scalar", "nested.matrix"])[0]
    opts = {name: ALL[name](0.01, 0.1) for name in names}

    def step(carry, shift):
        new = {}
        for name, (p, state) in carry.items():
            grads = tree.map(lambda leaf: (leaf + shift).sin(), p)
            updates, state = opts[name].update(grads, state, p)
            new[name] = (optim.apply_updates(p, updates), state)
        return new, ()

    def steps(carry, shifts):
        return scan(step, carry, shifts)[0]

    def rates(carry, lr):
        return {
            name: (p, state if name == "rprop" else optim.with_hyperparams(state, lr=lr))
            for name, (p, state) in carry.items()
        }

    carry = {name: (params, opt.init(params)) for name, opt in opts.items()}
    shifts = draw(5, 4)
    program = jit(steps)
    got, expected = carry, carry
    for lr in (0.01, 0.003):
        got, expected = program(rates(got, lr), shifts), steps(rates(expected, lr), shifts)
    differences = tree.diff(expected, got, rtol=1e-9, atol=1e-12)
    assert not differences, "\n".join(differences)


# ------------------------------------------------------------------------------ bad input


@each
def test_bad_trees_are_refused_with_their_paths(name):
    params, opt = begin(name), ALL[name](0.1, 0.1)
    state, path = opt.init(params), next(iter(tree.flatten_dict(params)))
    flat = tree.flatten_dict(params)
    whole = tree.unflatten_dict({**flat, path: torch.ones(flat[path].shape, dtype=torch.int64)})
    with pytest.raises(ValueError, match=rf"must be floating tensors.*\n  {path}: torch\.int64"):
        opt.init(whole)
    with pytest.raises(ValueError, match=rf"{path}: expected a floating tensor.*torch\.int64"):
        opt.update(whole, state, params)
    shape = {**flat, path: torch.ones(7, 5, dtype=torch.float64)}
    with pytest.raises(ValueError, match=rf"{path}: expected a floating tensor.*\[7, 5\]"):
        opt.update(tree.unflatten_dict(shape), state, params)
    less = tree.unflatten_dict({p: leaf for p, leaf in flat.items() if p != path})
    with pytest.raises(ValueError, match=rf"grads: the trees have different.*\n  {path}: missing"):
        opt.update(less, state, params)
    if optim.slots(state):
        with pytest.raises(ValueError, match=rf"different structures:\n  {path}: unexpected"):
            opt.update(less, state, less)


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: optim.adam(-1.0), "adam: lr must be finite and at least 0, got -1.0"),
        (lambda: optim.adamw(betas=(1.0, 0.9)), r"scale_by_adam: beta1 .* in \[0, 1\), got 1.0"),
        (lambda: optim.adam(betas=(0.9, -0.1)), r"scale_by_adam: beta2 .* in \[0, 1\), got -0.1"),
        (lambda: optim.adam(eps=float("nan")), "scale_by_adam: eps must be finite .* got nan"),
        (lambda: optim.adam(weight_decay=-1), "adam: weight_decay must be .* got -1"),
        (lambda: optim.adamax(betas=(0.0, 1.0)), r"beta2 must be finite and in \[0, 1\), got 1.0"),
        (lambda: optim.nadam(momentum_decay=-0.2), "momentum_decay must be .* got -0.2"),
        (lambda: optim.radam(betas=(1.0, 0.0)), "scale_by_radam: beta1 must be"),
        (lambda: optim.adagrad(lr_decay=-0.5), "scale_by_adagrad: lr_decay must be"),
        (lambda: optim.adagrad(initial_accumulator_value=-1), "initial_accumulator_value must"),
        (lambda: optim.adadelta(rho=1.1), r"scale_by_adadelta: rho .* in \[0, 1\], got 1.1"),
        (lambda: optim.rmsprop(momentum=-1.0), "rmsprop: momentum must be .* got -1.0"),
        (lambda: optim.rprop(etas=(1.0, 0.5)), r"rprop: etaminus .* in \[0, 1\), got 1.0"),
        (lambda: optim.rprop(etas=(0.5, 1.0)), "rprop: etaplus must be finite and above 1"),
        (lambda: optim.asgd(weight_decay=-0.5), "asgd: weight_decay must be"),
        (lambda: optim.asgd(lambd=-0.5), "asgd: lambd must be"),
        (lambda: optim.asgd(alpha=-0.5), "asgd: alpha must be"),
        (lambda: optim.adafactor(d=0.0), "adafactor: d must be finite and at least 1, got 0.0"),
        (lambda: optim.adafactor(beta2_decay=0.8), "beta2_decay must be finite and at most 0"),
        (lambda: optim.adafactor(eps=(-1e-30, 1e-3)), "adafactor: eps1 must be"),
        (lambda: optim.muon(adjust_lr_fn="other"), "adjust_lr_fn must be one of .* got 'other'"),
        (lambda: optim.muon(ns_steps=100), "ns_steps must be from 1 to 99, got 100"),
        (lambda: optim.sgd(torch.ones(2)), r"lr must be a number or a 0-d tensor, got \[2\]"),
    ],
)
def test_bad_rates_are_refused_when_an_optimizer_is_built(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_bad_values_are_refused_when_a_rate_is_set():
    state = optim.adam().init({"w": torch.ones(1)})
    with pytest.raises(ValueError, match=r"with_hyperparams: beta1 must be .* in \[0, 1\), got 2"):
        optim.with_hyperparams(state, beta1=2)
    with pytest.raises(ValueError, match=r"with_hyperparams: lr must be .* at least 0, got -1"):
        optim.with_hyperparams(state, lr=-1)


def test_what_cannot_follow_a_schedule_or_is_no_matrix():
    with pytest.raises(TypeError, match="rprop: lr cannot be a schedule, since only init reads it"):
        optim.rprop(optim.schedules.constant(0.1))
    with pytest.raises(TypeError, match="adam: lr must be a number, a 0-d tensor or a schedule"):
        optim.adam(lr="fast")
    with pytest.raises(ValueError, match=r"must be matrices .*\n  scalar: \[\]\n  vector: \[3\]"):
        optim.muon().init(start())
