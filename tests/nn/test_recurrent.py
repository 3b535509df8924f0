"""Recurrent layers: dropout, sizes of 0, programs, refusals; equality is in test_twins.py."""

import pytest
import torch
from torch.func import grad, hessian, jvp, vmap

import fdl
from fdl import nn, random, tree
from tests.support.asserts import close, draw, equal_bits

KEY = random.key(4)
LAYERS = {"rnn": nn.rnn, "gru": nn.gru, "lstm": nn.lstm}
CELLS = {"rnn": nn.rnn_cell, "gru": nn.gru_cell, "lstm": nn.lstm_cell}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def double(model):
    return tree.cast(model.init(KEY), torch.float64)


@pytest.mark.curriculum("R1")
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_its_cell_in_a_loop(name):
    layer, cell = LAYERS[name](3, 4), CELLS[name](3, 4)
    params, x = double(layer), draw(0, 2, 5, 3)
    own = {path.removesuffix("_l0"): p for path, p in params.items()}
    state, outputs = None, []
    for row in x.unbind(1):
        state = cell.apply(own, row if state is None else (row, state))
        outputs.append(state[0] if name == "lstm" else state)
    last = tree.map(lambda part: part[None], state)
    close(layer.apply(params, x), (torch.stack(outputs, 1), last))
    zeros = torch.zeros(1, 2, 4).double()
    close(
        layer.apply(params, (x, (zeros, zeros) if name == "lstm" else zeros))[0],
        torch.stack(outputs, 1),
    )


@each_layer
def test_dropout_is_between_layers_and_from_the_key(make):
    two, x = make(3, 4, num_layers=2, dropout=0.5), draw(0, 2, 5, 3)
    params = double(two)
    below, above = (
        {path.replace(f"_l{i}", "_l0"): p for path, p in params.items() if f"_l{i}" in path}
        for i in (0, 1)
    )
    first, _ = make(3, 4).apply(below, x)
    kept = random.uniform(random.fold_in(KEY, 1), (5, 2, 4)) >= 0.5
    dropped = torch.where(kept.transpose(0, 1), first * 2, 0)
    expected, _ = make(4, 4).apply(above, dropped)
    close(two.apply(params, x, train=True, key=KEY)[0], expected)
    close(two.apply(params, x, key=KEY), make(3, 4, num_layers=2).apply(params, x), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"(rnn|gru|lstm)\(3, 4\) with train=True needs a key"):
        two.apply(params, x, train=True)


def test_a_key_is_used_by_dropout_between_layers_alone():
    assert nn.gru(3, 4, num_layers=2, dropout=0.1).uses_key
    assert not nn.gru(3, 4, num_layers=1, dropout=0.1).uses_key
    assert not nn.gru(3, 4, num_layers=2).uses_key
    one = nn.gru(3, 4, dropout=0.1)
    one.apply(one.init(KEY), torch.ones(2, 5, 3), train=True)


@each_layer
@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 1, 3), (3,), (2, 4, 5, 3)], ids=str)
def test_sizes_of_0_and_other_batches(make, shape):
    layer = make(3, 4, num_layers=2, bidirectional=True)
    params, x = double(layer), draw(0, *shape)
    if len(shape) == 1:
        with pytest.raises(ValueError, match=r"expected x \[batch, time, 3\], got \[3\]"):
            layer.apply(params, x)
        return
    y, state = layer.apply(params, x)
    assert y.shape == (*shape[:-1], 8)
    assert all(part.shape == (4, *shape[:-2], 4) for part in tree.leaves(state))
    if shape[-2] == 0:
        assert not any(part.any() for part in tree.leaves(state))
    if len(shape) == 4:
        close(y.flatten(0, 1), layer.apply(params, x.flatten(0, 1))[0])


@each_layer
def test_derivatives_of_second_order_and_forward_mode(make):
    layer = make(2, 2, num_layers=2)
    params, x, v = double(layer), draw(0, 1, 3, 2), draw(1, 1, 3, 2)

    def f(x):
        return layer.apply(params, x)[0].sin().sum()

    step = 1e-5
    difference = (f(x + step * v) - f(x - step * v)) / (2 * step)
    close(jvp(f, (x,), (v,))[1], difference, rtol=1e-8, atol=1e-9)
    product = torch.einsum("abcdef,def->abc", hessian(f)(x), v)
    difference = (grad(f)(x + step * v) - grad(f)(x - step * v)) / (2 * step)
    close(product, difference, rtol=1e-7, atol=1e-8)


@pytest.mark.slow
@each_layer
def test_one_program_of_a_loop_whatever_the_length(make):
    layer = make(3, 4, num_layers=2, bidirectional=True, dropout=0.3)
    params, x = double(layer), draw(0, 2, 7, 3)

    def loss(params, x):
        y, state = layer.apply(params, x, train=True, key=KEY)
        return y.sin().sum() + sum(part.cos().sum() for part in tree.leaves(state))

    gradient = grad(loss, (0, 1))
    close(fdl.jit(gradient, strict=True)(params, x), gradient(params, x))
    many = tree.map(lambda p: torch.stack([0.5 * p, p, 1.5 * p]), params)
    batched = vmap(gradient, (0, None))
    close(fdl.jit(batched, strict=True)(many, x), batched(many, x))


