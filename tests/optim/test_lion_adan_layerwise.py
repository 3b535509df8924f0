"""Optimizers beyond torch.optim against plain loops from the papers, in float64; and their laws.

test_beyond_jax.py compares them with optax, test_schedulefree.py has more of averages.
"""

import pytest
import torch
from torch.func import grad, vmap

import fdl
from fdl import optim, tree
from fdl.tree._map import match
from tests.support.asserts import close, draw, unchanged

SHAPES = {"scalar": (), "vector": (3,), "nested.matrix": (2, 3), "nested.kernel": (2, 1, 2, 2)}
START = {path: draw(i, *shape) for i, (path, shape) in enumerate(SHAPES.items())}
NOISE = {path: draw(i + 10, 100, *shape) for i, (path, shape) in enumerate(SHAPES.items())}


def start(dtype=torch.float64):
    return tree.cast(tree.unflatten_dict(START), dtype)


def grads_at(params, step):
    """Bounded and not linear, so that no long run overflows and no term can hide another."""
    flat = tree.flatten_dict(params)
    return tree.unflatten_dict(
        {path: p.sin() + NOISE[path][step].to(p.dtype) for path, p in flat.items()}
    )


def run(opt, params, steps=100):
    state = opt.init(params)
    for step in range(steps):
        updates, state = opt.update(grads_at(params, step), state, params)
        params = optim.apply_updates(params, updates)
    return params, state


def agree(params, expected, rtol=1e-10):
    """Compare how far the leaves went, since the start would hide small steps; all must move."""
    for path, p in tree.flatten_dict(params).items():
        moved = expected[path] - START[path]
        assert moved.abs().min() > 1e-5, f"{path} did not move"
        close(p - START[path], moved, rtol=rtol)


# ------------------------------------------------------------------------------ plain loops


def lion(w, g, memory, t, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
    """Algorithm 2 of the paper, with its names: c interpolates, m is tracked."""
    m = memory.setdefault("m", torch.zeros_like(w))
    c = torch.lerp(g, m, betas[0])
    memory["m"] = torch.lerp(g, m, betas[1])
    return w - lr * (torch.sign(c) + weight_decay * w)


def adan(w, g, memory, t, lr=1e-3, betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=0.0):
    """Algorithm 1 of the paper in the paper's betas, with bias corrections; η is a vector."""
    b1, b2, b3 = (1 - beta for beta in betas)
    m, v, n = (memory.get(name, torch.zeros_like(w)) for name in "mvn")
    d = g - memory.get("g", g)
    m = (1 - b1) * m + b1 * g
    v = (1 - b2) * v + b2 * d
    n = (1 - b3) * n + b3 * (g + (1 - b2) * d) ** 2
    memory.update(m=m, v=v, n=n, g=g)
    one, two, three = (1 - beta**t for beta in betas)
    eta = lr / ((n / three) ** 0.5 + eps)
    return (1 - lr * weight_decay) * w - eta * (m / one + (1 - b2) * v / two)


def lamb(w, g, memory, t, lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, trusted=True):
    """Algorithm 2 of the paper, φ the identity."""
    m = memory["m"] = betas[0] * memory.get("m", 0) + (1 - betas[0]) * g
    v = memory["v"] = betas[1] * memory.get("v", 0) + (1 - betas[1]) * g**2
    r = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)) ** 0.5 + eps) + weight_decay * w
    phi = torch.linalg.vector_norm(w) / torch.linalg.vector_norm(r)
    return w - lr * (phi if trusted else 1) * r


def lars(
    w, g, memory, t, lr, momentum=0.9, weight_decay=0.0, trust_coefficient=1e-3, eps=0.0,
    trusted=True, nesterov=False,
):  # fmt: skip
    """Algorithm 1 of the paper, its local rate from the norm of the whole update."""
    u = g + weight_decay * w
    local = trust_coefficient * w.norm() / (u.norm() + eps) if trusted else 1
    v = memory["v"] = momentum * memory.get("v", 0) + lr * local * u
    return w - (lr * local * u + momentum * v if nesterov else v)


def schedule_free(w, direction, memory, lr, beta, weight_lr_power):
    """Equations 3 to 5 of the paper: x and z are both kept, y is what comes and goes."""
    x, z = memory.get("x", w), memory.get("z", w)
    memory["largest"] = max(memory.get("largest", 0.0), lr)
    weight = memory["largest"] ** weight_lr_power
    memory["sum"] = memory.get("sum", 0.0) + weight
    c = weight / memory["sum"] if memory["sum"] else 0.0
    z = z - lr * direction
    x = x + c * (z - x)
    memory.update(x=x, z=z)
    return z + beta * (x - z)


