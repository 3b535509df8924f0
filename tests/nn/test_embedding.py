"""`nn.embedding`: indices, the row for padding, and what it refuses."""

import pytest
import torch
from torch.func import grad, jvp, vmap

import fdl
from fdl import nn, random
from tests.support.asserts import close, draw

KEY = random.key(4)


def test_starts_normal_with_a_row_of_zeros_for_padding():
    weight = nn.embedding(2000, 5, padding_idx=-1).init(KEY)["weight"]
    assert not weight[-1].any() and weight[:-1].all()
    assert (weight.mean().abs() < 0.04) and ((weight.std() - 1).abs() < 0.04)
    ones = nn.embedding(4, 2, padding_idx=1, weight_init=nn.init.ones).init(KEY)["weight"]
    assert ones.sum(1).tolist() == [2, 0, 2, 2]


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_of_every_shape_of_indices(shape, dtype):
    weight = draw(0, 5, 2)
    x = random.randint(KEY, shape, 0, 5).to(dtype)
    y = nn.embedding(5, 2).apply({"weight": weight}, x)
    assert y.shape == (*shape, 2)
    close(y, weight[x.long()])


def test_the_row_for_padding_is_constant_in_every_mode():
    layer, weight, x = nn.embedding(4, 3, padding_idx=2), draw(0, 4, 3), torch.tensor([2, 0, 2, 1])

    def f(weight):
        return layer.apply({"weight": weight}, x).sin().sum()

    gradient, tangent = grad(f)(weight), draw(1, 4, 3)
    assert not gradient[2].any() and not gradient[3].any() and gradient[:2].all()
    close(jvp(f, (weight,), (tangent,))[1], (gradient * tangent).sum())
    curved = grad(lambda w: (grad(f)(w) * tangent).sum())(weight)
    assert not curved[2].any() and curved[:2].all()


def test_under_vmap_over_tables_and_indices():
    layer, weights = nn.embedding(4, 3, padding_idx=0), draw(0, 5, 4, 3)
    x = random.randint(KEY, (5, 2), 0, 4)
    for dims in ((0, 0), (0, None), (None, 0)):
        rows = [(weights[i if dims[0] == 0 else 0], x[i if dims[1] == 0 else 0]) for i in range(5)]
        args = (weights if dims[0] == 0 else weights[0], x if dims[1] == 0 else x[0])

        def gradient(weight, x):
            return grad(lambda w: layer.apply({"weight": w}, x).sin().sum())(weight)

        close(vmap(gradient, dims)(*args), torch.stack([gradient(*row) for row in rows]))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: nn.embedding(0, 3), ValueError, r"embedding\(0, 3\): every size must be at least"),
        (lambda: nn.embedding(4, 3, padding_idx=4), ValueError, r"padding_idx .*\[-4, 4\), got 4"),
        (lambda: nn.embedding(4, 3, padding_idx=-5), ValueError, "got -5"),
        (lambda: nn.embedding(4, 3, padding_idx=1.0), TypeError, "an int or None, got a float"),
    ],
    ids=range(4),
)
def test_bad_arguments_raise_when_the_layer_is_built(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("x", [torch.ones(2), torch.tensor([True]), torch.ones(2).byte()])
def test_x_holds_indices(x, jitted, plain_backend):
    layer = nn.embedding(4, 3)
    apply = fdl.jit(layer.apply) if jitted else layer.apply
    with pytest.raises(TypeError, match=r"embedding\(4, 3\): x must hold indices, .*\.long\(\)"):
        apply(layer.init(KEY), x)
    with pytest.raises(TypeError, match=r"x must hold indices, .* got a list"):
        layer.apply(layer.init(KEY), [1])


@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_outside_the_table_raises(index):
    layer = nn.embedding(4, 3)
    text = rf"embedding\(4, 3\): every index must be in \[0, 4\), got .* from .*{index}"
    with pytest.raises(IndexError, match=text):
        layer.apply(layer.init(KEY), torch.tensor([0, index]))
