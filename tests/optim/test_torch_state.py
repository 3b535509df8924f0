"""A run goes from torch.optim to fdl and back, with states that are equal bit by bit."""

import pytest
import torch

from fdl import optim, tree
from tests.support.asserts import close, unchanged
from tests.support.optimizers import (
    CASES,
    Case,
    continue_torch,
    default_dtype,
    run,
    run_torch,
    start,
)

# The last configuration of each optimizer that sets several options, and the first.
CHOSEN = {case.name: case for case in CASES if "maximize" in case.options}
SOME = [*{case.name: case for case in reversed(CASES)}.values(), *CHOSEN.values()]


def two_groups(case):
    """Half of the leaves with another rate, the others with another decay where there is one."""

    def make(leaves):
        first, *others = leaves.values()
        other = {"lr": 0.02} if case.name == "rprop" else {"lr": 0.02, "weight_decay": 0.3}
        return case.torch_class([{"params": [first], **other}, {"params": others}], **case.options)

    return make


def one_group(case):
    return lambda leaves: case.theirs(leaves.values())


def adam(leaves):
    return torch.optim.Adam(leaves.values())


def values(leaves):
    return tree.unflatten_dict({path: leaf.detach().clone() for path, leaf in leaves.items()})


def assert_bit_equal(state, optimizer, leaves):
    """Compare every slot and rate of a state with those of the torch optimizer."""
    flat = {name.rpartition(".")[2]: {} for name in optim.slots(state)}
    for name, slot in optim.slots(state).items():
        flat[name.rpartition(".")[2]] |= tree.flatten_dict(slot)
    for path, leaf in leaves.items():
        for name, value in optimizer.state[leaf].items():
            if name == "step":
                continue
            assert torch.equal(flat[name][path], value.to(flat[name][path].dtype)), (path, name)
    for label, group in enumerate(optimizer.param_groups):
        part = state[str(label)] if len(optimizer.param_groups) > 1 else state
        for name, value in optim.hyperparams(part).items():
            if name in group:
                assert value == group[name]


@pytest.mark.parametrize("groups", [one_group, two_groups], ids=["one-group", "two-groups"])
@pytest.mark.parametrize("case", SOME, ids=[case.id for case in SOME])
def test_twenty_steps_there_twenty_here_twenty_there(case, groups):
    with default_dtype(torch.float64):
        begin = start(shapes=case.shapes)
        expected, reference = run_torch(groups(case), begin, 60)

        leaves, theirs = run_torch(groups(case), begin, 20)
        own = tree.unflatten_dict(leaves)
        with unchanged(theirs.state_dict()):
            opt, state = optim.from_torch(theirs, own)
        assert_bit_equal(state, theirs, leaves)
        params, state = run(opt, values(leaves), 20, state=state, first=20)

        fresh = {
            path: leaf.clone().requires_grad_() for path, leaf in tree.flatten_dict(params).items()
        }
        back = groups(case)(fresh)
        with unchanged(state):
            back.load_state_dict(optim.to_torch(state, tree.unflatten_dict(fresh), back))
        assert_bit_equal(state, back, fresh)
        again = optim.from_torch(back, tree.unflatten_dict(fresh))[1]
        if case.name not in ("sgd", "muon"):  # torch counts no steps there
            assert tree.diff(state, again) == []
        continue_torch(back, fresh, 20, first=40)
    for path, leaf in fresh.items():
        # Muon rounds to bfloat16, where a last bit becomes a step.
        rtol = 1e-6 if case.name == "muon" else 1e-10
        close(leaf.detach(), expected[path].detach(), rtol=rtol)
        for name, value in back.state[leaf].items():
            close(value, reference.state[expected[path]][name], rtol=rtol)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_there_here_and_there(search):
    def objective(params):
        flat = tree.leaves(params)
        return sum(((leaf - i) ** 4 + (leaf - 1) ** 2).sum() for i, leaf in enumerate(flat))

    def there(optimizer, leaves, updates):
        def closure():
            optimizer.zero_grad()
            value = objective(leaves)
            value.backward()
            return value

        for _ in range(updates):
            optimizer.step(closure)

    def make(leaves):
        return torch.optim.LBFGS(leaves.values(), 0.2, max_iter=2, line_search_fn=search)

    begin = tree.flatten_dict(start())
    expected = {path: leaf.clone().requires_grad_() for path, leaf in begin.items()}
    leaves = {path: leaf.clone().requires_grad_() for path, leaf in begin.items()}
    there(make(expected), expected, 3)
    theirs = make(leaves)
    there(theirs, leaves, 1)
    opt, state = optim.from_torch(theirs, tree.unflatten_dict(leaves))
    params = values(leaves)
    grads, value = torch.func.grad_and_value(objective)(params)
    updates, state = opt.update(grads, state, params, value=value, value_fn=objective)
    params = tree.flatten_dict(optim.apply_updates(params, updates))
    fresh = {path: leaf.clone().requires_grad_() for path, leaf in params.items()}
    own, back = tree.unflatten_dict(fresh), make(fresh)
    back.load_state_dict(optim.to_torch(state, own, back))
    again = optim.from_torch(back, own)[1]
    assert tree.diff(state._replace(hyper=()), again._replace(hyper=())) == []
    there(back, fresh, 1)
    for path, leaf in fresh.items():
        close(leaf.detach(), expected[path].detach())
        assert (leaf - begin[path]).abs().max() > 0.01
    turned = tree.unflatten_dict(dict(reversed(fresh.items())))
    with pytest.raises(ValueError, match="not in the order of the optimizer"):
        optim.from_torch(back, turned)


