"""Layers against their torch.nn modules in float64: names, shapes, outputs, gradients."""

import itertools
import re

import pytest
import torch
from torch import nn as oo

import fdl
from fdl import nn, random, tree
from tests.support.asserts import close, draw, unchanged

KEY = random.key(3)


def same_as_module(layer, module, x):
    """The module's parameters fit the layer, and give its output and its gradients."""
    module = module.double()
    state = dict(module.named_parameters())
    params = tree.unflatten_dict({name: p.detach().clone() for name, p in state.items()})
    drawn = layer.init(KEY) if isinstance(layer, nn.Model) else {}
    assert tree.diff(drawn, tree.cast(params, torch.float32), values=False) == []
    apply = layer.apply if isinstance(layer, nn.Model) else lambda params, x: layer(x)

    weights = draw(9, *module(x).shape)
    x_oo = x.clone().requires_grad_()
    (module(x_oo) * weights).sum().backward()
    with unchanged(params, x):
        grads, x_grad = torch.func.grad(lambda p, x: (apply(p, x) * weights).sum(), (0, 1))(
            params, x
        )
        y = apply(params, x)
    close(y, module(x).detach())
    close(x_grad, x_oo.grad)
    close(tree.flatten_dict(grads), {name: p.grad for name, p in state.items()})


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(5, 3), (3,), (2, 5, 3)], ids=str)
def test_linear(shape, bias):
    same_as_module(nn.linear(3, 4, bias=bias), oo.Linear(3, 4, bias=bias), draw(0, *shape))


CONV = [
    options
    for options in itertools.product(
        [1, 2, (2, 1)], [0, 1, (1, 2), "same", "valid"], [1, (1, 2)], [1, 2], [True, False]
    )
    if not (options[1] == "same" and options[0] != 1)
]


@pytest.mark.curriculum("C1")
@pytest.mark.parametrize("options", CONV, ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_conv2d(options):
    names = ("stride", "padding", "dilation", "groups", "bias")
    kwargs = dict(zip(names, options, strict=True))
    layer, module = nn.conv2d(2, 4, (3, 2), **kwargs), oo.Conv2d(2, 4, (3, 2), **kwargs)
    same_as_module(layer, module, draw(0, 2, 2, 7, 6))


@pytest.mark.curriculum("C1")
def test_conv2d_halves_an_image():
    layer = nn.conv2d(1, 1, 3, padding=1, stride=2)
    same_as_module(layer, oo.Conv2d(1, 1, 3, padding=1, stride=2), draw(0, 1, 1, 8, 8))
    assert layer.apply(layer.init(KEY), torch.ones(1, 1, 8, 8)).shape == (1, 1, 4, 4)


@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(2, None, 0), (3, 1, 1), ((3, 2), (1, 2), (1, 0)), (2, 3, 1)],
    ids=["default", "overlap", "pairs", "gaps"],
)
def test_pools(kind, kernel, stride, padding):
    ours = {"max": nn.max_pool2d, "avg": nn.avg_pool2d}[kind](kernel, stride, padding)
    theirs = {"max": oo.MaxPool2d, "avg": oo.AvgPool2d}[kind](kernel, stride, padding)
    same_as_module(ours, theirs, draw(0, 2, 3, 7, 6))


@pytest.mark.parametrize("axes", [(1, -1), (0, 1), (2, 3)], ids=str)
def test_flatten(axes):
    same_as_module(nn.flatten(*axes), oo.Flatten(*axes), draw(0, 2, 3, 4, 5))
    assert nn.flatten()(torch.zeros(2, 3, 4)).shape == (2, 12)


