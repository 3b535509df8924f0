"""`nn.batch_norm` and `models.lenet_bn` against torch's modules."""

import pytest
import torch
from torch import nn as oo
from torch.func import grad, vmap

import fdl
import models
from fdl import data, losses, nn, optim, random, tree
from tests.support import twins
from tests.support.asserts import close, draw, unchanged

KEY = random.key(6)
SHAPES = [(5, 3), (4, 3, 2), (4, 3, 2, 5), (2, 3, 2, 2, 2)]


def twin_of(shape, **options):
    kind = {2: oo.BatchNorm1d, 3: oo.BatchNorm1d, 4: oo.BatchNorm2d, 5: oo.BatchNorm3d}
    return kind[len(shape)](shape[1], **options).double()


def prepared(features, **options):
    layer = nn.batch_norm(features, **options)
    params, buffers = tree.cast(layer.init(KEY), torch.float64)
    params = tree.map(lambda p: p + draw(1, features), params)
    return layer, params, buffers


def values(layer_values):
    return {path: x.clone() for path, x in tree.flatten_dict(layer_values).items()}


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_module_over_several_batches(shape, momentum):
    layer, params, buffers = prepared(shape[1], momentum=momentum, eps=1e-3)
    twin = twin_of(shape, momentum=momentum, eps=1e-3)
    twin.load_state_dict(values(tree.merge(params, buffers)))
    for train in (True, True, False, True):
        x = draw(int(buffers["num_batches_tracked"]), *shape) * 3 + 1

        def loss(params, x, buffers=buffers, train=train):
            y, new = layer.apply(params, buffers, x, train=train)
            return y.sin().sum(), (y, new)

        with unchanged(params, buffers, x):
            (grads, dx), (y, buffers) = grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        twin.zero_grad()
        twin_x = x.clone().requires_grad_()
        expected = twin.train(train)(twin_x)
        expected.sin().sum().backward()
        close(y, expected)
        close(grads, {"weight": twin.weight.grad, "bias": twin.bias.grad})
        close(dx, twin_x.grad)
        close(buffers, dict(twin.named_buffers()))
    assert buffers["num_batches_tracked"] == 3 and buffers["running_var"].min() > 1.1


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_masked_rows_do_not_count(shape):
    layer, params, buffers = prepared(shape[1])
    x, mask = draw(0, *shape), torch.arange(shape[0]) < shape[0] - 1
    few = layer.apply(params, buffers, x[:-1], train=True)
    y, new = layer.apply(params, buffers, x, train=True, mask=mask)
    close((y[:-1], new), few)

    def total(x, mask):
        y, _ = layer.apply(params, buffers, x, train=True, mask=mask)
        return y[: shape[0] - 1].sin().sum()

    gradient = grad(total)(x, mask)
    close(gradient[:-1], grad(total)(x[:-1], None))
    assert not gradient[-1].any()
    everything = torch.ones(shape[0], dtype=torch.bool)
    close(
        layer.apply(params, buffers, x, train=True, mask=everything),
        layer.apply(params, buffers, x, train=True),
    )
    nothing = layer.apply(params, buffers, x, train=True, mask=~everything)
    assert all(leaf.isfinite().all() for leaf in tree.leaves(nothing))


def test_many_at_once_compiled():
    layer, params, buffers = prepared(3)
    x = draw(3, 2, 5, 3)

    def f(x):
        def loss(params):
            y, new = layer.apply(params, buffers, x, train=True)
            return y.sin().sum(), new

        return grad(loss, has_aux=True)(params)

    expected = tree.stack([f(row) for row in x])
    close(vmap(f)(x), expected)
    torch._dynamo.reset()
    close(torch.compile(vmap(f), backend="aot_eager", fullgraph=True)(x), expected)


def test_bfloat16_keeps_its_statistics_in_float32():
    layer = nn.batch_norm(2)
    params, buffers = layer.init(KEY)
    x = draw(0, 4096, 2).bfloat16() + 3
    y, new = layer.apply(params, buffers, x, train=True)
    assert y.dtype == torch.bfloat16 and new["running_mean"].dtype == torch.float32
    close(new["running_mean"], 0.1 * x.double().mean(0).float(), rtol=1e-5)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("counted", [0, 1])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 1)], ids=str)
def test_buffers_stay_where_fewer_than_two_values_count(shape, counted, momentum, plain_backend):
    layer, params, buffers = prepared(3, momentum=momentum)
    _, buffers = layer.apply(params, buffers, draw(1, *shape), train=True)
    mask = torch.arange(4) < counted

    def train(params, buffers, x, mask):
        return layer.apply(params, buffers, x, train=True, mask=mask)

    for apply in (train, fdl.jit(train)):
        y, new = apply(params, buffers, draw(2, *shape), mask)
        close(new, buffers, rtol=0, atol=0)
        assert y.isfinite().all()
    images = draw(3, 4, 3, 2)  # two values per feature in one row
    _, new = layer.apply(params, buffers, images, train=True, mask=torch.arange(4) < 1)
    assert new["num_batches_tracked"] == 2
    close(new, layer.apply(params, buffers, images[:1], train=True)[1])


def test_no_rows_leave_the_buffers():
    layer, params, buffers = prepared(3)
    y, new = layer.apply(params, buffers, draw(2, 4, 3)[:0], train=True)
    assert y.shape == (0, 3)
    close(new, buffers, rtol=0, atol=0)


