"""Convolutions and their transposes against torch over all shapes, and what they refuse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn as oo

import fdl
from fdl import nn, random, tree
from tests.support.asserts import close, draw, result_or_none

KEY = random.key(4)
CONV = {1: nn.conv1d, 2: nn.conv2d, 3: nn.conv3d}
TRANSPOSE = {1: nn.conv_transpose1d, 2: nn.conv_transpose2d}
MODULES = {
    nn.conv1d: oo.Conv1d,
    nn.conv2d: oo.Conv2d,
    nn.conv3d: oo.Conv3d,
    nn.conv_transpose1d: oo.ConvTranspose1d,
    nn.conv_transpose2d: oo.ConvTranspose2d,
}


@st.composite
def cases(draws, functions):
    """A function, its arguments, and the shape of an input that may be too small."""
    axes = draws(st.sampled_from([*functions]))

    def sizes(low, high):
        each = st.integers(low, high)
        return draws(each | st.tuples(*[each] * axes))

    groups = draws(st.integers(1, 3))
    channels = [groups * draws(st.integers(1, 2)) for _ in range(2)]
    options = {
        "stride": sizes(1, 3),
        "padding": sizes(0, 2),
        "dilation": sizes(1, 2),
        "groups": groups,
        "bias": draws(st.booleans()),
    }
    batch = draws(st.sampled_from([(), (0,), (1,), (2,)]))
    image = [draws(st.integers(1, 6)) for _ in range(axes)]
    return functions[axes], (*channels, sizes(1, 4)), options, (*batch, channels[0], *image)


def check(function, args, options, shape):
    """The layer gives the module's output and gradients, or refuses an x that torch refuses."""
    layer, module = function(*args, **options), MODULES[function](*args, **options).double()
    params = {name: p.detach().clone() for name, p in module.named_parameters()}
    x = draw(0, *shape)
    leaf = x.clone().requires_grad_()
    y = result_or_none(module, leaf)
    if y is None or 0 in y.shape[-int(function.__name__[-2]) :]:
        with pytest.raises(ValueError, match=r"kernel|output of sizes"):
            layer.apply(params, x)
        return
    close(layer.apply(params, x), y.detach())
    weights = draw(1, *y.shape)
    (y * weights).sum().backward()
    grads = torch.func.grad(lambda p, x: (layer.apply(p, x) * weights).sum(), (0, 1))(params, x)
    close(grads, ({name: p.grad for name, p in module.named_parameters()}, leaf.grad))


@settings(max_examples=150, deadline=None)
@given(cases(CONV))
def test_conv_equals_the_module(case):
    check(*case)


@settings(max_examples=150, deadline=None)
@given(cases(TRANSPOSE), st.data())
def test_conv_transpose_equals_the_module(case, data):
    function, args, options, shape = case
    most = [options[name] for name in ("stride", "dilation")]
    least = max(min(n) if isinstance(n, tuple) else n for n in most)
    options["output_padding"] = data.draw(st.integers(0, least - 1))
    check(function, args, options, shape)


@pytest.mark.parametrize("axes", CONV)
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_padding_by_name(axes, padding):
    for kernel in (2, 3):
        check(CONV[axes], (2, 3, kernel), {"padding": padding, "dilation": 2}, (2, 2, *[5] * axes))


