"""to_sequential: torch's own layers with the values of a model; the oracle is `model.apply`."""

import functools

import pytest
import torch
import torch.nn.functional as F

import models
from fdl import interop, nn, random, transforms, tree
from tests.support.asserts import close, draw, unchanged

IMAGES, ROWS, SEQUENCES = draw(0, 2, 4, 6, 6), draw(1, 5, 4), draw(2, 2, 4, 7)


def ready(model):
    """Parameters and buffers in float64 that differ from the initial ones."""
    values = model.init(random.key(0))
    params, buffers = values if isinstance(model, nn.StatefulModel) else (values, None)
    params, buffers = tree.cast((params, buffers or {}), torch.float64)
    params = tree.map(lambda p: p + 0.1 * draw(p.numel(), *p.shape), params)
    if isinstance(model, nn.StatefulModel):
        buffers = tree.map(lambda b: b + (b.is_floating_point() and 0.3), buffers)
        return params, buffers
    return (params,)


LAYERS = {
    "linear": (nn.linear(4, 3), ROWS),
    "no bias": (nn.linear(4, 3, bias=False), ROWS),
    "conv1d": (nn.conv1d(4, 6, 3, padding="same", dilation=2, groups=2), SEQUENCES),
    "conv2d": (nn.conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), groups=2), IMAGES),
    "conv3d": (nn.conv3d(4, 2, 2, padding=1), IMAGES[..., None]),
    "transposed 1d": (nn.conv_transpose1d(4, 2, 3, stride=2, output_padding=1), SEQUENCES),
    "transposed 2d": (nn.conv_transpose2d(4, 6, (2, 3), dilation=(1, 2), groups=2), IMAGES),
    "batch_norm of rows": (nn.batch_norm(4, momentum=None), ROWS),
    "layer_norm": (nn.layer_norm((6, 6), eps=0.1), IMAGES),
    "rms_norm": (nn.rms_norm(4), ROWS),
    "rms_norm with eps": (nn.rms_norm(4, eps=0.1), ROWS),
    "group_norm": (nn.group_norm(2, 4, eps=0.1), IMAGES),
    "instance_norm": (nn.instance_norm(4), IMAGES),
    "instance_norm with weights": (nn.instance_norm(4, affine=True), SEQUENCES),
    "embedding": (nn.embedding(9, 3, padding_idx=-1), random.randint(random.key(0), (2, 3), 0, 9)),
    "max_pool1d": (nn.max_pool1d(3, 2, 1), SEQUENCES),
    "max_pool2d": (nn.max_pool2d((3, 2), padding=1), IMAGES),
    "avg_pool1d": (nn.avg_pool1d(2), SEQUENCES),
    "avg_pool2d": (nn.avg_pool2d(3, 1, 1), IMAGES),
    "adaptive_avg_pool1d": (nn.adaptive_avg_pool1d(3), SEQUENCES),
    "adaptive_avg_pool2d": (nn.adaptive_avg_pool2d((2, 3)), IMAGES),
    "adaptive_max_pool2d": (nn.adaptive_max_pool2d(2), IMAGES),
    "flatten": (nn.flatten(2), IMAGES),
    "rearrange": (nn.rearrange("b c (h p) w -> b h (c p w)", p=2), IMAGES),
    "reduce": (nn.reduce("b c h w -> b c", "mean"), IMAGES),
    "dropout": (nn.dropout(0.5), ROWS),
    "dropout2d": (nn.dropout2d(0.5), IMAGES),
    **{
        f.__name__: (f, ROWS)
        for f in (nn.gelu, nn.leaky_relu, nn.relu, nn.sigmoid, nn.silu, nn.softplus, nn.tanh)
    },
    "torch.relu": (torch.relu, ROWS),
    "F.tanh": (F.tanh, ROWS),
    "softmax": (functools.partial(nn.softmax, dim=-1), ROWS),
    "log_softmax": (functools.partial(nn.log_softmax, dim=0), ROWS),
    "gelu by tanh": (functools.partial(F.gelu, approximate="tanh"), ROWS),
}  # fmt: skip


@pytest.mark.parametrize(("layer", "x"), LAYERS.values(), ids=LAYERS)
def test_a_layer_equals_its_twin(layer, x):
    model = nn.sequential(layer)
    values = ready(model)
    with unchanged(*values):
        module = interop.to_sequential(model, *values).eval()
        y = model.apply(*values, x)
        close(module(x), y[0] if len(values) == 2 else y)
    assert type(module[0]).__module__.startswith(("torch.nn.modules.", "einops."))


