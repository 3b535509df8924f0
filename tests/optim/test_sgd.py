"""Optimizers against torch.optim in float64: displacements, slots, dtypes, gradients of updates."""

import itertools

import pytest
import torch

from fdl import losses, optim, tree
from fdl.tree._map import match
from tests.support.asserts import close, draw
from tests.support.optimizers import agree, grads_at, run, run_torch, start


def momentum_buffers(state):
    return tree.flatten_dict(optim.slots(state)["momentum_buffer"])


# ------------------------------------------------------------------------------ sgd


def refused(case):
    _, momentum, dampening, _, nesterov, _ = case
    return nesterov and (momentum == 0 or dampening != 0)


SGD = [
    case
    for case in itertools.product(
        [0.1, 0.03], [0.0, 0.5, 0.9], [0.0, 0.3], [0.0, 0.01, 0.2], [False, True], [False, True]
    )
    if not refused(case)
]
NAMES = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")


@pytest.mark.parametrize("case", SGD, ids=lambda c: "-".join(f"{x:g}" for x in c))
def test_sgd_equals_torch(case):
    options = dict(zip(NAMES, case, strict=True))
    params, state = run(optim.sgd(**options), start())
    leaves, optimizer = run_torch(lambda p: torch.optim.SGD(p.values(), **options), start())
    agree(params, leaves)
    if options["momentum"]:
        for path, buffer in momentum_buffers(state).items():
            close(buffer, optimizer.state[leaves[path]]["momentum_buffer"])
    else:
        assert optim.slots(state) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "opt",
    [
        optim.sgd(0.1),
        optim.sgd(0.1, 0.9, 0.5, 0.01),
        optim.sgd(torch.tensor(0.1), 0.9, nesterov=True, maximize=True),
        optim.chain(
            optim.clip_by_global_norm(1.0), optim.sgd(optim.schedules.step(0.1, step_size=2), 0.9)
        ),
    ],
    ids=["plain", "dampened", "nesterov", "clip-schedule"],
)
def test_an_update_keeps_every_dtype(opt, dtype):
    params = start(dtype)
    state = opt.init(params)
    after, new_state = run(opt, params, steps=3)
    assert tree.diff(params, after, values=False) == []
    assert tree.diff(state, new_state, values=False) == []
    match(state, new_state, "same form")
    assert not any(torch.equal(a, b) for a, b in zip(*map(tree.leaves, (params, after))))  # noqa: B905


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"weight_decay": 0.1}],
    ids=["plain", "momentum", "nesterov", "decay"],
)
@pytest.mark.parametrize(
    "absent",
    [
        lambda path, step: path == "nested.matrix",
        lambda path, step: path == "nested.matrix" and 3 <= step < 7,
        lambda path, step: path == "vector" and step < 2,
    ],
    ids=["always", "for-a-while", "at-first"],
)
def test_without_a_gradient_parameter_and_momentum_stay(options, absent):
    params, state = run(optim.sgd(0.1, **options), start(), 10, absent)
    leaves, optimizer = run_torch(
        lambda p: torch.optim.SGD(p.values(), 0.1, **options), start(), 10, absent
    )
    for path, p in tree.flatten_dict(params).items():
        if absent(path, 5) and absent(path, 0):
            assert torch.equal(p, tree.flatten_dict(start())[path])
        close(p, leaves[path].detach())
        if "momentum" in options:
            buffer = optimizer.state[leaves[path]].get("momentum_buffer")
            expected = torch.zeros_like(p) if buffer is None else buffer
            close(momentum_buffers(state)[path], expected)


# ------------------------------------------------------------------------------ schedules


@pytest.mark.parametrize("gamma", [0.1, 0.5])
@pytest.mark.parametrize("every", [1, 3, 100])
def test_step_schedule_equals_step_lr(every, gamma):
    opt = optim.sgd(optim.schedules.step(0.1, step_size=every, gamma=gamma), 0.9)
    leaves, _ = run_torch(
        lambda p: torch.optim.SGD(p.values(), 0.1, 0.9),
        start(),
        20,
        scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, every, gamma),
    )
    agree(run(opt, start(), 20)[0], leaves, rtol=1e-9)


def test_the_state_shows_the_rate_of_the_next_update():
    opt = optim.sgd(optim.schedules.step(0.1, step_size=3, gamma=0.5))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    params = {"w": torch.zeros(1)}
    state = opt.init(params)
    for _ in range(10):
        close(optim.hyperparams(state)["lr"].item(), scheduler.get_last_lr()[0])
        _, state = opt.update(params, state, params)
        optimizer.step()
        scheduler.step()


