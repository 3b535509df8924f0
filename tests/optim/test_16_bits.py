"""Parameters of 16 bits: every optimizer computes and remembers in 32, and rounds once."""

import pytest
import torch

import fdl
from fdl import losses, nn, optim, random, tree
from tests.support.asserts import close, draw, equal_bits
from tests.support.every_optimizer import EVERY

HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
each = pytest.mark.parametrize("name", EVERY)
SIZES = [0.0, 1e-4, 1.0, 300.0]


def value_fn(params):
    return sum((leaf * leaf).sum() for leaf in params.values())


@HALF
@each
def test_an_update_is_that_of_32_bits_rounded_and_so_is_all_it_remembers(name, dtype):
    opt = EVERY[name]
    params = {"w": draw(0, 2, 3).to(dtype), "b": draw(1, 2).to(dtype)}
    state = opt.init(params)
    assert not [
        leaf for leaf in tree.leaves(state) if leaf.dtype in (torch.float16, torch.bfloat16)
    ]
    assert tree.diff(state, opt.init(tree.cast(params, torch.float32)), values=False) == []
    for step, size in enumerate([*SIZES, *reversed(SIZES)]):
        grads = {k: (size * draw(step + 2, *p.shape)).to(dtype) for k, p in params.items()}
        wide = tree.cast(params, torch.float32)
        extra = {"value": torch.tensor(1.0)}
        if "lbfgs" not in name:  # which evaluates, in the dtype of the parameters
            expected, new = opt.update(tree.cast(grads, torch.float32), state, wide, **extra)
        updates, state = opt.update(grads, state, params, value_fn=value_fn, **extra)
        for k, u in updates.items():
            if u is not None:
                assert u.dtype == dtype and u.isfinite().all()
                assert "lbfgs" in name or equal_bits(u, expected[k].to(dtype))
        assert "lbfgs" in name or tree.diff(new, state) == []
        params = optim.apply_updates(params, updates)
    assert all(leaf.isfinite().all() for leaf in tree.leaves((params, state)))


TWINS = {
    "adam": (optim.adam(1e-3), lambda w: torch.optim.Adam(w, 1e-3)),
    "adamw": (optim.adamw(1e-3), lambda w: torch.optim.AdamW(w, 1e-3)),
    "nadam": (optim.nadam(1e-3), lambda w: torch.optim.NAdam(w, 1e-3)),
    "adamax": (optim.adamax(1e-3), lambda w: torch.optim.Adamax(w, 1e-3)),
    "radam": (optim.radam(1e-3), lambda w: torch.optim.RAdam(w, 1e-3)),
    "rmsprop": (optim.rmsprop(1e-3), lambda w: torch.optim.RMSprop(w, 1e-3)),
    "adagrad": (optim.adagrad(1e-3), lambda w: torch.optim.Adagrad(w, 1e-3)),
    "adadelta": (optim.adadelta(), lambda w: torch.optim.Adadelta(w)),
    "adafactor": (optim.adafactor(), lambda w: torch.optim.Adafactor(w)),
}


@HALF
@pytest.mark.parametrize("g", SIZES)
@pytest.mark.parametrize("name", TWINS)
def test_a_gradient_of_any_size_gives_the_step_of_torch_in_float64(name, g, dtype):
    ours, theirs = TWINS[name]
    params = {"w": torch.tensor([0.5, -2.0], dtype=dtype)}
    leaf = params["w"].double().requires_grad_()
    leaf.grad = torch.full((2,), g, dtype=dtype).double()
    theirs([leaf]).step()
    updates, _ = ours.update({"w": leaf.grad.to(dtype)}, ours.init(params), params)
    far = 2**-8 if dtype == torch.bfloat16 else 2**-10
    close(updates["w"].double(), leaf.detach() - params["w"].double(), rtol=far, atol=1e-7)


def test_a_second_moment_in_bfloat16_weights_decays():
    opt, params = optim.adam(), {"w": torch.zeros(1).bfloat16()}
    state = opt.init(params)
    for step in range(1000):
        _, state = opt.update({"w": torch.full((1,), 10.0 * (step == 0)).bfloat16()}, state, params)
    v = optim.slots(state)["exp_avg_sq"]["w"]
    close(v.double(), torch.tensor([0.1 * 0.999**999]).double(), rtol=1e-4)