def schedule_free_sgd(w, g, memory, t, lr=1.0, momentum=0.9, weight_decay=0.0, weight_lr_power=2.0):
    return schedule_free(w, g + weight_decay * w, memory, lr, momentum, weight_lr_power)


def schedule_free_adamw(
    w, g, memory, t, lr=2.5e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, weight_lr_power=2.0
):
    v = memory["v"] = betas[1] * memory.get("v", 0) + (1 - betas[1]) * g**2
    d = g / ((v / (1 - betas[1] ** t)) ** 0.5 + eps) + weight_decay * w
    return schedule_free(w, d, memory, lr, betas[0], weight_lr_power)


BY_HAND = {f.__name__: f for f in (lion, adan, lamb, lars, schedule_free_sgd, schedule_free_adamw)}


def loop(name, options, steps=100):
    """Run a plain loop; masks cover `nested`, and a schedule is read before each step."""
    options = dict(options)
    sign = -1 if options.pop("maximize", False) else 1
    mask, trust_mask = options.pop("mask", None), options.pop("trust_mask", None)
    leaves, memories = dict(START), {path: {} for path in START}

    def now(rate, t):
        if isinstance(rate, tuple):
            return tuple(now(r, t) for r in rate)
        return float(rate(torch.tensor(t - 1.0, dtype=torch.float64))) if callable(rate) else rate

    for t in range(1, steps + 1):
        grads = tree.flatten_dict(grads_at(tree.unflatten_dict(leaves), t - 1))
        for path, w in leaves.items():
            rates = {key: now(rate, t) for key, rate in options.items()}
            if mask and not path.startswith("nested"):
                rates["weight_decay"] = 0.0
            if trust_mask and not path.startswith("nested"):
                rates["trusted"] = False
            leaves[path] = BY_HAND[name](w, sign * grads[path], memories[path], t, **rates)
    return leaves, memories


def warmup(peak, steps):
    """From 0 at the first update to the peak."""
    return lambda count: peak * (count.double() / steps).clamp(max=1.0)


CASES = [
    ("lion", {}),
    ("lion", {"lr": 0.01, "betas": (0.5, 0.9), "weight_decay": 0.1}),
    ("lion", {"lr": 0.01, "weight_decay": 0.1, "mask": "nested.*", "maximize": True}),
    ("adan", {}),
    ("adan", {"lr": 0.01, "betas": (0.9, 0.5, 0.95), "eps": 0.1, "weight_decay": 0.1}),
    ("adan", {"lr": 0.01, "weight_decay": 0.1, "mask": "nested.*", "maximize": True}),
    ("lamb", {"lr": 1e-3}),
    ("lamb", {"lr": 0.01, "betas": (0.5, 0.9), "eps": 0.1, "weight_decay": 0.1}),
    ("lamb", {"lr": 0.01, "weight_decay": 0.1, "mask": "nested.*", "trust_mask": "nested.*"}),
    ("lars", {"lr": 0.1}),
    ("lars", {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.1, "trust_coefficient": 0.1}),
    (
        "lars",
        {"lr": 0.01, "momentum": 0.5, "weight_decay": 0.1, "eps": 0.1, "nesterov": True}
        | {"mask": "nested.*", "trust_mask": "nested.*", "maximize": True},
    ),
    ("schedule_free_sgd", {}),
    ("schedule_free_sgd", {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1, "maximize": True}),
    ("schedule_free_sgd", {"lr": 0.1, "weight_lr_power": 0.0}),
    ("schedule_free_adamw", {}),
    ("schedule_free_adamw", {"lr": 0.01, "betas": (0.5, 0.9), "eps": 0.1, "weight_decay": 0.1}),
    ("schedule_free_adamw", {"betas": (0.98, 0.9), "weight_lr_power": 1.0, "maximize": True}),
]
NAMES = [f"{name}-{i}" for i, (name, _) in enumerate(CASES)]
RISING, FALLING = lambda count: 0.5 + 0.004 * count.double(), lambda count: 0.95 - 0.004 * count
STEPS = optim.schedules.step(0.05, step_size=30)
SCHEDULED = [
    ("lion", {"lr": STEPS, "betas": (RISING, FALLING)}),
    ("adan", {"lr": warmup(0.01, 20), "betas": (FALLING, RISING, 0.99)}),
    ("lamb", {"lr": warmup(0.01, 20), "betas": (RISING, 0.99), "weight_decay": RISING}),
    ("lars", {"lr": STEPS, "momentum": FALLING, "trust_coefficient": RISING}),
    ("schedule_free_sgd", {"lr": warmup(0.1, 20), "momentum": FALLING}),
    ("schedule_free_adamw", {"lr": STEPS, "betas": (FALLING, RISING)}),
]
# By the names that the plain loops have for what the state remembers.
SLOTS = {
    "exp_avg": "m", "exp_avg_diff": "v", "previous_grad": "g", "momentum_buffer": "v", "z": "z"
}  # fmt: skip