def test_momentum_may_follow_a_schedule():
    def warming(count):
        return 0.5 + 0.04 * count.double()

    params, state = run(optim.sgd(0.1, warming, weight_decay=warming), start(), 10)
    expected = start()
    buffer = tree.map(torch.zeros_like, expected)
    for step in range(10):
        rate = 0.5 + 0.04 * step
        grads = tree.map(lambda g, p, r=rate: g + r * p, grads_at(expected, step), expected)
        buffer = tree.map(lambda m, g, r=rate: r * m + g, buffer, grads)
        expected = tree.map(lambda p, m: p - 0.1 * m, expected, buffer)
    close(params, expected)
    close(optim.hyperparams(state)["momentum"].item(), 0.9)


def test_constant_schedule_is_the_number():
    close(
        run(optim.sgd(optim.schedules.constant(0.1)), start())[0], run(optim.sgd(0.1), start())[0]
    )
    with pytest.raises(ValueError, match=r"schedules\.step: step_size must be at least 1, got 0"):
        optim.schedules.step(0.1, step_size=0)


# ------------------------------------------------------------------------------ transformations


@pytest.mark.parametrize("max_norm", [0.5, 3.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_clip_equals_torch(max_norm, dtype):
    grads = start(dtype)
    leaves = [leaf.clone() for leaf in tree.leaves(grads)]
    for leaf in leaves:
        leaf.grad = leaf.clone()
    norm = torch.nn.utils.clip_grad_norm_(leaves, max_norm)
    assert 3 < norm < 1e3
    opt = optim.clip_by_global_norm(max_norm)
    clipped, _ = opt.update(grads, opt.init(grads), grads)
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    close(tree.leaves(clipped), [leaf.grad for leaf in leaves], rtol=rtol)
    if max_norm > norm:
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(tree.leaves(clipped), leaves))  # noqa: B905


def test_clip_leaves_zero_and_absent_gradients():
    opt = optim.clip_by_global_norm(0.5)
    params = {"a": torch.zeros(2), "b": torch.zeros(1)}
    state = opt.init(params)
    assert tree.diff(opt.update(params, state, params)[0], params) == []
    none = {"a": None, "b": None}
    assert opt.update(none, state, params)[0] == none
    some, _ = opt.update({"a": torch.tensor([3.0, 4.0]), "b": None}, state, params)
    close(some["a"], torch.tensor([0.3, 0.4]), rtol=1e-6)
    assert some["b"] is None


@pytest.mark.parametrize(
    "mask",
    ["nested.*", ["nested.matrix", "*.kernel"], lambda path, leaf: leaf.ndim > 1],
    ids=["glob", "globs", "predicate"],
)
def test_masked_decay_equals_parameter_groups(mask):
    opt = optim.chain(optim.add_decayed_weights(0.1, mask), optim.sgd(0.1, 0.9))

    def groups(leaves):
        decayed = [leaf for path, leaf in leaves.items() if path.startswith("nested")]
        others = [leaf for path, leaf in leaves.items() if not path.startswith("nested")]
        return torch.optim.SGD(
            [{"params": decayed, "weight_decay": 0.1}, {"params": others}], 0.1, 0.9
        )

    agree(run(opt, start())[0], run_torch(groups, start())[0])


def test_a_mask_that_matches_nothing_raises_at_init():
    with pytest.raises(ValueError, match=r"add_decayed_weights: '\*\.wieght' matches no path"):
        optim.add_decayed_weights(0.1, "*.wieght").init(start())


def test_penalty_and_decay_are_the_same():
    """The high-dimensional example: 200 features, 20 examples, λ = 3 on the weights alone."""
    x, noise = draw(0, 20, 200), draw(1, 20, 1)
    y = 0.05 + x @ torch.full((200, 1), 0.01, dtype=torch.float64) + 0.01 * noise
    params = {"weight": draw(2, 1, 200), "bias": torch.zeros(1, dtype=torch.float64)}

    def loss(p):
        return losses.squared_loss(x @ p["weight"].T + p["bias"], y).mean()

    def penalised(p):
        return loss(p) + 3 * losses.l2_penalty({"weight": p["weight"]})

    def train(opt, objective):
        p, state = params, opt.init(params)
        for _ in range(100):
            updates, state = opt.update(torch.func.grad(objective)(p), state, p)
            p = optim.apply_updates(p, updates)
        return p

    decay = optim.chain(optim.add_decayed_weights(3.0, "weight"), optim.sgd(0.003))
    by_decay, by_penalty = train(decay, loss), train(optim.sgd(0.003), penalised)
    w, b = (p.clone().requires_grad_() for p in params.values())
    sgd = torch.optim.SGD([{"params": [w], "weight_decay": 3.0}, {"params": [b]}], 0.003)
    for _ in range(100):
        sgd.zero_grad()
        loss({"weight": w, "bias": b}).backward()
        sgd.step()
    close(by_decay, {"weight": w.detach(), "bias": b.detach()})
    close(by_penalty, by_decay)
    plain = train(optim.sgd(0.003), loss)
    assert by_decay["weight"].norm() < 0.5 * plain["weight"].norm()