@pytest.mark.parametrize("shape", [5, (5,), [4, 5]], ids=str)
def test_layer_norm(shape):
    module = oo.LayerNorm(shape, eps=0.1)
    with torch.no_grad():  # off their defaults of 1 and 0
        module.weight.copy_(draw(1, *module.weight.shape))
        module.bias.copy_(draw(2, *module.bias.shape))
    same_as_module(nn.layer_norm(shape, eps=0.1), module, draw(0, 3, 4, 5))
    assert nn.layer_norm(shape).init(KEY)["weight"].unique().tolist() == [1]
    assert nn.layer_norm(shape).init(KEY)["bias"].unique().tolist() == [0]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nn.linear(0, 1), r"linear\(0, 1\): every size must be at least 1"),
        (lambda: nn.linear(1, -1), "every size must be at least 1"),
        (
            lambda: nn.conv2d(1, 1, (3, 0)),
            r"conv2d\(1, 1, \(3, 0\)\): kernel_size must be .*, at least 1, got \(3, 0\)",
        ),
        (lambda: nn.conv2d(1, 1, 3, stride=0), "stride must be an int or .* at least 1, got 0"),
        (lambda: nn.conv2d(1, 1, 3, dilation=(1, 0)), r"dilation must be .* got \(1, 0\)"),
        (lambda: nn.conv2d(3, 4, 3, groups=2), "groups=2 must divide inputs="),
        (lambda: nn.conv2d(4, 3, 3, groups=2), "groups=2 must divide inputs="),
        (lambda: nn.conv2d(1, 1, 3, padding="sane"), "padding must be 'same', 'valid'.*'sane'"),
        (lambda: nn.conv2d(1, 1, 3, padding="same", stride=2), "padding='same' needs stride=1"),
        (lambda: nn.layer_norm((3, 0)), r"layer_norm\(\(3, 0\)\): every size"),
        (lambda: nn.dropout(1.0), r"rate, the fraction dropped, must be in \[0, 1\), got 1.0"),
        (lambda: nn.dropout(-0.1), "got -0.1"),
        (lambda: nn.dropout(float("nan")), "got nan"),
    ],
    ids=[
        *("no-inputs", "negative-outputs", "no-kernel", "no-stride", "no-dilation", "in-groups"),
        *("out-groups", "unknown-padding", "same-with-stride", "layer_norm", "rate-1"),
        *("rate-negative", "rate-nan"),
    ],
)
def test_bad_arguments_raise_when_the_layer_is_built(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nn.linear(None, 10), r"linear\(None, 10\)"),
        (lambda: nn.linear(4, 2.0), r"linear\(4, 2.0\)"),
        (lambda: nn.conv2d(None, 4, 3), r"conv2d\(None, 4, 3\)"),
        (lambda: nn.batch_norm(None), r"batch_norm\(None\)"),
        (lambda: nn.layer_norm(None), r"layer_norm\(None\)"),
        (lambda: nn.gru(None, 3), r"gru\(None, 3\)"),
        (lambda: nn.embedding("5", 3), r"embedding\(5, 3\)"),
        (lambda: nn.linear(4, True), r"linear\(4, True\)"),  # meant as bias=True
    ],
    ids=range(8),
)
def test_sizes_are_not_inferred(make, name):
    with pytest.raises(TypeError, match=f"{name}: every size must be an int, got .*to an example"):
        make()


@pytest.mark.parametrize(
    ("shape", "end"),
    [
        ((2, 5), "; the layer for this x has 5 inputs"),
        ((2, 3, 1), "; put nn.flatten() before the layer"),
        ((2, 4, 3, 4), "; the layer for this x has 4 inputs"),
        ((), ""),
    ],
    ids=str,
)
def test_linear_says_which_size_fits(shape, end):
    layer = nn.linear(3, 2)
    message = re.escape(f"linear(3, 2): expected x [..., 3], got {list(shape)}{end}") + "$"
    for apply in (layer.apply, torch.compile(layer.apply, backend="eager")):
        with pytest.raises(ValueError, match=message):
            apply(layer.init(KEY), torch.ones(shape))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: nn.max_pool2d(0), ValueError, "max_pool2d: kernel_size .* at least 1, got 0"),
        (lambda: nn.avg_pool2d((2, 0)), ValueError, r"avg_pool2d: kernel_size .* got \(2, 0\)"),
        (lambda: nn.max_pool2d(2, 0), ValueError, "max_pool2d: stride .* at least 1, got 0"),
        (lambda: nn.avg_pool2d(2, padding=-1), ValueError, "padding .* at least 0, got -1"),
        (lambda: nn.max_pool2d(2, padding=2), ValueError, "padding 2 is more than half the window"),
        (lambda: nn.max_pool2d(torch.ones(2, 3)), ValueError, r"got a tensor float32\[2, 3\]"),
        (lambda: nn.flatten(torch.ones(2)), TypeError, r"start .* an int, got a tensor .* makes a"),
        (lambda: nn.flatten(1, None), TypeError, "flatten: end must be an int, got a NoneType"),
        (lambda: nn.flatten(2, 1), ValueError, "end must not come before start, got start=2, end"),
        (lambda: nn.flatten(-1, -2), ValueError, "got start=-1, end=-2"),
    ],
    ids=range(10),
)
def test_pools_and_flatten_check_their_arguments_when_built(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    ("layer", "params", "text"),
    [
        (nn.linear(3, 4), {"weight": torch.ones(3, 4)}, r"'weight'\] of shape \[4, 3\], got \[3"),
        (nn.linear(3, 4), {"bias": torch.ones(4)}, r"params\['weight'\] of shape .* got none"),
        (nn.linear(3, 4), {"weight": torch.ones(4, 3)}, r"params\['bias'\] of shape \[4\], got no"),
        (nn.conv2d(3, 1, 2), {"weight": torch.ones(1, 3, 2)}, r"\[1, 3, 2, 2\], got \[1, 3, 2\]"),
        (nn.layer_norm(3), {"weight": torch.ones(4)}, r"layer_norm\(3\): .* \[3\], got \[4\]"),
    ],
    ids=["linear", "no-weight", "no-bias", "conv2d", "layer_norm"],
)
def test_parameters_of_another_shape_raise(layer, params, text):
    with pytest.raises(ValueError, match=text):
        layer.apply(params, torch.ones(2, 3, 3, 3))


