"""`fdl.data`: made-up examples, index arrays and batches."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fdl
from fdl import data, random, tree

# Traced whole, but not compiled to code: keys compile slowly, and their own tests do it.
TRACED = {"fullgraph": True, "backend": "aot_eager"}


# Made-up examples


def test_synthetic_linear_is_the_stated_model() -> None:
    w, b, noise = torch.tensor([2.0, -3.4, 0.5], dtype=torch.float64), 4.2, 0.3
    x, y = data.synthetic_linear(random.key(1), w, b, 20_000, noise)
    assert (x.shape, y.shape) == ((20_000, 3), (20_000, 1))
    assert x.dtype == y.dtype == torch.float64
    error = (y - torch.nn.functional.linear(x, w[None], torch.tensor([b]).double())) / noise
    columns = torch.cat([x, error], 1)  # independent and N(0, 1), all four
    assert columns.mean(0).abs().max() < 0.03  # 4 standard errors
    torch.testing.assert_close(columns.T.cov(), torch.eye(4).double(), atol=0.05, rtol=0)
    assert 0.67 < (error.abs() < 1).double().mean() < 0.70
    ones = torch.ones(len(x), 1).double()
    found = torch.linalg.lstsq(torch.cat([x, ones], 1), y).solution[:, 0]
    torch.testing.assert_close(found, torch.tensor([2.0, -3.4, 0.5, b]).double(), atol=0.01, rtol=0)


def test_synthetic_linear_repeats_with_its_key_alone() -> None:
    draw = partial(data.synthetic_linear, w=[1.0, 2.0], b=torch.tensor(0.5), n=10, noise=0.1)
    first, again, other = draw(random.key(0)), draw(random.key(0)), draw(random.key(1))
    assert first.x.dtype == first.y.dtype == torch.float32
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.y, again.y)
    assert not torch.equal(first.x, other.x)
    assert not torch.equal(first.y, other.y)


def test_synthetic_linear_draws_noise_apart_from_features() -> None:
    x, y = data.synthetic_linear(random.key(2), [0.0], 0.0, 10_000, 1.0)
    assert torch.cat([x, y], 1).T.corrcoef()[0, 1].abs() < 0.04  # 4 standard errors


def test_synthetic_linear_keeps_the_dtype_of_w_whatever_b_is() -> None:
    w, b = torch.ones(2), torch.tensor([4.0], dtype=torch.float64)
    x, y = data.synthetic_linear(random.key(0), w, b, 5, 0.0)
    assert (x.dtype, y.dtype, y.shape) == (torch.float32, torch.float32, (5, 1))
    torch.testing.assert_close(y, x.sum(1, keepdim=True) + 4)


@pytest.mark.slow
def test_synthetic_linear_under_vmap_and_compile() -> None:
    draw = partial(data.synthetic_linear, b=1.0, n=30, noise=0.1)
    keys, weights = random.split(random.key(0), 3), torch.arange(6.0).reshape(3, 2)
    together = torch.vmap(draw)(keys, weights)
    compiled = torch.compile(torch.vmap(draw), **TRACED)(keys, weights)
    for i in range(3):
        alone = draw(keys[i], weights[i])
        for field in (0, 1):
            torch.testing.assert_close(together[field][i], alone[field], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(compiled[field][i], alone[field], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"n": 0}, ValueError, "synthetic_linear: n must be at least 1, got 0"),
        ({"n": 2.0}, TypeError, "synthetic_linear: n must be an int, got 2.0"),
        ({"noise": -1.0}, ValueError, "noise must be finite and at least 0, got -1.0"),
        ({"noise": float("nan")}, ValueError, "noise must be finite and at least 0, got nan"),
        ({"w": torch.ones(2, 1)}, ValueError, r"w must have shape \[in\], got \[2, 1\]"),
        ({"b": torch.ones(5)}, ValueError, r"b must be one number, got \[5\]"),
        ({"w": 3.0}, ValueError, r"w must have shape \[in\], got \[\]"),
    ],
)
def test_synthetic_linear_refuses(change, kind, message) -> None:
    with pytest.raises(kind, match=message):
        data.synthetic_linear(
            random.key(0), **{"w": [1.0], "b": 0.0, "n": 5, "noise": 0.0} | change
        )


# The batches


def check_covers(indices: data.Indices, n: int, batch_size: int) -> None:
    index, mask = indices
    assert (index.dtype, mask.dtype) == (torch.int64, torch.bool)
    assert index.shape == ((n + batch_size - 1) // batch_size, batch_size)
    if n % batch_size == 0:  # nothing is filled up
        assert mask.shape == (len(index), 0)
        mask = torch.ones_like(index, dtype=torch.bool)
    assert mask.shape == index.shape
    assert sorted(index[mask].tolist()) == list(range(n))
    assert mask.flatten().tolist() == [True] * n + [False] * (mask.numel() - n)
    assert not index[~mask].any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.integers(1, 320))
def test_epoch_takes_every_example_once(seed: int, n: int, batch_size: int) -> None:
    key = random.key(seed)
    padded = data.epoch_indices(key, n, batch_size)
    check_covers(padded, n, batch_size)
    check_covers(data.sequential_indices(n, batch_size), n, batch_size)
    if batch_size <= n:
        index, mask = data.epoch_indices(key, n, batch_size, drop_last=True)
        steps = n // batch_size
        assert index.shape == (steps, batch_size)
        assert mask.shape == (steps, 0)
        assert torch.equal(index, padded.index[:steps])


def test_sequential_indices_keep_the_order() -> None:
    index, mask = data.sequential_indices(7, 3, device="cpu")
    assert index.tolist() == [[0, 1, 2], [3, 4, 5], [6, 0, 0]]
    assert mask.tolist() == [[True] * 3, [True] * 3, [True, False, False]]


def test_epoch_depends_on_its_key_alone() -> None:
    key = random.key(3)
    epochs = [data.epoch_indices(random.fold_in(key, e), 1000, 100).index for e in (0, 1, 0)]
    assert torch.equal(epochs[0], epochs[2])
    assert (epochs[0] == epochs[1]).float().mean() < 0.05
    in_order = data.sequential_indices(1000, 100).index
    assert (epochs[0] == in_order).float().mean() < 0.05
    assert torch.equal(epochs[0].flatten(), random.permutation(random.fold_in(key, 0), 1000))


@pytest.mark.parametrize("name", ["n", "batch_size"])
@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (0, ValueError, "{} must be at least 1, got 0"),
        (-3, ValueError, "{} must be at least 1, got -3"),
        (2.5, TypeError, "{} must be an int, got 2.5"),
    ],
)
def test_indices_refuse_bad_counts(name, value, kind, message) -> None:
    counts = {"n": 10, "batch_size": 2} | {name: value}
    with pytest.raises(kind, match="epoch_indices: " + message.format(name)):
        data.epoch_indices(random.key(0), **counts)
    with pytest.raises(kind, match="sequential_indices: " + message.format(name)):
        data.sequential_indices(**counts)


def test_dropping_the_only_batch_is_refused() -> None:
    assert data.epoch_indices(random.key(0), 5, 5, drop_last=True).index.shape == (1, 5)
    with pytest.raises(
        ValueError, match="batch_size must be at most n=5 with drop_last=True, got 6"
    ):
        data.epoch_indices(random.key(0), 5, 6, drop_last=True)


@pytest.mark.slow
def test_epoch_indices_under_vmap_and_compile() -> None:
    keys = random.split(random.key(0), 3)
    for drop_last in (False, True):
        epoch = partial(data.epoch_indices, n=50, batch_size=8, drop_last=drop_last)
        one_by_one = [epoch(key) for key in keys]
        together = torch.vmap(epoch)(keys)
        compiled = torch.compile(epoch, **TRACED)(keys[1])
        assert isinstance(compiled, data.Indices)
        for field in (0, 1):
            assert torch.equal(together[field], torch.stack([one[field] for one in one_by_one]))
            assert torch.equal(compiled[field], one_by_one[1][field])


def rows(indices: data.Indices) -> list[data.Indices]:
    return [data.Indices(*row) for row in zip(*indices, strict=True)]


@pytest.fixture(scope="module")
def sample() -> data.Dataset:
    return data.fashion_mnist_sample(train=False)


def test_batch_takes_an_index_alone(sample: data.Dataset) -> None:
    """Two numbers are two examples, not an index and a mask."""
    for numbers in ([1, 2], [5], [3, 1, 4]):
        batch = data.batch(sample, torch.tensor(numbers))
        assert torch.equal(batch.y, sample.y[numbers]) and batch.x.shape[0] == len(numbers)
        assert batch.mask == ()


@pytest.mark.slow
@pytest.mark.parametrize("n", [12, 13])
@pytest.mark.parametrize("drop_last", [False, True])
def test_whole_batches_have_no_mask_on_any_way_through_an_epoch(n, drop_last, plain_backend):
    points = data.Dataset(torch.arange(n * 2.0).view(n, 2), torch.arange(n))
    indices = data.epoch_indices(random.key(2), n, 4, drop_last=drop_last)
    whole = n == 12 or drop_last
    ways = [
        [data.batch(points, row) for row in zip(*indices, strict=True)],
        list(data.batches(points, indices)),
        [data.batch(points, data.take(indices, i)) for i in range(3)],
    ]
    _, found = fdl.jit(
        lambda points, rows: fdl.scan(lambda c, row: (c, data.batch(points, row)), (), rows)
    )(points, indices)
    ways.append([tree.map(lambda leaf, i=i: leaf[i], found) for i in range(len(indices.index))])
    if whole:
        ways.append(list(data.batches(points, indices.index)))
    for batches in ways:
        assert all((batch.mask == ()) == whole for batch in batches)
        for batch, first in zip(batches, ways[0], strict=False):
            assert torch.equal(batch.x, first.x) and torch.equal(batch.y, first.y)
    stacked = torch.vmap(lambda row: data.batch(points, row))(indices)
    assert (stacked.mask == ()) == whole


def test_losses_and_metrics_get_no_weights_from_whole_batches():
    """Whichever way the indices come about; a mask that says nothing is never made up."""
    points = data.Dataset(torch.arange(24.0).view(12, 2), torch.arange(12.0))
    seen = []

    def loss(prediction, y, weights):
        seen.append(weights)
        return fdl.losses.mse(prediction, y, weights)

    def metric(prediction, y, weights):
        seen.append(weights)
        return fdl.metrics.mean(prediction, weights)

    model = fdl.nn.Model(lambda key: {}, lambda params, x, **_: x.sum(1), uses_key=False)
    evaluate = fdl.supervised(model, loss, {"mean": metric})
    drawn = data.bootstrap_indices(random.key(0), 12, 4)
    for indices in (
        data.epoch_indices(random.key(0), 12, 4),
        data.epoch_indices(random.key(0), 12, 5, drop_last=True),
        data.sequential_indices(12, 4),
        drawn,
        torch.vmap(lambda key: data.epoch_indices(key, 12, 4))(random.split(random.key(0), 2)),
        data.Indices(drawn.index, drawn.mask),
        fdl.parallel.own_rows(drawn, None),
    ):
        assert indices.mask.shape[-1] == 0
        if indices.index.ndim == 2:
            for batch in data.batches(points, indices):
                evaluate({}, batch)
    assert seen and all(weights is None for weights in seen)
    # Padding makes one, for all batches, so that one program serves them; and so does a file in
    # which a mask was stored for indices without padding.
    stored = data.Indices(drawn.index, torch.ones_like(drawn.index, dtype=torch.bool))
    for indices in (data.sequential_indices(12, 5), stored):
        assert all(batch.mask.shape == batch.y.shape for batch in data.batches(points, indices))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16])
def test_batch_keeps_dtypes(dtype: torch.dtype) -> None:
    x = torch.arange(40).reshape(10, 4).to(dtype)
    row = data.Indices(torch.tensor([3, 9, 3]), torch.tensor([True, True, False]))
    for features in (
        x,
        x.reshape(10, 2, 2),
        x.to(torch.uint8),
        x.reshape(10, 2, 2).to(torch.uint8),
    ):
        batch = data.batch((features, x[:, :1]), row)
        assert batch.x.dtype == features.dtype
        assert torch.equal(batch.x, features[[3, 9, 3]])
        assert torch.equal(batch.y, x[[3, 9, 3], :1])


@pytest.mark.parametrize("indices", [data.sequential_indices(1000, 96), None])
def test_masked_means_over_an_epoch_are_exact(indices, sample: data.Dataset) -> None:
    indices = data.epoch_indices(random.key(5), 1000, 96) if indices is None else indices
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows(indices):
        batch = data.to_float(data.batch(sample, row))
        total += (batch.x.double().mean((1, 2, 3)) * batch.mask).sum()
        count += batch.mask.sum()
    assert count == 1000
    torch.testing.assert_close(total / count, (sample.x.double() / 255).mean(), rtol=1e-6, atol=0)


def images_of(sample, row):
    return data.to_float(data.batch(sample, row))


def test_batches_compiled_equal_eager(sample: data.Dataset) -> None:
    step = torch.compile(images_of, fullgraph=True)
    for row in rows(data.epoch_indices(random.key(1), 1000, 300)):
        for ours, eager in zip(step(sample, row), images_of(sample, row), strict=True):
            assert torch.equal(ours, eager)


def test_batches_under_vmap(sample: data.Dataset) -> None:
    indices = data.epoch_indices(random.key(2), 1000, 30)
    members = torch.vmap(images_of, in_dims=(None, 0))
    population = members(sample, indices)
    compiled = torch.compile(members, fullgraph=True)(sample, indices)
    assert all(torch.equal(*pair) for pair in zip(compiled, population, strict=True))
    assert population.x.shape == (34, 30, 1, 28, 28)
    folds = data.Dataset(sample.x.reshape(4, 250, 28, 28), sample.y.reshape(4, 250))
    row = rows(data.sequential_indices(250, 30))[-1]
    each = torch.vmap(images_of, in_dims=(0, None))(folds, row)
    for i, one in enumerate(rows(indices)):
        assert torch.equal(population.x[i], images_of(sample, one).x)
    for i in range(4):
        alone = images_of(data.take(folds, i), row)
        assert torch.equal(each.x[i], alone.x)
        assert torch.equal(each.y[i], alone.y)


def test_batch_stays_on_the_device(sample: data.Dataset) -> None:
    there = data.Dataset(*(part.to("meta") for part in sample))
    row = rows(data.sequential_indices(1000, 30, device="meta"))[0]
    batch = data.batch(there, row)
    assert {part.device.type for part in batch} == {"meta"}


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"index": torch.tensor([0.0])}, TypeError, "index must be int64, got torch.float32"),
        ({"index": torch.tensor([True])}, TypeError, "index must be int64, got torch.bool"),
        ({"y": torch.zeros(3)}, ValueError, "same number of rows, got {'x': 2, 'y': 3}"),
        (
            {"index": torch.tensor([0], device="meta")},
            ValueError,
            "x on cpu, y on cpu, index on meta; move",
        ),
    ],
)
def test_batch_refuses(change, kind, message) -> None:
    given = {"x": torch.zeros(2, 1), "y": torch.zeros(2), "index": torch.tensor([1])} | change
    with pytest.raises(kind, match=f"batch: .*{message}"):
        data.batch((given["x"], given["y"]), (given["index"], ()))


@pytest.mark.parametrize(
    ("indices", "kind", "message"),
    [
        ([1, 2], TypeError, "index must be int64, got int"),
        ([0, 1, 2], TypeError, "row must be an index, int64 .* got list"),
        (3, TypeError, "got int"),
        ((torch.tensor([1]), torch.tensor([True, False])), ValueError, r"shape \[1\] .* got \[2\]"),
    ],
)
def test_batch_refuses_rows(indices, kind, message) -> None:
    with pytest.raises(kind, match=f"batch: .*{message}"):
        data.batch((torch.zeros(4, 1), torch.zeros(4)), indices)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda(sample: data.Dataset) -> None:
    there = data.Dataset(*(part.cuda() for part in sample))
    indices = data.epoch_indices(random.key(0).cuda(), 1000, 300)
    assert torch.equal(indices.index.cpu(), data.epoch_indices(random.key(0), 1000, 300).index)
    for row in rows(indices):
        batch = images_of(there, row)
        assert {part.device.type for part in batch} == {"cuda"}
        on_cpu = images_of(sample, data.Indices(row.index.cpu(), row.mask.cpu()))
        torch.testing.assert_close(
            batch.x.cpu(), on_cpu.x, rtol=2e-7, atol=0
        )  # x · (1 / 255) there