@pytest.mark.parametrize(("name", "options"), CASES + SCHEDULED, ids=[*NAMES, *BY_HAND])
def test_equals_the_plain_loop_of_the_paper(name, options):
    params, state = run(getattr(optim, name)(**options), start())
    leaves, memories = loop(name, options)
    agree(params, leaves)
    if "schedule_free" in name:
        agree(optim.schedule_free_params(state, params), {p: m["x"] for p, m in memories.items()})
    found = optim.slots(state)
    for slot, values in found.items():
        key = SLOTS.get(slot, "n" if "exp_avg_diff" in found else "v")
        sign = -1 if slot == "momentum_buffer" else 1  # ours holds updates, after −lr
        for path, value in tree.flatten_dict(values).items():
            close(sign * value, memories[path][key])
    assert len(found) == {"lion": 1, "adan": 4, "lamb": 2, "schedule_free_adamw": 2}.get(
        name, 0 if options.get("momentum") == 0 else 1
    )


# ------------------------------------------------------------------------------ trust ratio


def test_parameters_and_updates_of_zero_have_the_trust_ratio_one():
    params = {"zero": torch.zeros(2), "still": torch.ones(2), "w": torch.tensor([3.0, 4.0])}
    grads = {"zero": torch.ones(2), "still": torch.zeros(2), "w": torch.tensor([0.0, 2.0])}
    opt = optim.scale_by_trust_ratio(trust_coefficient=0.5, eps=0.5)
    found, _ = opt.update(grads, opt.init(params), params)
    close(found, {"zero": torch.ones(2), "still": torch.zeros(2), "w": torch.tensor([0.0, 2.0])})


def test_norms_of_half_precision_do_not_overflow():
    """The squares of these parameters sum to 2¹⁸, and float16 ends before 2¹⁶."""
    params = {"w": torch.full((4096,), 8.0, dtype=torch.float16)}
    opt = optim.scale_by_trust_ratio()
    found, _ = opt.update(tree.map(torch.ones_like, params), opt.init(params), params)
    assert torch.equal(found["w"], params["w"])


# ------------------------------------------------------------------------------ laws

OPTIMIZERS = {
    "lion": optim.lion(0.1, weight_decay=0.1, mask="nested.*"),
    "adan": optim.adan(0.1, weight_decay=0.1),
    "lamb": optim.lamb(0.1, weight_decay=0.1, trust_mask=lambda path, leaf: leaf.ndim > 0),
    "lars": optim.lars(torch.tensor(0.1), weight_decay=0.1, trust_coefficient=0.5),
    "schedule_free_sgd": optim.schedule_free_sgd(0.1, weight_decay=0.1),
    "schedule_free_adamw": optim.schedule_free_adamw(0.1, weight_decay=0.1),
}
each = pytest.mark.parametrize("opt", OPTIMIZERS.values(), ids=OPTIMIZERS)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_update_keeps_every_dtype_and_its_inputs(opt, dtype):
    params, state = start(dtype), opt.init(start(dtype))
    for step in range(3):
        grads = grads_at(params, step)
        with unchanged(params, grads, state):
            updates, new_state = opt.update(grads, state, params)
        assert tree.diff(state, new_state, values=False) == []
        assert tree.diff(params, updates, values=False) == []
        match(state, new_state, "same form")
        params, state = optim.apply_updates(params, updates), new_state
    expected, _ = run(opt, start(), 3)
    for path, p in tree.flatten_dict(params).items():
        far = 0.05 if dtype != torch.float32 else 1e-4
        close(p.double(), tree.flatten_dict(expected)[path], rtol=far, atol=far)


@each
def test_a_leaf_without_a_gradient_stays(opt):
    params = start()
    rest = {path: leaf for path, leaf in params.items() if path != "vector"}
    state, rest_state = opt.init(params), opt.init(rest)
    for step in range(3):
        grads = {**grads_at(params, step), "vector": None}
        updates, new_state = opt.update(grads, state, params)
        assert updates["vector"] is None
        for name, slot in optim.slots(new_state).items():
            if "vector" in slot:
                assert torch.equal(slot["vector"], optim.slots(state)[name]["vector"])
        del grads["vector"]
        rest_updates, rest_state = opt.update(grads, rest_state, rest)
        params, rest = optim.apply_updates(params, updates), optim.apply_updates(rest, rest_updates)
        state = new_state
    assert torch.equal(params.pop("vector"), START["vector"])
    assert tree.diff(params, rest) == []