@HALF
def test_an_average_of_16_bit_weights_goes_on_moving(dtype):
    opt, params = optim.params_ema(0.999), {"w": torch.zeros(1, dtype=dtype)}
    state = opt.init(params)
    _, state = opt.update(tree.map(torch.zeros_like, params), state, params)
    params = {"w": torch.ones(1, dtype=dtype)}
    for _ in range(1000):
        _, state = opt.update(tree.map(torch.zeros_like, params), state, params)
    average = optim.slots(state)["ema"]["w"]
    close(average, torch.tensor([1 - 0.999**1000]), rtol=1e-4)


@HALF
def test_a_decay_that_16_bit_weights_round_away_is_kept_by_a_policy(dtype):
    model = nn.Model(
        lambda key: {"w": torch.ones(1)},
        lambda params, x, *, train=False, key=None: params["w"] * x,
    )
    model = fdl.nn.with_policy(model, fdl.nn.Policy(compute=dtype))
    opt = optim.adamw(1e-3, weight_decay=0.1)
    loss = fdl.supervised(model, lambda y, target: 0 * losses.squared_loss(y, target))
    state = fdl.TrainState.create(model, opt, key=random.key(0))
    step = fdl.train_step(loss, opt)
    for _ in range(500):
        state, _ = step(state, (torch.ones(1, 1), torch.zeros(1, 1)))
    close(state.params["w"].double(), torch.tensor([(1 - 1e-4) ** 500]).double(), rtol=1e-5)
    w, alone = {"w": torch.ones(1, dtype=dtype)}, opt.init({"w": torch.ones(1, dtype=dtype)})
    updates, _ = opt.update({"w": torch.zeros(1, dtype=dtype)}, alone, w)
    assert optim.apply_updates(w, updates)["w"] == 1  # 1 − 1e-4 is 1 in 16 bits


@HALF
@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_a_compiled_update_equals_the_eager_one(name, dtype):
    opt, params = EVERY[name], {"w": draw(0, 2, 3).to(dtype), "b": draw(1, 2).to(dtype)}
    state = opt.init(params)
    compiled = fdl.jit(opt.update)
    for step, size in enumerate(SIZES):
        grads = {k: (size * draw(step + 2, *p.shape)).to(dtype) for k, p in params.items()}
        got, expected = compiled(grads, state, params), opt.update(grads, state, params)
        assert tree.diff(expected[0], got[0], rtol=1e-2, atol=1e-7) == []
        assert tree.diff(expected[1], got[1], rtol=1e-5, atol=1e-7) == []
        params, state = optim.apply_updates(params, got[0]), got[1]


# ------------------------------------------------------------------------------ earlier versions


def earlier(state, dtype):
    """What a state looked like when slots had the dtype of their parameters."""
    return tree.map(lambda x: x.to(dtype) if x.dtype == torch.float32 else x, state)


@HALF
@pytest.mark.parametrize("name", ["adam", "sgd", "chain", "lookahead", "lbfgs", "schedule_free"])
def test_slots_of_16_bits_in_a_state_or_a_file_go_on_in_32(name, dtype, tmp_path):
    opt, params = EVERY[name], {"w": draw(0, 2, 3).to(dtype), "b": draw(1, 2).to(dtype)}
    fresh = opt.init(params)
    _, state = opt.update(params, fresh, params, value_fn=value_fn)
    old = earlier(state, dtype)
    assert tree.diff(old, state, values=False)
    fdl.io.save(tmp_path / "old", {"params": params, "opt": old})
    loaded = fdl.io.load(tmp_path / "old", like={"params": params, "opt": fresh})
    assert tree.diff(loaded["opt"], tree.map(lambda o, s: o.to(s.dtype), old, state)) == []
    with_old = opt.update(params, old, params, value_fn=value_fn)
    assert tree.diff(opt.update(params, loaded["opt"], params, value_fn=value_fn), with_old) == []


def test_weights_of_16_bits_are_not_taken_for_those_of_32(tmp_path):
    fdl.io.save(tmp_path / "w", {"w": torch.ones(2).bfloat16()})
    with pytest.raises(ValueError, match=r"w: expected float32\[2\], got bfloat16\[2\]"):
        fdl.io.load(tmp_path / "w", like={"w": torch.ones(2)})