NETS = {
    "norms between convolutions": (
        lambda: nn.sequential(
            nn.batch_norm(4),
            nn.conv2d(4, 6, 3),
            nn.sequential(bn=nn.batch_norm(6), act=nn.relu, pool=nn.max_pool2d(2)),
            nn.flatten(),
            nn.linear(24, 5),
            nn.batch_norm(5),
            nn.tanh,
            nn.linear(5, 2),
        ),
        IMAGES,
    ),
    "names": (lambda: nn.sequential(one=nn.linear(4, 3), act=nn.tanh, two=nn.linear(3, 1)), ROWS),
    "a norm before images are flattened": (
        lambda: nn.sequential(nn.batch_norm(4), nn.flatten(), nn.batch_norm(144)),
        IMAGES,
    ),
    "a norm alone": (lambda: nn.sequential(nn.tanh, nn.batch_norm(4)), SEQUENCES),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("make", "x"), NETS.values(), ids=NETS)
def test_a_network_equals_its_twin_in_values_gradients_and_statistics(make, x, train):
    model = make()
    values = ready(model)
    module = interop.to_sequential(model, *values).train(train)
    flat = tree.flatten_dict(values[0]) | tree.flatten_dict(values[1] if len(values) == 2 else {})
    assert module.state_dict().keys() == flat.keys()
    assert all(flat[p].data_ptr() != v.data_ptr() for p, v in module.state_dict().items())

    def loss(params):
        y = model.apply(params, *values[1:], x, train=train)
        y, buffers = y if len(values) == 2 else (y, {})
        return y.square().sum(), (y, buffers)

    grads, (_, (y, buffers)) = torch.func.grad_and_value(loss, has_aux=True)(values[0])
    found = module(x)
    close(found, y)
    found.square().sum().backward()
    close({name: p.grad for name, p in module.named_parameters()}, tree.flatten_dict(grads))
    close(dict(module.named_buffers()), tree.flatten_dict(buffers))


def test_a_model_of_the_course_is_a_sequential():
    model = models.lenet()
    params = model.init(random.key(0))
    x = draw(3, 2, 1, 28, 28).float()
    close(interop.to_sequential(model, params)(x), model.apply(params, x), rtol=1e-5, atol=1e-6)


def test_it_is_in_training_mode_and_draws_nothing_while_it_is_made():
    before = torch.get_rng_state()
    model = nn.sequential(nn.linear(4, 40), nn.dropout(0.5))
    module = interop.to_sequential(model, *ready(model))
    assert torch.equal(before, torch.get_rng_state())
    assert module.training and (module(ROWS) == 0).any()
    assert all(p.requires_grad and p.dtype == torch.float64 for p in module.parameters())


class Unhashable:
    __hash__ = None

    def __call__(self, x):
        return x


F64 = torch.float64
SINE = nn.Model(lambda key: {}, lambda params, x, *, train=False, key=None: x.sin())
LIGHT = nn.linear(4, 4)._replace(apply=transforms.checkpoint(nn.linear(4, 4).apply))


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (lambda x: 2 * x, "layer '1.inner' has no twin in torch.nn, got the function <lambda>"),
        (torch.square, "layer '1.inner' has no twin in torch.nn, got the function square"),
        (functools.partial(torch.clamp, min=0), "layer '1.inner' .* torch.nn, got a partial"),
        (functools.partial(F.softmax, dtype=F64), "layer '1.inner' .* torch.nn, got a partial"),
        (Unhashable(), "layer '1.inner' .* torch.nn, got an Unhashable"),
        (functools.partial(torch.relu, 3), "layer '1.inner' .* torch.nn, got a partial"),
        (nn.residual(nn.linear(4, 4)), "layer '1.inner' .* a model of nn.residual"),
        (nn.parallel(nn.linear(4, 4), nn.tanh), "layer '1.inner' .* a Model"),
        (nn.rnn(4, 4), "layer '1.inner' has no twin in torch.nn, got a Model"),
        (nn.with_policy(nn.linear(4, 4)), "layer '1.inner' .* a model of nn.with_policy"),
        (SINE, "layer '1.inner' has no twin in torch.nn, got a Model"),
        (LIGHT, "layer '1.inner' has no twin in torch.nn, got a Model"),
    ],
)
def test_a_layer_that_torch_does_not_have_is_named(layer, text):
    model = nn.sequential(nn.linear(4, 4), nn.sequential(inner=layer))
    with pytest.raises(TypeError, match=f"^to_sequential: {text}.*; interop.as_module makes"):
        interop.to_sequential(model, {})


NET = nn.sequential(nn.linear(4, 2))
NORM = nn.sequential(nn.batch_norm(4))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: interop.to_sequential(nn.linear(4, 2), {}), TypeError, "made by nn.sequential"),
        (lambda: interop.to_sequential(torch.tanh, {}), TypeError, "model must be a Model"),
        (lambda: interop.to_sequential(NORM, {}), ValueError, "a StatefulModel, got none"),
        (lambda: interop.to_sequential(NET, {}, {}), ValueError, "which has no buffers; leave"),
        (
            lambda: interop.to_sequential(NET, {"0": {"weight": torch.ones(2, 3)}}),
            ValueError,
            r"params do not match .*\n  0.bias: expected \[2\], got nothing\n  0.weight: ",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, error, text):
    with pytest.raises(error, match=f"^to_sequential: .*{text}"):
        call()