@each_layer
def test_in_16_bits_under_a_policy(make):
    layer, x = make(3, 4, num_layers=2), draw(0, 2, 5, 3).float()
    params = layer.init(KEY)
    y, state = nn.with_policy(layer).apply(params, x)
    assert {leaf.dtype for leaf in [y, *tree.leaves(state)]} == {torch.float32}
    close(y, layer.apply(params, x)[0], rtol=0.05, atol=0.05)


@each_layer
def test_autocast_keeps_the_dtype_of_the_state(make):
    layer, x = make(3, 4), draw(0, 2, 5, 3).float()
    params = layer.init(KEY)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer.apply(params, x)
    assert y.dtype == torch.float32
    close(y, layer.apply(params, x)[0], rtol=0.05, atol=0.05)


def test_in_sequential_the_outputs_go_on():
    net = nn.sequential(
        nn.embedding(9, 3), nn.gru(3, 4), lambda pair: pair[0][:, -1], nn.linear(4, 2)
    )
    params = net.init(KEY)
    assert net.apply(params, torch.zeros(2, 6, dtype=torch.int64)).shape == (2, 2)
    assert [*tree.flatten_dict(params)][1] == "1.weight_ih_l0"


@each_layer
def test_the_same_key_gives_the_same_parameters(make):
    first, second = make(3, 4, num_layers=2).init(KEY), make(3, 4, num_layers=2).init(KEY)
    assert all(equal_bits(first[path], second[path]) for path in first)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nn.gru(0, 4), r"gru\(0, 4\): every size must be at least 1"),
        (lambda: nn.lstm(3, 4, num_layers=0), r"lstm\(3, 4\): every size must be at least 1"),
        (lambda: nn.rnn(3, 4, nonlinearity="gelu"), "rnn: nonlinearity must be 'tanh' or .*'gelu'"),
        (lambda: nn.rnn_cell(3, 4, nonlinearity="gelu"), "rnn_cell: nonlinearity must"),
        (lambda: nn.gru(3, 4, dropout=1.0), r"gru\(3, 4\): dropout, the fraction .*, got 1.0"),
        (lambda: nn.gru_cell(3, -4), r"gru_cell\(3, -4\): every size must be at least 1"),
    ],
    ids=range(6),
)
def test_bad_arguments_raise_when_the_layer_is_built(make, text):
    with pytest.raises(ValueError, match=text):
        make()


X, STATE = torch.ones(2, 5, 3), torch.ones(1, 2, 4)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    ("layer", "x", "error", "text"),
    [
        (
            nn.gru(3, 4),
            X[..., :2],
            ValueError,
            r"gru\(3, 4\): expected x \[batch, time, 3\], got .2, 5",
        ),
        (nn.gru(3, 4), X.long(), TypeError, r"gru\(3, 4\): x must be floating"),
        (nn.gru(3, 4), X.double(), TypeError, r"gru\(3, 4\): x and params must have one dtype"),
        (nn.gru(3, 4), (X, STATE, STATE), TypeError, "a pair of it and the state, got 3 parts"),
        (nn.gru(3, 4), (X, (STATE, STATE)), TypeError, "the state must be h, got a tuple"),
        (nn.lstm(3, 4), (X, STATE), TypeError, "the state must be h and c, got a tensor"),
        (nn.lstm(3, 4), (X, (STATE, STATE[0])), ValueError, r"state c \[1, 2, 4\], got \[2, 4\]"),
        (nn.gru(3, 4), (X, STATE.double()), TypeError, "the state h must be a tensor of the dtype"),
        (
            nn.gru(3, 4, num_layers=2),
            (X, STATE),
            ValueError,
            r"the state h \[2, 2, 4\], got \[1, 2",
        ),
        (
            nn.gru_cell(3, 4),
            X[..., :2],
            ValueError,
            r"gru_cell\(3, 4\): expected x \[..., 3\], got",
        ),
        (
            nn.lstm_cell(3, 4),
            (X, STATE),
            TypeError,
            r"lstm_cell\(3, 4\): the state must be h and c",
        ),
        (nn.rnn_cell(3, 4), (X[0], STATE[0]), ValueError, r"the state h \[5, 4\], got \[2, 4\]"),
    ],
    ids=range(12),
)
def test_a_bad_x_names_the_layer(layer, x, error, text, jitted, plain_backend):
    apply = fdl.jit(layer.apply) if jitted else layer.apply
    with pytest.raises(error, match=text):
        apply(layer.init(KEY), x)


def test_a_missing_parameter_is_named():
    layer = nn.gru(3, 4, num_layers=2)
    params = {path: p for path, p in layer.init(KEY).items() if path != "weight_hh_l1"}
    with pytest.raises(
        ValueError, match=r"gru\(3, 4\): expected params\['weight_hh_l1'\] .*got none"
    ):
        layer.apply(params, X)
