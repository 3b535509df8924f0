"""`data.mixup` and `data.cutmix` against their formulas, and as functions of a key."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

import fdl
from fdl import data, losses, nn, optim, random
from fdl.data import Batch
from tests.support.asserts import close, draw, equal_bits, unchanged

KEY, N, CLASSES = random.key(5), 12, 4
LABELS = torch.arange(N) % CLASSES
WAYS = {
    name: functools.partial(getattr(data, name), alpha=0.7, classes=CLASSES)
    for name in ("mixup", "cutmix")
}
each_way = pytest.mark.parametrize("mix", WAYS.values(), ids=WAYS)


def images(seed=0, n=N):
    return draw(seed, n, 2, 6, 5)


def test_mixup_is_a_convex_combination_with_a_share_for_each_row():
    x, y = images(), F.one_hot(LABELS).double()
    with unchanged(x, LABELS):
        mixed = WAYS["mixup"](KEY, Batch(x, LABELS))
    share_key, partner_key = random.split(KEY)
    partner = random.permutation(partner_key, N)
    share = random.beta(share_key, 0.7, 0.7, (N,), torch.float64)
    for row in range(N):
        other, part = int(partner[row]), share[row]
        close(mixed.x[row], part * x[row] + (1 - part) * x[other])
        close(mixed.y[row], part * y[row] + (1 - part) * y[other])
    assert len(set(share.tolist())) == N and mixed.mask == ()


def test_cutmix_has_the_box_of_torchvision_and_labels_by_area():
    x, y = images(), F.one_hot(LABELS).double()
    mixed = WAYS["cutmix"](KEY, Batch(x, LABELS))
    share_key, partner_key, row_key, column_key = random.split(KEY, 4)
    partner = random.permutation(partner_key, N)
    share = random.beta(share_key, 0.7, 0.7, (N,), torch.float64)
    rows, columns = random.randint(row_key, (N,), 0, 6), random.randint(column_key, (N,), 0, 5)
    sizes = set()
    for row in range(N):
        half = 0.5 * (1 - share[row].item()) ** 0.5  # as `CutMix.make_params` in torchvision
        i, j, up, left = int(rows[row]), int(columns[row]), int(half * 6), int(half * 5)
        top, bottom, first, last = (
            max(i - up, 0),
            min(i + up, 6),
            max(j - left, 0),
            min(j + left, 5),
        )
        expected, other = x[row].clone(), int(partner[row])
        expected[:, top:bottom, first:last] = x[other, :, top:bottom, first:last]
        area = (bottom - top) * (last - first) / 30
        assert equal_bits(mixed.x[row], expected)
        close(mixed.y[row], (1 - area) * y[row] + area * y[other])
        sizes.add(area)
    assert len(sizes) > 3


@each_way
def test_padding_is_nobodys_partner(mix):
    x, mask = images(), torch.arange(N) < 7
    x[7:], labels = torch.nan, torch.where(mask, LABELS, -100)
    mixed = mix(KEY, Batch(x, labels, mask))
    assert torch.isfinite(mixed.x[:7]).all() and equal_bits(mixed.mask, mask)
    close(mixed.y[:7].sum(1), torch.ones(7).double())
    assert (mixed.y[:7].max(1).values < 1).any()


@each_way
def test_labels_may_be_mixed_before(mix):
    once = mix(KEY, Batch(images(), LABELS))
    twice = mix(random.key(6), once)
    close(twice.y.sum(1), torch.ones(N).double())
    hard = mix(KEY, Batch(images(), F.one_hot(LABELS).double()))
    assert equal_bits(hard.x, once.x) and equal_bits(hard.y, once.y)
    assert mix(KEY, Batch(images(n=0), LABELS[:0])).y.shape == (0, CLASSES)


@each_way
def test_bits_are_the_same_under_vmap_and_jit(mix, plain_backend):
    keys, x = random.split(KEY, 3), torch.stack([images(seed) for seed in range(3)])
    labels = LABELS.expand(3, N)
    batch = Batch(x, labels)
    each = [mix(key, Batch(x[i], labels[i])) for i, key in enumerate(keys)]
    for form in (vmap(mix), fdl.jit(vmap(mix))):
        mixed = form(keys, batch)
        for i, expected in enumerate(each):
            assert equal_bits(mixed.x[i], expected.x) and equal_bits(mixed.y[i], expected.y)
    assert vmap(mix)(keys, batch._replace(y=labels + 1)).y.isnan().any()  # where nothing can raise


def test_a_step_trains_on_mixed_batches(plain_backend):
    model = nn.sequential(nn.flatten(), nn.linear(60, CLASSES))
    opt = optim.sgd(0.05)
    state = fdl.TrainState.create(model, opt, key=KEY)
    step = fdl.train_step(fdl.supervised(model, losses.cross_entropy), opt)

    @fdl.jit
    def mixed_step(state, batch):
        key = random.fold_in(random.fold_in(state.key, state.step), 1)
        return step(state, WAYS["cutmix"](key, batch))

    for _ in range(20):
        state, found = mixed_step(state, Batch(images().float(), LABELS))
    assert found["loss"].value < 1.3


@pytest.mark.parametrize(
    ("batch", "options", "error", "message"),
    [
        (images(), {}, TypeError, "batch must be Batch"),
        (Batch(images(), {"a": LABELS}), {}, TypeError, "batch must be a Batch of two tensors"),
        (Batch(images().byte(), LABELS), {}, TypeError, "x must be floating, got a tensor uint8"),
        (Batch(images()[0], LABELS), {}, ValueError, "x must be .batch, channels"),
        (Batch(images(), LABELS[:3]), {}, ValueError, r"labels \[12\], or probabilities \[12, 4\]"),
        (Batch(images(), LABELS), {"alpha": 0.0}, ValueError, "must be positive, got 0.0"),
        (Batch(images(), LABELS), {"alpha": "1"}, TypeError, "alpha must be a number"),
        (Batch(images(), LABELS), {"classes": 3}, ValueError, "from 0 to classes - 1 = 2, got 3"),
        (Batch(images(), LABELS - 1), {}, ValueError, "from 0 to classes - 1 = 3, got -1; mask"),
        (Batch(images(), LABELS), {"classes": 2.0}, TypeError, "classes must be an int"),
    ],
)
@each_way
def test_errors_name_the_argument(mix, batch, options, error, message):
    with pytest.raises(error, match=f"{mix.func.__name__}: .*{message}"):
        mix(KEY, batch, **options)