@HALF
def test_runs_of_torch_in_16_bits_go_over_and_back(dtype):
    w = draw(0, 3).to(dtype).requires_grad_()
    theirs = torch.optim.Adam([w], 0.1)
    w.grad = draw(1, 3).to(dtype)
    theirs.step()
    state = optim.from_torch(theirs, {"w": w})[1]
    assert optim.slots(state)["exp_avg"]["w"].dtype == torch.float32
    close(optim.slots(state)["exp_avg"]["w"], theirs.state[w]["exp_avg"].float())
    back = optim.to_torch(state, {"w": w}, theirs)["state"][0]
    assert equal_bits(back["exp_avg"], theirs.state[w]["exp_avg"])
    theirs.load_state_dict(optim.to_torch(state, {"w": w}, theirs))
    theirs.step()


# ------------------------------------------------------------------------------ finite


def test_what_comes_out_is_looked_at_as_well():
    params = {"w": torch.tensor([6e4, 1.0]).half()}
    for opt in (optim.apply_if_finite(optim.sgd(1.0)), optim.loss_scale(optim.sgd(1.0), init=1.0)):
        state = opt.init(params)
        updates, new = opt.update({"w": torch.tensor([-6e4, 1.0]).half()}, state, params)
        assert not updates["w"].any() and tree.diff(new.inner, state.inner) == []
        updates, _ = opt.update({"w": torch.tensor([6e4, 1.0]).half()}, state, params)
        assert updates["w"][0] == -torch.tensor(6e4).half()
    # What is infinite before keeps nobody from going on.
    params = {"w": torch.tensor([-torch.inf, 1.0])}
    opt = optim.apply_if_finite(optim.sgd(1.0))
    updates, state = opt.update({"w": torch.tensor([0.0, 1.0])}, opt.init(params), params)
    assert updates["w"][1] == -1 and state.skipped == 0
    # An optimizer of one's own that divides by zero.
    bad = optim.leafwise("bad", lambda g, p, t: (g / g, {}), {})
    opt = optim.apply_if_finite(bad)
    params = {"w": torch.ones(1)}
    updates, state = opt.update({"w": torch.zeros(1)}, opt.init(params), params)
    assert updates["w"] == 0 and state.skipped == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_scale_does_not_fall_to_zero(dtype):
    opt, params = optim.loss_scale(optim.sgd(1.0)), {"w": torch.ones(1, dtype=dtype)}
    state, update = opt.init(params), fdl.jit(opt.update)
    for _ in range(300):
        updates, state = opt.update({"w": torch.full((1,), torch.inf, dtype=dtype)}, state, params)
        assert updates["w"] == 0
    assert state.scale == 2.0**-24
    zero = {"w": torch.zeros(1, dtype=dtype)}
    for run in (opt.update, update):
        assert run(zero, state, params)[0]["w"] == 0
        g = (params["w"] * 0.5).float() * optim.loss_scale_of(state)
        assert (run({"w": g}, state, params)[0]["w"] == -0.5).all()
    least = optim.loss_scale(optim.sgd(1.0), init=2.0**-30)
    state = least.init(params)
    _, state = least.update({"w": torch.full((1,), torch.nan, dtype=dtype)}, state, params)
    assert state.scale == 2.0**-30


def test_a_gradient_that_overflows_when_it_is_divided_is_skipped():
    opt, params = optim.loss_scale(optim.sgd(1.0), init=2.0**-20), {"w": torch.ones(1)}
    updates, state = opt.update({"w": torch.tensor([3e38])}, opt.init(params), params)
    assert updates["w"] == 0 and state.scale == 2.0**-21
    clipped = optim.loss_scale(optim.chain(optim.clip(1.0), optim.sgd(1.0)), init=2.0**-20)
    updates, state = clipped.update({"w": torch.tensor([3e38])}, clipped.init(params), params)
    assert updates["w"] == 0 and state.scale == 2.0**-21
    # What float16 could not hold after the division, 32 bits do.
    opt, params = optim.loss_scale(optim.adam(0.5)), {"w": torch.ones(1).half()}
    updates, _ = opt.update({"w": torch.tensor([6e-8]).half()}, opt.init(params), params)
    g = torch.tensor([6e-8]).half().double() / 2**15
    close(updates["w"].double(), -0.5 * g / (g + 1e-8), rtol=1e-3)


def test_a_unit_is_clipped_whose_norm_leaves_float32():
    params = {"w": torch.ones(2, 2)}
    opt = optim.adaptive_grad_clip(0.01)
    clipped, _ = opt.update({"w": torch.full((2, 2), 3e38)}, opt.init(params), params)
    torch.testing.assert_close(clipped["w"], torch.full((2, 2), 0.01), rtol=1e-6, atol=0)