def test_a_lone_last_example_does_not_shrink_the_variance():
    """Nine examples in batches of 4: the last batch has one."""
    layer, params, buffers = prepared(3)
    x = draw(4, 9, 3) * torch.tensor([1.6, 2.6, 1.8])
    for epoch in range(60):
        rows = data.epoch_indices(random.fold_in(KEY, epoch), 9, 4)
        for batch in data.batches((x, x), rows):
            _, buffers = layer.apply(params, buffers, batch.x, train=True, mask=batch.mask)
    assert buffers["num_batches_tracked"] == 120
    torch.testing.assert_close(buffers["running_var"], x.var(0), rtol=0.25, atol=0)


def test_errors():
    layer, params, buffers = prepared(3)
    with pytest.raises(ValueError, match=r"expected x \[batch, 3, \.\.\.\], got \[4, 2\]"):
        layer.apply(params, buffers, torch.ones(4, 2))
    with pytest.raises(ValueError, match="training needs more than one value per feature"):
        layer.apply(params, buffers, torch.ones(1, 3), train=True)
    with pytest.raises(ValueError, match=r"expected params\['running_var'\] of shape \[3\]"):
        layer.apply(params, {"running_mean": torch.ones(3)}, torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"batch_norm\(0\)"):
        nn.batch_norm(0)


# ------------------------------------------------------------------------------- in a model


def test_sequential_takes_layers_with_buffers():
    norm = nn.batch_norm(3)
    net = nn.sequential(nn.linear(4, 3), nn.sequential(norm, nn.tanh, nn.dropout(0.5)))
    assert isinstance(net, nn.StatefulModel)
    params, buffers = net.init(KEY)
    assert next(iter(tree.flatten_dict(buffers))) == "1.0.running_mean"
    x = draw(0, 6, 4).float()
    y, new = net.apply(params, buffers, x, train=True, key=KEY)
    h, expected = norm.apply(
        params["1"]["0"], buffers["1"]["0"], x @ params["0"]["weight"].T + params["0"]["bias"],
        train=True,
    )  # fmt: skip
    close(new, {"1": {"0": expected}}, rtol=1e-5)
    key = random.fold_in(random.fold_in(KEY, 1), 2)
    close(y, nn.dropout(0.5).apply({}, h.tanh(), train=True, key=key), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"buffers has entries \['7'\], but the layers are"):
        net.apply(params, {"7": {}}, x)


def test_a_mask_that_nobody_heeds_is_an_error():
    def count(params, buffers, x, *, train=False, key=None):
        return x, buffers

    counter = nn.StatefulModel(lambda key: ({}, {"calls": torch.tensor(0)}), count)
    batch = data.Batch(torch.ones(2, 1), torch.ones(2, 1), torch.tensor([True, False]))
    for model in (counter, nn.sequential(counter)):
        loss = fdl.supervised(model, losses.mse)
        params, buffers = model.init(KEY)
        with pytest.raises(
            ValueError, match=r"model takes none .* so padding would .* drop_last=True"
        ):
            loss(params, buffers, batch, train=True)
        loss(params, buffers, batch)  # in evaluation padding has no part in statistics
        loss(params, buffers, batch._replace(mask=()), train=True)


class LeNet(oo.Module):
    def __init__(self):
        super().__init__()
        self.conv = oo.Sequential(
            *(oo.Conv2d(1, 6, 5), oo.BatchNorm2d(6), oo.Sigmoid(), oo.MaxPool2d(2)),
            *(oo.Conv2d(6, 16, 5), oo.BatchNorm2d(16), oo.Sigmoid(), oo.MaxPool2d(2)),
        )
        self.fc = oo.Sequential(
            *(oo.Linear(256, 120), oo.BatchNorm1d(120), oo.Sigmoid()),
            *(oo.Linear(120, 84), oo.BatchNorm1d(84), oo.Sigmoid()),
            oo.Linear(84, 10),
        )

    def forward(self, x):
        return self.fc(self.conv(x).flatten(1))


@pytest.mark.slow
def test_lenet_bn_over_50_steps_and_evaluated():
    model, opt = models.lenet_bn(), optim.sgd(0.5)
    state = tree.cast(fdl.TrainState.create(model, opt, key=KEY), torch.float64)
    twin = LeNet().double()
    twin.load_state_dict(values(tree.merge(state.params, state.buffers)))
    names = [name for name, _ in twin.named_parameters()]
    assert names == list(tree.flatten_dict(state.params))
    x, y = draw(1, 60, 1, 28, 28), random.randint(KEY, (60,), 0, 10)
    rows = [data.batch((x, y), row) for row in zip(*data.epoch_indices(KEY, 60, 8), strict=True)]
    batches = (rows * 7)[:50]
    assert not rows[-1].mask.all()  # the twin gets the last batch without its padding

    step = fdl.train_step(fdl.supervised(model, losses.cross_entropy), opt)
    start = state.params
    for batch in batches:
        state, _ = step(state, batch)
    twins.train(
        twin,
        oo.functional.cross_entropy,
        torch.optim.SGD(twin.parameters(), 0.5),
        [(b.x[b.mask], b.y[b.mask]) for b in batches],
    )
    found, before = tree.flatten_dict(state.params), tree.flatten_dict(start)
    for path, p in twin.named_parameters():
        if path in ("conv.0.bias", "conv.4.bias", "fc.0.bias", "fc.3.bias"):
            continue  # a norm takes its input's mean away: their gradients are 0 but for rounding
        assert (p - before[path]).norm() > 1e-3
        close(found[path], p.detach(), rtol=1e-9, atol=1e-10)
    close(tree.flatten_dict(state.buffers), dict(twin.named_buffers()), rtol=1e-9)
    logits, _ = model.apply(state.params, state.buffers, x)
    close(logits, twin.eval()(x).detach(), rtol=1e-9, atol=1e-9)
