"""Schedule-free averages: closed forms, where they are found in a state, errors, memory.

test_beyond.py compares whole runs with plain loops, test_beyond_jax.py with optax.
"""

import pytest
import torch

from fdl import optim, tree
from tests.optim.test_lion_adan_layerwise import run, start
from tests.support.asserts import close, unchanged


def test_the_average_of_plain_steps_is_their_mean():
    """With constant gradients z is known, and all steps count alike."""
    opt, params = optim.schedule_free_sgd(0.5, momentum=0.3), {"w": torch.zeros(3).double()}
    g, state = torch.tensor([1.0, -2.0, 4.0]).double(), opt.init(params)
    assert tree.diff(optim.schedule_free_params(state, params), params) == []
    for t in range(1, 9):
        updates, state = opt.update({"w": g}, state, params)
        params = optim.apply_updates(params, updates)
        mean = -0.5 * g * (t + 1) / 2
        close(optim.schedule_free_params(state, params), {"w": mean})
        close(params, {"w": 0.3 * mean + 0.7 * -0.5 * g * t})


def test_averages_are_found_in_any_state():
    params = start()
    opt = optim.multi_transform(
        {
            "free": optim.chain(optim.clip_by_global_norm(1.0), optim.schedule_free_sgd(0.1)),
            "plain": optim.sgd(0.1),
            "adam": optim.schedule_free_adamw(0.01),
        },
        {"free": "nested.*", "plain": "scalar", "adam": "vector"},
    )
    after, state = run(opt, params, 5)
    with unchanged(state, after):
        found = tree.flatten_dict(optim.schedule_free_params(state, after))
    flat = tree.flatten_dict(after)
    assert list(found) == list(flat) and torch.equal(found["scalar"], flat["scalar"])
    for path in ("vector", "nested.matrix", "nested.kernel"):
        assert (found[path] - flat[path]).abs().min() > 1e-6
    vector, _ = run(optim.schedule_free_adamw(0.01), {"vector": params["vector"]}, 5)
    close(vector["vector"], after["vector"])


def test_a_new_beta_counts_from_the_next_update():
    opt, params = optim.schedule_free_sgd(0.1), start()
    params, state = run(opt, params, 5)
    average = optim.schedule_free_params(state, params)
    state = optim.with_hyperparams(state, beta=0.2)
    close(optim.schedule_free_params(state, params), average, rtol=0)
    updates, state = opt.update(tree.map(torch.zeros_like, params), state, params)
    params = optim.apply_updates(params, updates)
    z = optim.slots(state)["z"]
    expected = tree.map(lambda x, z: x + (z - x) / 6, average, z)
    close(optim.schedule_free_params(state, params), expected)
    close(params, tree.map(lambda x, z: 0.2 * x + 0.8 * z, expected, z))


def test_averages_of_other_states_raise():
    params = start()
    with pytest.raises(ValueError, match=r"schedule_free_params: the state has no schedule-free"):
        optim.schedule_free_params(optim.adam().init(params), params)
    other = {"scalar": params["scalar"], "vector": torch.ones(2)}
    with pytest.raises(ValueError, match="the state belongs to other parameters") as error:
        optim.schedule_free_params(optim.schedule_free_sgd().init(params), other)
    for line in ("vector: expected [3], got [2]", "nested.matrix: expected [2, 3], missing"):
        assert f"\n  {line}" in str(error.value)


def test_no_two_leaves_share_memory():
    """As `jit(..., donate_argnums=...)` needs it: the first z is not the parameters, say."""
    opt, params = optim.schedule_free_adamw(0.1), start()
    state = opt.init(params)
    for _ in range(2):
        leaves = tree.leaves((params, state))
        assert len({leaf.data_ptr() for leaf in leaves}) == len(leaves)
        _, state = opt.update(params, state, params)