@each
def test_a_run_has_a_finite_derivative_where_gradients_and_parameters_are_zero(opt):
    params = {"nested": {"w": torch.zeros(2).double()}, "scalar": draw(0)}

    def end(params):
        state = opt.init(params)
        for _ in range(3):
            grads = tree.map(lambda p: p * p.sin(), params)
            updates, state = opt.update(grads, state, params)
            params = optim.apply_updates(params, updates)
        return sum(leaf.sum() for leaf in tree.leaves(params))

    found = grad(end)(params)
    assert all(leaf.isfinite().all() for leaf in tree.leaves(found))
    assert found["scalar"] != 0


@each
def test_a_population_of_rates_equals_a_loop(opt):
    params, rates = start(), torch.tensor([0.01, 0.1, 0.5]).double()
    state = opt.init(params)

    def train(lr):
        new, changed = params, optim.with_hyperparams(state, lr=lr)
        for step in range(2):
            updates, changed = opt.update(grads_at(new, step), changed, new)
            new = optim.apply_updates(new, updates)
        return new

    close(vmap(train)(rates), tree.stack([train(lr) for lr in rates]))


@each
def test_steps_are_compiled_once(opt, plain_backend, count_programs):
    def step(params, state, noise):
        updates, state = opt.update(
            tree.map(lambda p, n: p.sin() + n, params, noise), state, params
        )
        return optim.apply_updates(params, updates), state

    compiled, graphs = fdl.jit(step), count_programs()
    params, state = start(torch.float32), opt.init(start(torch.float32))
    expected, expected_state = params, state
    for number, lr in enumerate([0.1, 0.1, 0.02]):
        noise = tree.unflatten_dict({p: n[number].float() for p, n in NOISE.items()})
        state, expected_state = (optim.with_hyperparams(s, lr=lr) for s in (state, expected_state))
        params, state = compiled(params, state, noise)
        expected, expected_state = step(expected, expected_state, noise)
    assert graphs.count == 1
    close((params, tree.leaves(state)), (expected, tree.leaves(expected_state)), 1e-5, 1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.lion(lr=-1.0), "lion: lr must be finite and at least 0, got -1.0"),
        (lambda: optim.lion(betas=(0.9, 1.0)), r"scale_by_lion: beta2 must be .* in \[0, 1\)"),
        (lambda: optim.lion(weight_decay=-1.0), "lion: weight_decay must be"),
        (lambda: optim.adan(lr=float("nan")), "adan: lr must be finite"),
        (lambda: optim.adan(betas=(0.9, 0.9, -0.1)), "scale_by_adan: beta3 must be"),
        (lambda: optim.adan(weight_decay=-1.0), "adan: weight_decay must be"),
        (lambda: optim.lamb(lr=-1.0), "lamb: lr must be"),
        (lambda: optim.lamb(0.1, weight_decay=-1.0), "lamb: weight_decay must be"),
        (lambda: optim.lars(lr=-1.0), "lars: lr must be"),
        (lambda: optim.lars(0.1, momentum=-1.0), "lars: momentum must be"),
        (lambda: optim.lars(0.1, weight_decay=-1.0), "lars: weight_decay must be"),
        (lambda: optim.lars(0.1, eps=-1.0), "scale_by_trust_ratio: eps must be"),
        (lambda: optim.lars(0.1, trust_coefficient=-1.0), "trust_coefficient must be"),
        (lambda: optim.lamb(0.1, trust_mask="*.wieght").init(start()), "'.*wieght' matches no"),
        (lambda: optim.schedule_free(0.1, beta=0.0), r"schedule_free: beta must be .* \(0, 1\)"),
        (lambda: optim.schedule_free_sgd(-1.0), "schedule_free_sgd: lr must be"),
        (lambda: optim.schedule_free_sgd(momentum=0), r"sgd: momentum must be in \(0, 1\), got 0"),
        (lambda: optim.schedule_free_adamw(betas=(1.0, 0.9)), r"adamw: betas\[0\] must be"),
        (lambda: optim.schedule_free_adamw(betas=(0.9, 1.0)), "adamw: beta2 must be"),
        (lambda: optim.schedule_free_adamw(weight_decay=-1), "adamw: weight_decay must be"),
        (lambda: optim.schedule_free_adamw(weight_lr_power=-1), "weight_lr_power must be"),
        (
            lambda: optim.with_hyperparams(optim.schedule_free_sgd().init(start()), beta=0.0),
            r"with_hyperparams: beta must be .* \(0, 1\)",
        ),
    ],
)  # fmt: skip
def test_what_is_out_of_range_raises(make, message):
    with pytest.raises(ValueError, match=message):
        make()
