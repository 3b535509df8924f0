"""Group, instance and RMS norms: 16 bits, sizes of 0, third derivatives, and what they refuse."""

import pytest
import torch
from torch.func import grad

import fdl
from fdl import nn, random
from tests.support.asserts import close, draw

KEY = random.key(4)
NORMS = {
    "layer_norm": (nn.layer_norm(5), (2, 4, 5)),
    "rms_norm": (nn.rms_norm(5), (2, 4, 5)),
    "group_norm": (nn.group_norm(2, 4), (2, 4, 5)),
    "instance_norm": (nn.instance_norm(4), (2, 4, 5)),
    "instance_norm affine": (nn.instance_norm(4, affine=True), (2, 4, 5)),
}
each_norm = pytest.mark.parametrize(("layer", "shape"), NORMS.values(), ids=NORMS)


@each_norm
def test_starts_as_the_plain_norm(layer, shape):
    params = layer.init(KEY)
    assert {name: p.unique().tolist() for name, p in params.items()} == {
        name: [1] if name == "weight" else [0] for name in params
    }


@each_norm
def test_computes_in_32_bits_and_returns_the_dtype_of_x(layer, shape):
    params, x = layer.init(KEY), (3 * draw(0, *shape) + 20).bfloat16()
    y = layer.apply(params, x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer.apply(params, x.float()).bfloat16())


@each_norm
def test_a_batch_of_none(layer, shape):
    params, x = layer.init(KEY), torch.ones(0, *shape[1:])
    assert layer.apply(params, x).shape == x.shape
    gradient = grad(lambda params, x: layer.apply(params, x).sum(), (0, 1))(params, x)
    assert all(not leaf.any() for leaf in gradient[0].values())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nn.rms_norm(0), r"rms_norm\(0\): every size must be at least 1"),
        (lambda: nn.group_norm(0, 4), r"group_norm\(0, 4\): every size must be at least 1"),
        (lambda: nn.group_norm(3, 4), r"group_norm\(3, 4\): num_groups must divide num_channels"),
        (lambda: nn.instance_norm(-1), "every size must be at least 1"),
    ],
    ids=range(4),
)
def test_bad_arguments_raise_when_the_layer_is_built(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    ("layer", "shape", "text"),
    [
        (
            nn.rms_norm((4, 5)),
            (2, 5),
            r"rms_norm\(\(4, 5\)\): expected x \[..., 4, 5\], got \[2, 5",
        ),
        (nn.group_norm(2, 4), (2, 3, 4), r"group_norm\(2, 4\): expected x \[batch, 4, ...\], got"),
        (nn.group_norm(2, 4), (4,), r"expected x \[batch, 4, ...\], got \[4\]"),
        (nn.group_norm(4, 4), (2, 4), "needs several values per group, got x .2, 4."),
        (nn.instance_norm(4), (2, 4, 1), r"instance_norm\(4\): needs several values per group"),
    ],
    ids=range(5),
)
def test_a_bad_x_names_the_layer(layer, shape, text, jitted, plain_backend):
    apply = fdl.jit(layer.apply) if jitted else layer.apply
    with pytest.raises(ValueError, match=text):
        apply(layer.init(KEY), torch.ones(shape))


@each_norm
def test_integers_and_other_shapes_of_parameters_are_refused(layer, shape):
    params = layer.init(KEY)
    with pytest.raises(TypeError, match="x must be floating"):
        layer.apply(params, torch.ones(shape).long())
    if params:
        with pytest.raises(ValueError, match=r"params\['weight'\] of shape .* got \[7\]"):
            layer.apply({**params, "weight": torch.ones(7)}, torch.ones(shape))


def test_rms_norm_takes_the_epsilon_of_its_dtype():
    tiny = torch.full((3,), 1e-20)
    for dtype in (torch.float32, torch.float64):
        x = tiny.to(dtype)
        expected = x / (x * x + torch.finfo(dtype).eps).sqrt()
        close(nn.rms_norm(3).apply({"weight": torch.ones(3, dtype=dtype)}, x), expected, rtol=1e-6)
