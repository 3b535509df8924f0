"""Gradients of single examples equal a loop, and DP-SGD equals its formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap

import fdl
from fdl import losses, nn, optim, random, tree
from fdl.data import Batch
from fdl.transforms import clipped_grad_sum, per_sample_grads, per_sample_norms
from models.lenet import lenet
from tests.support.asserts import close, draw, unchanged

N = 7
CHUNKS = [None, 1, 3, 7, 50]
net = nn.sequential(nn.linear(3, 5), nn.tanh, nn.linear(5, 4))
params = tree.cast(net.init(random.key(0)), torch.float64)
loss = fdl.supervised(net, losses.cross_entropy)
labels = torch.tensor([0, 3, 1, 2, 2, 0, 1])
mask = torch.tensor([True, True, False, True, True, False, True])  # chunks repeat the last
batch = Batch(draw(1, N, 3), labels)
masked = batch._replace(mask=mask)
each_chunk = pytest.mark.parametrize("chunk", CHUNKS)


def loop(loss=loss, params=params, batch=batch, key=None):
    """One example after another, by `backward()`."""
    rows = []
    for i in range(len(batch.y)):
        leaves = tree.map(lambda p: p.clone().requires_grad_(), params)
        options = {} if key is None else {"train": True, "key": random.fold_in(key, i)}
        loss(leaves, (batch.x[i : i + 1], batch.y[i : i + 1]), **options)[0].backward()
        rows.append(tree.map(lambda p: p.grad, leaves))
    return tree.stack(rows)


def column(x, like):
    return x.view(-1, *[1] * (like.ndim - 1))


@each_chunk
def test_equal_a_loop_in_the_order_of_the_batch(chunk):
    with unchanged(params, batch):
        got = per_sample_grads(loss, chunk)(params, batch)
    close(got, loop())
    assert all(leaf.abs().amax() > 1e-2 for leaf in tree.leaves(got))


@each_chunk
def test_masked_examples_have_no_gradient_and_the_sum_is_that_of_the_batch(chunk):
    hostile = masked._replace(x=torch.where(mask[:, None], masked.x, torch.nan))
    got = per_sample_grads(loss, chunk)(params, hostile)
    assert all((leaf[~mask] == 0).all() for leaf in tree.leaves(got))
    mean = tree.map(lambda g: g.sum(0) / mask.sum(), got)
    close(mean, grad(lambda p: loss(p, masked)[0])(params))
    norms = per_sample_norms(loss, chunk)(params, hostile)
    assert (norms[~mask] == 0).all() and (norms[mask] > 0).all()


@each_chunk
def test_norms_are_over_all_leaves(chunk):
    flat = torch.cat([leaf.flatten(1) for leaf in tree.leaves(loop())], 1)
    close(per_sample_norms(loss, chunk)(params, batch), flat.norm(dim=1))


@each_chunk
@pytest.mark.parametrize("max_norm", [1.5, torch.tensor(1.5)], ids=["number", "tensor"])
def test_the_clipped_sum_equals_a_loop(chunk, max_norm):
    rows = loop()
    norms = torch.cat([leaf.flatten(1) for leaf in tree.leaves(rows)], 1).norm(dim=1)
    factor = torch.where(norms > 1.5, 1.5 / norms, 1.0) * mask
    assert 0 < (factor[mask] < 1).sum() < mask.sum(), "some are clipped, and some are not"
    got = clipped_grad_sum(loss, max_norm, chunk)(params, masked)
    expected = tree.map(lambda g: (column(factor, g) * g).sum(0), rows)
    close(got, expected)


@each_chunk
def test_an_example_draws_from_the_key_of_its_place(chunk):
    dropped = nn.sequential(nn.linear(3, 5), nn.dropout(0.5), nn.linear(5, 4))
    of_model = fdl.supervised(dropped, losses.cross_entropy)
    start = tree.cast(dropped.init(random.key(0)), torch.float64)
    same = Batch(batch.x[:1].expand(N, -1), labels[:1].expand(N))
    got = per_sample_grads(of_model, chunk)(start, same, train=True, key=random.key(3))
    close(got, loop(of_model, start, same, random.key(3)))
    assert len(got["0"]["bias"].unique(dim=0)) > 2, "one mask for all"


def test_a_plain_loss_and_a_pair_as_batch():
    def plain(p, b, **_):
        return ((b.x @ p["w"] - b.y) ** 2).sum()

    x, y, w = draw(1, 4, 3), draw(2, 4), draw(3, 3)
    close(per_sample_grads(plain)({"w": w}, (x, y)), {"w": 2 * (x @ w - y)[:, None] * x})


def test_lenet_equals_a_loop():
    model = lenet()
    start = tree.cast(model.init(random.key(0)), torch.float64)
    of_model = fdl.supervised(model, losses.cross_entropy)
    images = Batch(draw(4, 5, 1, 28, 28), labels[:5])
    close(per_sample_grads(of_model, 2)(start, images), loop(of_model, start, images))


@pytest.mark.slow
def test_a_scan_of_private_steps_compiled_equals_the_formula(plain_backend, real_loops):
    """DP-SGD: clip, sum, add noise, divide by the expected batch size, step."""
    bound, sigma, size = 0.5, 1.1, N
    noise = optim.add_noise(random.key(9), eta=(sigma * bound / size) ** 2, gamma=0)
    opt = optim.chain(noise, optim.sgd(0.3))
    total = clipped_grad_sum(loss, bound, chunk=3)

    def step(state, batch):
        p, opt_state = state
        grads = tree.map(lambda g: g / size, total(p, batch))
        updates, opt_state = opt.update(grads, opt_state, p)
        return (optim.apply_updates(p, updates), opt_state), ()

    batches = tree.stack([masked, masked._replace(x=masked.x + 1)])
    start = (params, opt.init(params))
    got = fdl.jit(lambda state, batches: fdl.scan(step, state, batches))(start, batches)[0][0]

    p, paths = params, sorted(tree.flatten_dict(params))
    for t, one in enumerate(tree.unstack(batches)):
        rows = loop(params=p, batch=one)
        norms = torch.cat([leaf.flatten(1) for leaf in tree.leaves(rows)], 1).norm(dim=1)
        factor = mask / (norms / bound).clamp(min=1)
        drawn = random.fold_in(random.key(9), t)
        moved = {}
        for path, g in tree.flatten_dict(rows).items():
            z = random.normal(random.fold_in(drawn, paths.index(path)), g.shape[1:], g.dtype)
            moved[path] = -0.3 * ((column(factor, g) * g).sum(0) + sigma * bound * z) / size
        p = tree.map(torch.add, p, tree.unflatten_dict(moved))
    close(got, p, rtol=1e-9)


def test_many_members_at_once_and_derivatives_of_norms():
    stacked = tree.stack([params, tree.map(lambda p: 2 * p, params)])
    got = vmap(per_sample_norms(loss, 3), in_dims=(0, None))(stacked, batch)
    close(got[1], per_sample_norms(loss)(tree.map(lambda p: 2 * p, params), batch))
    v, eps = tree.map(torch.ones_like, params), 1e-6
    total = lambda p: per_sample_norms(loss, 3)(p, batch).sum()  # noqa: E731
    slope = torch.stack([g.sum() for g in tree.leaves(grad(total)(params))]).sum()
    up, down = (total(tree.map(lambda p, u, s=s: p + s * eps * u, params, v)) for s in (1, -1))
    close(slope, (up - down) / (2 * eps), rtol=1e-6)


MAKERS = [per_sample_grads, per_sample_norms, lambda f, c=None: clipped_grad_sum(f, 1.0, c)]
each_maker = pytest.mark.parametrize("make", MAKERS, ids=["grads", "norms", "clipped_sum"])


@each_maker
def test_errors(make):
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        make(loss, 0)
    with pytest.raises(TypeError, match=r"chunk must be an int, got 2\.0"):
        make(loss, 2.0)
    with pytest.raises(TypeError, match="the loss has buffers"):
        make(fdl.StatefulLoss(lambda params, buffers, batch, **_: None))
    with pytest.raises(ValueError, match=r"loss must return a scalar, a 0-d tensor, got \[1\]"):
        make(lambda p, b, **_: p["0"]["bias"][:1])(params, batch)
    with pytest.raises(ValueError, match=r"0\.weight: int"):
        make(loss)({"0": {"weight": 3}}, batch)
    with pytest.raises(TypeError, match=r"batch must be \(x, y\) or Batch\(x, y, mask\)"):
        make(loss)(params, batch.x)
    with pytest.raises(ValueError, match=r"common first axis.*'x': \[7, 3\], 'y': \[6\]"):
        make(loss)(params, (batch.x, labels[:6]))
    with pytest.raises(ValueError, match=r"common first axis.*'mask': \[\]"):
        make(loss)(params, batch._replace(mask=torch.tensor(True)))
    with pytest.raises(TypeError, match=r"random\.key\(3\)"):
        make(loss)(params, batch, key=3)


def test_the_bound_must_be_a_positive_number():
    for bad in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="max_norm must be positive and finite"):
            clipped_grad_sum(loss, bad)
    with pytest.raises(ValueError, match=r"max_norm must be a number or a 0-d tensor, got \[2\]"):
        clipped_grad_sum(loss, torch.ones(2))
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="max_norm must be positive and finite"):
            clipped_grad_sum(loss, torch.tensor(bad))


def test_a_bound_that_is_not_positive_makes_the_sum_0_where_its_value_is_not_known(plain_backend):
    total = fdl.jit(lambda bound: clipped_grad_sum(loss, bound)(params, batch))
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        assert not any(leaf.any() for leaf in tree.leaves(total(torch.tensor(bad))))
    close(total(torch.tensor(1.5)), clipped_grad_sum(loss, 1.5)(params, batch))


# ------------------------------------------------------------------------- the bound of DP-SGD


def inner(p, batch, **_):
    """A loss whose gradient is the row itself for `w`, and the label for `b`."""
    return (p["w"] * batch.x).sum() + (p["b"] * batch.y).sum()


def at_origin(dtype, features=3):
    return {"w": torch.zeros(features, dtype=dtype), "b": torch.zeros((), dtype=dtype)}


def flat64(sums):
    return torch.cat([leaf.double().flatten() for leaf in tree.leaves(sums)])


hostile = st.sampled_from(
    [
        0.0,
        -0.0,
        1.0,
        -3.0,
        1e-45,
        1e-25,
        1e-10,
        1e10,
        1e30,
        -3e38,
        1e300,
        *map(float, ["inf", "nan"]),
    ]
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    st.lists(hostile, min_size=4, max_size=4),
    st.sampled_from([1e-3, 1.0, 40.0]),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([None, 1, 2]),
    st.integers(0, 3),
    st.booleans(),
)
def test_no_row_moves_the_sum_by_more_than_the_bound(row, bound, dtype, chunk, place, jitted):
    others = draw(5, 3, 4).to(dtype)
    whole = torch.cat([others[:place], torch.tensor([row], dtype=dtype), others[place:]])
    total = clipped_grad_sum(inner, bound, chunk)
    # Traced code takes another branch than eager code, and `vmap` takes that branch, too.
    run = (lambda p, b: tree.map(lambda x: x[0], vmap(total, (None, 0))(p, b))) if jitted else total
    stack = (lambda b: tree.map(lambda x: x[None], b)) if jitted else (lambda b: b)
    start = at_origin(dtype)
    with_row = flat64(run(start, stack((whole[:, :3], whole[:, 3]))))
    without = flat64(run(start, stack((others[:, :3], others[:, 3]))))
    moved = (with_row - without).norm().item()
    assert moved <= bound * (1 + 1e-6)
    norm = torch.tensor(row, dtype=dtype).double().norm().item()
    if norm < 1e37 * bound:  # a finite row contributes as much as it may
        assert moved == pytest.approx(min(norm, bound), rel=1e-5, abs=1e-6 * bound)
    elif not norm < 1e38 * bound:
        assert moved <= 1e-6 * bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_sixteen_bits_are_rounded_once(dtype, chunk):
    rows = draw(6, 50, 3).mul(300).to(dtype)
    rows = (rows, torch.zeros(50, dtype=dtype))
    got = clipped_grad_sum(inner, 1.0, chunk)(at_origin(dtype), rows)["w"]
    exact = torch.nn.functional.normalize(rows[0].double(), dim=1).sum(0)
    assert got.dtype == dtype and torch.equal(got, exact.float().to(dtype))
    for i in range(50):
        one = tree.map(lambda leaf, i=i: leaf[i : i + 1], rows)
        assert clipped_grad_sum(inner, 1.0, chunk)(at_origin(dtype), one)["w"].double().norm() <= (
            1 + torch.finfo(dtype).eps / 2
        )


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_three_thousand_ones_in_sixteen_bits(chunk):
    ones = (torch.ones(3000, 1).half(), torch.zeros(3000).half())
    got = clipped_grad_sum(inner, 1.0, chunk)(at_origin(torch.float16, 1), ones)
    assert got["w"] == 3000


@each_chunk
@pytest.mark.parametrize("make", [per_sample_grads, per_sample_norms], ids=["grads", "norms"])
def test_padding_may_hold_anything(make, chunk):
    """Invalid labels and inputs that are not finite do not affect derivatives."""
    padded = masked._replace(
        x=torch.where(mask[:, None], masked.x, torch.inf), y=torch.where(mask, labels, -100)
    )

    def total(p, b):
        return sum(leaf.square().sum() for leaf in tree.leaves(make(loss, chunk)(p, b)))

    close(make(loss, chunk)(params, padded), make(loss, chunk)(params, masked))
    close(grad(total)(params, padded), grad(total)(params, masked))
    close(
        clipped_grad_sum(loss, 1.0, chunk)(params, padded),
        clipped_grad_sum(loss, 1.0, chunk)(params, masked),
    )
    nothing = padded._replace(mask=torch.zeros(N, dtype=torch.bool), x=masked.x, y=labels)
    assert not any(leaf.any() for leaf in tree.leaves(make(loss, chunk)(params, nothing)))
    assert not any(
        leaf.any() for leaf in tree.leaves(clipped_grad_sum(loss, 1.0, chunk)(params, nothing))
    )


@each_chunk
@pytest.mark.parametrize("key", [None, random.key(0)], ids=["no key", "key"])
@pytest.mark.parametrize("rows", [batch, masked], ids=["plain", "masked"])
def test_no_rows_give_no_rows_and_a_sum_of_0(chunk, key, rows, plain_backend):
    none = tree.map(lambda leaf: leaf[:0], rows)
    options = {} if key is None else {"key": key}
    for jitted in (False, True):
        run = (lambda f: fdl.jit(f)) if jitted else (lambda f: f)
        rows = run(per_sample_grads(loss, chunk))(params, none, **options)
        assert tree.diff(tree.map(lambda p: p.new_zeros(0, *p.shape), params), rows) == []
        norms = run(per_sample_norms(loss, chunk))(params, none, **options)
        assert norms.shape == (0,) and norms.dtype == torch.float64
        sums = run(clipped_grad_sum(loss, 1.0, chunk))(params, none, **options)
        assert tree.diff(tree.map(torch.zeros_like, params), sums) == []