def test_every_optimizer_is_converted():
    assert {case.name for case in SOME} == {case.name for case in CASES}
    assert any(case.options.get("amsgrad") for case in CASES)


def test_a_run_in_float32_keeps_its_bits():
    """Torch's defaults: float32 leaves, and counts and products in float32."""
    leaves, theirs = run_torch(lambda p: torch.optim.NAdam(p.values()), start(torch.float32), 7)
    own = tree.unflatten_dict(leaves)
    _, state = optim.from_torch(theirs, own)
    assert_bit_equal(state, theirs, leaves)
    back = torch.optim.NAdam(leaves.values())
    back.load_state_dict(optim.to_torch(state, own, back))
    for leaf in leaves.values():
        assert theirs.state[leaf].keys() == back.state[leaf].keys()
        for name, value in theirs.state[leaf].items():
            assert torch.equal(value, back.state[leaf][name])
            assert value.dtype == back.state[leaf][name].dtype


def test_nothing_is_shared():
    leaves, theirs = run_torch(adam, start(), 3)
    own = tree.unflatten_dict(leaves)
    _, state = optim.from_torch(theirs, own)
    with unchanged(state):
        continue_torch(theirs, leaves, 3)
    packed = optim.to_torch(state, own, theirs)
    with unchanged(theirs.state_dict()):
        for slots in packed["state"].values():
            for value in slots.values():
                value.zero_()


def test_before_the_first_step_there_is_no_state():
    leaves, theirs = run_torch(adam, start(), 0)
    own = tree.unflatten_dict(leaves)
    opt, state = optim.from_torch(theirs, own)
    assert optim.to_torch(state, own, theirs)["state"] == {}
    params, _ = run(opt, values(leaves), 10, state=state)
    continue_torch(theirs, leaves, 10)
    for path, leaf in tree.flatten_dict(params).items():
        close(leaf, leaves[path].detach(), rtol=1e-6)


def test_frozen_leaves_have_no_state_there_either_way():
    leaves, theirs = run_torch(
        lambda p: torch.optim.Adam(p.values()),
        start(),
        5,
        absent=lambda path, step: path == "vector",
    )
    own = tree.unflatten_dict(leaves)
    _, state = optim.from_torch(theirs, own)
    packed = optim.to_torch(state, own, theirs)
    assert len(packed["state"]) == 3
    assert packed["state"].keys() == theirs.state_dict()["state"].keys()


def test_rates_set_here_arrive_there():
    leaves, theirs = run_torch(lambda p: torch.optim.Adam(p.values(), 0.1), start(), 2)
    own = tree.unflatten_dict(leaves)
    _, state = optim.from_torch(theirs, own)
    state = optim.with_hyperparams(state, lr=0.03, beta1=0.8)
    theirs.load_state_dict(optim.to_torch(state, own, theirs))
    assert theirs.param_groups[0]["lr"] == 0.03
    assert theirs.param_groups[0]["betas"] == (0.8, 0.999)


# ------------------------------------------------------------------------------ errors


def test_an_optimizer_that_has_no_equal():
    leaf = torch.ones(1, requires_grad=True)
    with pytest.raises(
        TypeError, match=r"SparseAdam has no equivalent in fdl; supported: .*'Adam'"
    ):
        optim.from_torch(torch.optim.SparseAdam([leaf]), {"w": leaf})


def test_other_tensors_than_the_optimizers():
    leaves, theirs = run_torch(adam, start(), 1)
    with pytest.raises(
        ValueError, match=r"from_torch: params must be the optimizer's own tensors.*\n  scalar"
    ):
        optim.from_torch(theirs, start())
    part = tree.unflatten_dict({p: leaf for p, leaf in leaves.items() if p != "vector"})
    with pytest.raises(ValueError, match="1 parameters of the optimizer are not in the tree"):
        optim.from_torch(theirs, part)
    twice = {"a": leaves["vector"], "b": leaves["vector"]}
    with pytest.raises(ValueError, match="b: the same tensor as a; keep one of them"):
        optim.from_torch(torch.optim.Adam([leaves["vector"]]), twice)


def test_different_numbers_of_steps_in_a_group():
    leaves, theirs = run_torch(adam, start(), 5, lambda path, step: path == "vector" and step < 2)
    with pytest.raises(ValueError, match=r"group 0 .* different.*\n  scalar: 5\n  vector: 3"):
        optim.from_torch(theirs, tree.unflatten_dict(leaves))


def test_a_state_of_another_optimizer():
    leaves, theirs = run_torch(adam, start(), 1)
    state = optim.sgd(0.1, 0.9).init(start())
    with pytest.raises(ValueError, match="to_torch: the state does not belong to this optimizer"):
        optim.to_torch(state, tree.unflatten_dict(leaves), theirs)


def test_the_table_of_cases_is_torchs():
    assert Case("sgd", torch.optim.SGD, {"lr": 0.01}).id in {case.id for case in CASES}
    assert len(CASES) > 95