# ------------------------------------------------------------------------------ dropout


@pytest.mark.curriculum("M3")
@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_the_mask_comes_from_the_key(rate):
    x = draw(0, 200, 100) + 3
    with unchanged(x, KEY):
        y = nn.dropout(rate).apply({}, x, train=True, key=KEY)
    kept = random.uniform(KEY, x.shape) >= rate
    close(y, torch.where(kept, x / (1 - rate), 0.0), rtol=0, atol=0)
    deviation = (rate / (1 - rate)) ** 0.5 * (x**2).mean().sqrt() / x.numel() ** 0.5
    assert (y.mean() - x.mean()).abs() < 4 * deviation
    assert y.dtype == x.dtype
    assert nn.dropout(rate).apply({}, x.bfloat16(), train=True, key=KEY).dtype == torch.bfloat16


def test_dropout_is_the_identity_in_evaluation():
    x = draw(0, 4)
    assert nn.dropout(0.5).apply({}, x) is x
    assert nn.dropout(0.5).apply({}, x, key=KEY) is x
    assert nn.dropout(0.0).apply({}, x, train=True) is x
    assert nn.dropout(0.5).init(KEY) == {}


@pytest.mark.curriculum("M3")
def test_dropout_under_vmap_over_keys_equals_the_loop():
    keys, x = random.split(KEY, 5), draw(0, 6, 7)

    def run(key):
        return nn.dropout(0.4).apply({}, x, train=True, key=key)

    masks = torch.vmap(run)(keys)
    close(masks, torch.stack([run(key) for key in keys]), rtol=0, atol=0)
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 5


@pytest.mark.curriculum("M3")
def test_dropout_without_a_key_names_the_fix():
    net = nn.sequential(body=nn.sequential(nn.relu, nn.dropout(0.5)))
    with pytest.raises(ValueError, match=r"pass key=fdl\.random\.key\(seed\) to apply") as error:
        net.apply({}, torch.ones(2), train=True)
    assert error.value.__notes__ == [
        "in layer '1' of sequential",
        "in layer 'body' of sequential",
    ]


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize(
    "layer",
    [nn.linear(8, 3), nn.conv2d(1, 2, 3), nn.layer_norm(8), nn.batch_norm(1), nn.dropout(0.5)],
    ids=["linear", "conv2d", "layer_norm", "batch_norm", "dropout"],
)
def test_integers_are_refused_with_what_converts_them(layer, dtype, jitted, plain_backend):
    x, key = torch.ones(4, 1, 8, 8).to(dtype), random.key(0)
    state = layer.init(key)
    args = state if isinstance(layer, nn.StatefulModel) else (state,)
    apply = lambda *args: layer.apply(*args, train=True, key=key)  # noqa: E731
    with pytest.raises(TypeError, match=r"x must be floating, got a tensor .*\.to_float"):
        (fdl.jit(apply) if jitted else apply)(*args, x)


def test_gelu_is_the_formula_wherever_a_number_stands():
    x = torch.linspace(-6, 6, 101)
    exact = x.double() * torch.distributions.Normal(0.0, 1.0).cdf(x.double())
    close(nn.gelu(x.double()), exact, atol=1e-12)
    alone = torch.stack([nn.gelu(number) for number in x])
    for ours in (nn.gelu(x), alone):
        close(ours.double(), exact, rtol=0, atol=5e-7)
    y = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    close(nn.gelu(x, "tanh"), y, rtol=0, atol=1e-6)