@pytest.mark.parametrize("function", MODULES, ids=lambda f: f.__name__)
def test_initializers_of_your_own(function):
    layer = function(2, 3, 2, weight_init=nn.init.ones, bias_init=nn.init.constant(2.0))
    params = layer.init(KEY)
    assert params["weight"].unique().tolist() == [1] and params["bias"].tolist() == [2.0] * 3


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: nn.conv1d(1, 1, (3, 3)),
            r"conv1d\(1, 1, \(3, 3\)\): kernel_size .* \(length,\), ",
        ),
        (
            lambda: nn.conv3d(1, 1, 3, stride=(1, 1)),
            r"stride .*\(depth, height, width\),.*\(1, 1\)",
        ),
        (lambda: nn.conv1d(1, 1, 3, padding=-1), "padding must be .* at least 0, got -1"),
        (lambda: nn.conv1d(1, 1, 3, padding="sane"), "padding must be 'same', 'valid'.*'sane'"),
        (lambda: nn.conv3d(1, 1, 3, padding="same", stride=(1, 2, 1)), "'same' needs stride=1"),
        (lambda: nn.conv_transpose1d(3, 4, 3, groups=2), "groups=2 must divide inputs=3"),
        (lambda: nn.conv_transpose2d(2, 2, 3, padding=-1), "padding must be .* got -1"),
        (
            lambda: nn.conv_transpose2d(2, 2, 3, stride=(2, 1), output_padding=1),
            r"conv_transpose2d\(2, 2, 3\): output_padding must be less than .* got 1 with stride",
        ),
        (lambda: nn.conv_transpose1d(0, 1, 3), "every size must be at least 1"),
        (lambda: nn.conv1d(1, 1, torch.ones(2)), r"got a tensor float32\[2\]"),
    ],
    ids=range(10),
)
def test_bad_arguments_raise_when_the_layer_is_built(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    ("layer", "x", "error", "text"),
    [
        (nn.conv1d(2, 3, 3), torch.ones(2), ValueError, r"expected x \[batch, 2, length\] or \[2,"),
        (nn.conv1d(2, 3, 3), torch.ones(1, 3, 9), ValueError, r"conv1d\(2, 3, 3\): .* \[1, 3, 9\]"),
        (nn.conv2d(2, 3, 3), torch.ones(1, 1, 2, 9, 9), ValueError, "expected x .*height, width"),
        (nn.conv2d(2, 3, 3), torch.ones(1, 2, 9, 2), ValueError, "is smaller than the kernel"),
        (nn.conv2d(2, 3, 3, padding="same"), torch.ones(1, 2, 9, 0), ValueError, "smaller than"),
        (nn.conv3d(2, 3, 3), torch.ones(2, 9, 9), ValueError, "depth, height, width"),
        (nn.conv_transpose2d(2, 3, 3), torch.ones(1, 2, 0, 3), ValueError, "an output of sizes"),
        (nn.conv_transpose1d(2, 3, 3), torch.ones(1, 3, 3), ValueError, r"\[batch, 2, length\]"),
        (
            nn.conv1d(2, 3, 3),
            torch.ones(1, 2, 9).double(),
            TypeError,
            r"conv1d\(2, 3, 3\): x and params must have one dtype, got for x a tensor float64.*32",
        ),
        (nn.linear(2, 3), torch.ones(2).half(), TypeError, r"linear\(2, 3\): x and params must"),
        (nn.conv_transpose1d(2, 3, 3), torch.ones(1, 2, 3).long(), TypeError, "must be floating"),
        (nn.conv1d(2, 3, 3), (torch.ones(1, 2, 9),), TypeError, "x must be a tensor, got a tuple"),
    ],
    ids=range(12),
)
def test_a_bad_x_names_the_layer(layer, x, error, text, jitted, plain_backend):
    apply = fdl.jit(layer.apply) if jitted else layer.apply
    with pytest.raises(error, match=text):
        apply(layer.init(KEY), x)


def test_autocast_converts_as_in_torch():
    layer = nn.conv1d(2, 3, 3)
    params, x = layer.init(KEY), torch.ones(1, 2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.apply(params, x).dtype == torch.bfloat16
        assert layer.apply(params, x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("function", MODULES, ids=lambda f: f.__name__)
def test_in_16_bits_under_a_policy(function):
    layer = nn.with_policy(function(2, 3, 2))
    axes = 2 if "2d" in function.__name__ else 3 if "3d" in function.__name__ else 1
    params, x = layer.init(KEY), draw(0, 2, 2, *[5] * axes).float()
    close(layer.apply(params, x), function(2, 3, 2).apply(params, x), rtol=0.05, atol=0.05)
    assert tree.diff(params, function(2, 3, 2).init(KEY)) == []
