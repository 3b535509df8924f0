"""Optimizers beyond torch.optim against optax in float64, where JAX and optax are installed."""

import numpy as np
import pytest
import torch

from fdl import optim, tree
from tests.optim.test_lion_adan_layerwise import NOISE, START, agree, run, start
from tests.support.asserts import close
from tests.support.jax import x64

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
jnp = jax.numpy

NESTED = {path: path.startswith("nested") for path in START}
# What the state remembers, by our names and by optax's.
SLOTS = {
    "lion": {"exp_avg": "mu"},
    "adan": {"exp_avg": "m", "exp_avg_diff": "v", "exp_avg_sq": "n", "previous_grad": "g"},
    "lamb": {"exp_avg": "mu", "exp_avg_sq": "nu"},
    "lars": {"momentum_buffer": "trace"},
    "schedule_free_sgd": {"z": "z"},
    "schedule_free_adamw": {"z": "z", "exp_avg_sq": "nu"},
}


def lamb(mask, **options):
    """As `optax.lamb`, with a mask for the trust ratio, which that has not."""
    adam = {key: options[key] for key in ("b1", "b2", "eps")}
    return optax.chain(
        optax.scale_by_adam(**adam),
        optax.add_decayed_weights(options["weight_decay"], mask),
        optax.masked(optax.scale_by_trust_ratio(), mask),
        optax.scale_by_learning_rate(options["learning_rate"]),
    )


def free(base, lr, **options):
    """As the authors' program: optax asks for the rate of the step after, but for the base."""
    return optax.contrib.schedule_free(base(lr), lambda count: lr(count - 1), **options)


def cool(count):
    return 0.1 / (1.0 + 0.1 * (count.double() if isinstance(count, torch.Tensor) else count))


def warm(count):
    count = count.double() if isinstance(count, torch.Tensor) else count * 1.0
    return 0.1 * (1 - 0.8**count)  # from 0


def adan(*args, **kwargs):
    """Without its other ε."""
    return optax.adan(*args, eps_root=0.0, **kwargs)


# What the paper weighs by our β₂ in Adan, optax weighs by 1−β₂: they agree at ½.
CASES = {
    "lion": (optim.lion(weight_decay=1e-3), lambda: optax.lion(1e-4)),
    "lion-options": (
        optim.lion(0.01, (0.5, 0.9), 0.1, "nested.*"),
        lambda: optax.lion(0.01, 0.5, 0.9, weight_decay=0.1, mask=NESTED),
    ),
    "lion-schedule": (optim.lion(cool), lambda: optax.lion(cool, weight_decay=0.0)),
    "adan": (optim.adan(betas=(0.98, 0.5, 0.99)), lambda: adan(1e-3, b2=0.5)),
    "adan-options": (
        optim.adan(0.01, (0.9, 0.5, 0.95), 0.1, 0.1, "nested.*"),
        lambda: adan(0.01, 0.9, 0.5, 0.95, 0.1, weight_decay=0.1, mask=NESTED),
    ),
    "adan-schedule": (
        optim.adan(cool, (0.98, 0.5, 0.99), weight_decay=0.1),
        lambda: adan(cool, b2=0.5, weight_decay=0.1),
    ),
    "lamb": (optim.lamb(1e-3), lambda: optax.lamb(1e-3)),
    "lamb-options": (
        optim.lamb(0.01, (0.5, 0.9), 0.1, 0.1, "nested.*"),
        lambda: optax.lamb(0.01, 0.5, 0.9, 0.1, weight_decay=0.1, mask=NESTED),
    ),
    "lamb-masks": (
        optim.lamb(cool, weight_decay=0.1, mask="nested.*", trust_mask="nested.*"),
        lambda: lamb(NESTED, learning_rate=cool, b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.1),
    ),
    "lars": (optim.lars(0.1), lambda: optax.lars(0.1)),
    "lars-options": (
        optim.lars(0.1, 0.5, 0.1, 0.1, 0.1, nesterov=True),
        lambda: optax.lars(0.1, 0.1, True, 0.1, 0.1, True, 0.5, nesterov=True),
    ),
    "lars-masks": (
        optim.lars(cool, weight_decay=0.1, mask="nested.*", trust_mask="nested.*"),
        lambda: optax.lars(cool, 0.1, NESTED, trust_ratio_mask=NESTED),
    ),
    "schedule_free_sgd": (optim.schedule_free_sgd(), optax.contrib.schedule_free_sgd),
    "schedule_free_sgd-options": (
        optim.schedule_free_sgd(0.1, 0.5, 0.1, 0.0),
        lambda: optax.contrib.schedule_free_sgd(0.1, None, 0.5, 0.1, 0.0),
    ),
    "schedule_free_sgd-warm": (
        optim.schedule_free_sgd(warm),
        lambda: free(optax.sgd, warm),
    ),
    "schedule_free_adamw": (optim.schedule_free_adamw(), optax.contrib.schedule_free_adamw),
    "schedule_free_adamw-options": (
        optim.schedule_free_adamw(0.01, (0.5, 0.9), 0.1, 0.1, 1.0),
        lambda: optax.contrib.schedule_free_adamw(0.01, None, 0.5, 0.9, 0.1, 0.1, 1.0),
    ),
    "schedule_free_adamw-warm": (
        optim.schedule_free_adamw(warm, (0.95, 0.99), weight_decay=0.1),
        lambda: free(lambda lr: optax.adamw(lr, b1=0.0, b2=0.99, weight_decay=0.1), warm, b1=0.95),
    ),
}


@pytest.fixture(autouse=True)
def float64():
    with x64():
        yield


def to_jax(leaves):
    return {path: jnp.asarray(leaf.numpy()) for path, leaf in leaves.items()}


def to_torch(leaves):
    return {path: torch.from_numpy(np.array(leaf)) for path, leaf in leaves.items()}


def run_optax(opt, steps=100):
    params, noise = to_jax(START), to_jax(NOISE)

    @jax.jit
    def step(params, state, number):
        grads = {path: jnp.sin(p) + noise[path][number] for path, p in params.items()}
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = opt.init(params)
    for number in range(steps):
        params, state = step(params, state, number)
    return params, state


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), CASES.items(), ids=CASES)
def test_equals_optax(name, case):
    ours, theirs = case
    params, state = run(ours, start())
    expected, expected_state = run_optax(theirs())
    agree(params, to_torch(expected))
    found = optim.slots(state)
    names = SLOTS[name.split("-")[0]]
    assert found.keys() == names.keys()
    for slot, leaves in found.items():
        column = optax.tree_utils.tree_get(expected_state, names[slot])
        close(tree.flatten_dict(leaves), to_torch(column))
    if "free" in name:
        average = optax.contrib.schedule_free_eval_params(expected_state, expected)
        agree(optim.schedule_free_params(state, params), to_torch(average))
        (part,) = [node for node in state if hasattr(node, "weight_sum")]
        close(part.weight_sum.item(), float(expected_state.weight_sum))
