"""Layers against their torch.nn modules in float64: paths, initial laws, derivatives, training."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn as oo
from torch.func import grad, vmap

import fdl
from fdl import interop, nn, random, tree
from tests.support.asserts import close, draw, unchanged

KEY = random.key(5)
KEYS = torch.tensor([[True, True, False, True, False], [False, True, True, True, True]])
ADDED = torch.where(torch.arange(15).view(3, 5) % 4 == 1, -torch.inf, draw(3, 3, 5))
TOKENS = torch.tensor([[0, 3, 3, 1], [5, 0, 2, 3]])


class Twin(NamedTuple):
    layer: Any  # a model, or a function x -> y
    module: Callable[[], oo.Module]
    x: Any  # a tree of tensors
    call: Callable[[Any, Any], Any] = lambda module, x: module(x)


TWINS = {
    "conv1d": Twin(
        nn.conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
        lambda: oo.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
        draw(0, 2, 4, 9),
    ),
    "conv1d same": Twin(
        nn.conv1d(2, 3, 3, padding="same", dilation=2, bias=False),
        lambda: oo.Conv1d(2, 3, 3, padding="same", dilation=2, bias=False),
        draw(0, 2, 2, 7),
    ),
    "conv2d": Twin(
        nn.conv2d(4, 2, (3, 2), stride=(1, 2), padding=(0, 1), groups=2),
        lambda: oo.Conv2d(4, 2, (3, 2), stride=(1, 2), padding=(0, 1), groups=2),
        draw(0, 2, 4, 5, 6),
    ),
    "conv3d": Twin(
        nn.conv3d(2, 4, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 0), groups=2),
        lambda: oo.Conv3d(2, 4, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 0), groups=2),
        draw(0, 2, 2, 3, 5, 3),
    ),
    "conv_transpose1d": Twin(
        nn.conv_transpose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        lambda: oo.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        draw(0, 2, 4, 5),
    ),
    "conv_transpose2d": Twin(
        nn.conv_transpose2d(2, 3, (3, 2), stride=(2, 1), output_padding=(1, 0), dilation=(1, 2)),
        lambda: oo.ConvTranspose2d(
            2, 3, (3, 2), stride=(2, 1), output_padding=(1, 0), dilation=(1, 2)
        ),
        draw(0, 2, 2, 3, 4),
    ),
    "conv_transpose2d no bias": Twin(
        nn.conv_transpose2d(2, 3, 2, bias=False),
        lambda: oo.ConvTranspose2d(2, 3, 2, bias=False),
        draw(0, 2, 3, 4),  # without a batch
    ),
    "embedding": Twin(nn.embedding(6, 3), lambda: oo.Embedding(6, 3), TOKENS),
    "embedding padding": Twin(
        nn.embedding(6, 3, padding_idx=-3), lambda: oo.Embedding(6, 3, padding_idx=-3), TOKENS
    ),
    "group_norm": Twin(
        nn.group_norm(2, 4, eps=0.1), lambda: oo.GroupNorm(2, 4, eps=0.1), draw(0, 2, 4, 3)
    ),
    "group_norm 2 axes": Twin(nn.group_norm(1, 4), lambda: oo.GroupNorm(1, 4), draw(0, 2, 4)),
    "instance_norm": Twin(nn.instance_norm(3), lambda: oo.InstanceNorm1d(3), draw(0, 2, 3, 4)),
    "instance_norm affine": Twin(
        nn.instance_norm(3, eps=0.1, affine=True),
        lambda: oo.InstanceNorm2d(3, eps=0.1, affine=True),
        draw(0, 2, 3, 2, 2),
    ),
    "rms_norm": Twin(nn.rms_norm(3), lambda: oo.RMSNorm(3), draw(0, 2, 3)),
    "rms_norm 2 axes": Twin(
        nn.rms_norm((4, 3), eps=0.1), lambda: oo.RMSNorm((4, 3), eps=0.1), draw(0, 2, 4, 3)
    ),
    "max_pool1d": Twin(nn.max_pool1d(3, 2, 1), lambda: oo.MaxPool1d(3, 2, 1), draw(0, 2, 3, 7)),
    "avg_pool1d": Twin(nn.avg_pool1d(3, 2, 1), lambda: oo.AvgPool1d(3, 2, 1), draw(0, 2, 3, 7)),
    "adaptive_avg_pool1d": Twin(
        nn.adaptive_avg_pool1d(3), lambda: oo.AdaptiveAvgPool1d(3), draw(0, 2, 3, 7)
    ),
    "adaptive_avg_pool2d": Twin(
        nn.adaptive_avg_pool2d((3, 2)), lambda: oo.AdaptiveAvgPool2d((3, 2)), draw(0, 2, 3, 7, 5)
    ),
    "adaptive_max_pool2d": Twin(
        nn.adaptive_max_pool2d((3, 2)), lambda: oo.AdaptiveMaxPool2d((3, 2)), draw(0, 2, 3, 7, 5)
    ),
    "rnn": Twin(
        nn.rnn(3, 4, num_layers=2, bidirectional=True),
        lambda: oo.RNN(3, 4, num_layers=2, bidirectional=True, batch_first=True),
        draw(0, 2, 5, 3),
    ),
    "rnn relu, from a state": Twin(
        nn.rnn(3, 4, nonlinearity="relu"),
        lambda: oo.RNN(3, 4, nonlinearity="relu", batch_first=True),
        (draw(0, 2, 5, 3), draw(1, 1, 2, 4)),
        lambda module, x: module(*x),
    ),
    "gru": Twin(
        nn.gru(3, 4, num_layers=3),
        lambda: oo.GRU(3, 4, num_layers=3, batch_first=True),
        draw(0, 2, 5, 3),
    ),
    "gru bidirectional, without bias, from a state": Twin(
        nn.gru(3, 4, bias=False, bidirectional=True),
        lambda: oo.GRU(3, 4, bias=False, bidirectional=True, batch_first=True),
        (draw(0, 2, 5, 3), draw(1, 2, 2, 4)),
        lambda module, x: module(*x),
    ),
    "gru of one sequence": Twin(
        nn.gru(3, 4), lambda: oo.GRU(3, 4, batch_first=True), draw(0, 5, 3)
    ),
    "lstm": Twin(
        nn.lstm(3, 4, num_layers=2), lambda: oo.LSTM(3, 4, 2, batch_first=True), draw(0, 2, 5, 3)
    ),
    "lstm bidirectional, from a state": Twin(
        nn.lstm(3, 4, num_layers=2, bidirectional=True),
        lambda: oo.LSTM(3, 4, 2, bidirectional=True, batch_first=True),
        (draw(0, 2, 5, 3), (draw(1, 4, 2, 4), draw(2, 4, 2, 4))),
        lambda module, x: module(*x),
    ),
    "rnn_cell": Twin(nn.rnn_cell(3, 4), lambda: oo.RNNCell(3, 4), draw(0, 2, 3)),
    "rnn_cell relu": Twin(
        nn.rnn_cell(3, 4, nonlinearity="relu"),
        lambda: oo.RNNCell(3, 4, nonlinearity="relu"),
        (draw(0, 2, 3), draw(1, 2, 4)),
        lambda module, x: module(*x),
    ),
    "gru_cell": Twin(
        nn.gru_cell(3, 4, bias=False),
        lambda: oo.GRUCell(3, 4, bias=False),
        (draw(0, 2, 3), draw(1, 2, 4)),
        lambda module, x: module(*x),
    ),
    "lstm_cell": Twin(
        nn.lstm_cell(3, 4),
        lambda: oo.LSTMCell(3, 4),
        (draw(0, 2, 3), (draw(1, 2, 4), draw(2, 2, 4))),
        lambda module, x: module(*x),
    ),
    "lstm_cell from 0": Twin(nn.lstm_cell(3, 4), lambda: oo.LSTMCell(3, 4), draw(0, 2, 3)),
    "multihead_attention": Twin(
        nn.multihead_attention(6, 2),
        lambda: oo.MultiheadAttention(6, 2, batch_first=True),
        draw(0, 2, 4, 6),
        lambda module, x: module(x, x, x)[0],
    ),
    "multihead_attention causal, without bias": Twin(
        nn.multihead_attention(6, 3, bias=False, causal=True),
        lambda: oo.MultiheadAttention(6, 3, bias=False, batch_first=True),
        draw(0, 2, 4, 6),
        lambda module, x: module(x, x, x, attn_mask=~torch.ones(4, 4).tril().bool())[0],
    ),
    "multihead_attention across, with a mask of keys": Twin(
        nn.multihead_attention(6, 2),
        lambda: oo.MultiheadAttention(6, 2, batch_first=True),
        (draw(0, 2, 3, 6), draw(1, 2, 5, 6), draw(2, 2, 5, 6), KEYS[:, None, None]),
        lambda module, x: module(*x[:3], key_padding_mask=~x[3][:, 0, 0])[0],
    ),
    "multihead_attention with a mask that is added": Twin(
        nn.multihead_attention(6, 2),
        lambda: oo.MultiheadAttention(6, 2, batch_first=True),
        (draw(0, 2, 3, 6), draw(1, 2, 5, 6), draw(2, 2, 5, 6), ADDED),
        lambda module, x: module(*x[:3], attn_mask=x[3])[0],
    ),
    "multihead_attention of one sequence": Twin(
        nn.multihead_attention(6, 2),
        lambda: oo.MultiheadAttention(6, 2, batch_first=True),
        draw(0, 4, 6),
        lambda module, x: module(x, x, x)[0],
    ),
    "transformer_encoder_layer": Twin(
        nn.transformer_encoder_layer(6, 2, dim_feedforward=5, dropout=0.0),
        lambda: oo.TransformerEncoderLayer(6, 2, 5, dropout=0.0, batch_first=True),
        draw(0, 2, 4, 6),
    ),
    "transformer_encoder_layer norm_first, with a mask": Twin(
        nn.transformer_encoder_layer(
            6, 3, dim_feedforward=5, dropout=0.0, activation=nn.gelu, norm_first=True
        ),
        lambda: oo.TransformerEncoderLayer(
            6, 3, 5, dropout=0.0, activation="gelu", norm_first=True, batch_first=True
        ),
        (draw(0, 2, 5, 6), KEYS[:, None, None]),
        lambda module, x: (module(x[0], src_key_padding_mask=~x[1][:, 0, 0]), x[1]),
    ),
    "transformer_encoder_layer causal": Twin(
        nn.transformer_encoder_layer(
            6, 2, dim_feedforward=5, dropout=0.0, layer_norm_eps=0.1, causal=True
        ),
        lambda: oo.TransformerEncoderLayer(
            6, 2, 5, dropout=0.0, layer_norm_eps=0.1, batch_first=True
        ),
        draw(0, 2, 4, 6),
        lambda module, x: module(x, src_mask=~torch.ones(4, 4).tril().bool()),
    ),
}
each_twin = pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS)


def double(module: oo.Module) -> oo.Module:
    """Move the parameters off their defaults, such as the ones and zeros of norms."""
    module = module.double()
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.add_(0.2 * draw(i, *p.shape))
    return module


def params_of(module: oo.Module) -> Any:
    return tree.unflatten_dict(
        {path: p.detach().clone() for path, p in module.state_dict().items()}
    )


def init(layer: Any) -> Any:
    return layer.init(KEY) if isinstance(layer, nn.Model) else {}


def call(layer: Any, params: Any, x: Any) -> Any:
    return layer.apply(params, x) if isinstance(layer, nn.Model) else layer(x)


def floating(x: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree.leaves(x) if leaf.is_floating_point()]


def with_floating(x: Any, floats: list[torch.Tensor]) -> Any:
    rest = iter(floats)
    return tree.map(lambda leaf: next(rest) if leaf.is_floating_point() else leaf, x)


def number(y: Any) -> torch.Tensor:
    """One number that depends on every value of a result."""
    leaves = [leaf for leaf in pytree.tree_leaves(y) if leaf.is_floating_point()]
    weights = [draw(i, *leaf.shape).to(leaf.dtype) for i, leaf in enumerate(leaves)]
    return sum((leaf * w).sin().mean() for leaf, w in zip(leaves, weights, strict=True))


def loss_of(twin: Twin) -> Callable[[Any], torch.Tensor]:
    """The twin's layer as a function of its parameters and floating inputs."""
    return lambda state: number(call(twin.layer, state[0], with_floating(twin.x, state[1])))


@functools.cache
def trained(name: str) -> tuple[Any, Any, Any]:
    """The start, the first gradients and the end of 50 steps of the torch module and its input."""
    twin = TWINS[name]
    module = double(twin.module())
    start = (params_of(module), floating(twin.x))
    floats = [leaf.clone().requires_grad_() for leaf in start[1]]
    optimizer = torch.optim.SGD([*module.parameters(), *floats], lr=0.02, momentum=0.9)
    for step in range(50):
        optimizer.zero_grad()
        number(twin.call(module, with_floating(twin.x, floats))).backward()
        if not step:
            grads = {path: p.grad.clone() for path, p in module.named_parameters()}
            first = (tree.unflatten_dict(grads), [leaf.grad.clone() for leaf in floats])
        optimizer.step()
    return start, first, (params_of(module), [leaf.detach() for leaf in floats])


@each_twin
def test_paths_shapes_and_order_are_those_of_the_module(twin):
    module, params = twin.module(), tree.flatten_dict(init(twin.layer))
    expected = {path: (p.shape, torch.float32) for path, p in module.state_dict().items()}
    assert {path: (p.shape, p.dtype) for path, p in params.items()} == expected
    assert list(params) == list(expected)


@each_twin
def test_weights_go_both_ways(twin):
    module = double(twin.module())
    y = twin.call(module, twin.x)
    params = params_of(module)
    with unchanged(params, twin.x):
        close(call(twin.layer, params, twin.x), tree.map(torch.detach, y))
    drawn = tree.cast(init(twin.layer), torch.float64)
    filled = interop.to_module(drawn, module)
    close(tree.map(torch.detach, twin.call(filled, twin.x)), call(twin.layer, drawn, twin.x))


def sgd(gradient: Callable[[Any], Any], carry: tuple[Any, Any], _: Any = ()) -> tuple[Any, Any]:
    """A step of gradient descent with momentum, for `scan`."""
    state, velocity = carry
    velocity = tree.map(lambda v, g: 0.9 * v + g, velocity, gradient(state))
    return (tree.map(lambda p, v: p - 0.02 * v, state, velocity), velocity), ()


@pytest.mark.parametrize("name", TWINS)
def test_gradients_and_50_steps_equal_those_of_the_module(name):
    state, first, end = trained(name)
    gradient = grad(loss_of(TWINS[name]))
    close(gradient(state), first)
    carry = (state, tree.map(torch.zeros_like, state))
    for _ in range(50):
        carry, _ = sgd(gradient, carry)
    close(carry[0], end, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", TWINS)
def test_50_steps_as_one_program(name, plain_backend):
    state, _, end = trained(name)
    step = functools.partial(sgd, grad(loss_of(TWINS[name])))
    program = fdl.jit(lambda carry: fdl.scan(step, carry, length=50)[0][0])
    close(program((state, tree.map(torch.zeros_like, state))), end, rtol=1e-10, atol=1e-10)


@each_twin
def test_vmap_over_parameters_alone_and_together(twin):
    params = tree.stack([params_of(double(twin.module())) for _ in range(3)])
    xs = tree.map(lambda leaf: torch.stack([leaf.roll(i, -1) for i in range(3)]), twin.x)
    apply = functools.partial(call, twin.layer)
    if not tree.leaves(params):
        expected = tree.stack([apply({}, row) for row in tree.unstack(xs)])
        close(vmap(functools.partial(apply, {}))(xs), expected)
        return
    for dims, inputs in (((0, None), twin.x), ((0, 0), xs)):
        rows = tree.unstack(params)
        each = [twin.x] * 3 if dims[1] is None else tree.unstack(xs)
        expected = tree.stack([apply(*row) for row in zip(rows, each, strict=True)])
        close(vmap(apply, dims)(params, inputs), expected)


PLAIN = [name for name in TWINS if " " not in name]
PROGRAMS = [PLAIN[i::3] for i in range(3)]  # one price for a third of the layers


@pytest.mark.slow
@pytest.mark.parametrize("names", PROGRAMS, ids=range(3))
def test_gradients_compiled_by_inductor_in_32_bits(names):
    states = {
        name: tree.cast(
            (params_of(double(TWINS[name].module())), floating(TWINS[name].x)), torch.float32
        )
        for name in names
    }

    def gradients(states):
        return {name: grad(loss_of(TWINS[name]))(state) for name, state in states.items()}

    close(fdl.jit(gradients, strict=True)(states), gradients(states), rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------ initial laws

BIG = {
    "conv1d": (nn.conv1d(8, 400, 3, groups=2), lambda: oo.Conv1d(8, 400, 3, groups=2)),
    "conv3d": (nn.conv3d(4, 300, 2), lambda: oo.Conv3d(4, 300, 2)),
    "conv_transpose1d": (
        nn.conv_transpose1d(20, 600, 3, groups=2),
        lambda: oo.ConvTranspose1d(20, 600, 3, groups=2),
    ),
    "conv_transpose2d": (nn.conv_transpose2d(2, 400, 2), lambda: oo.ConvTranspose2d(2, 400, 2)),
    "embedding": (nn.embedding(500, 4, padding_idx=3), lambda: oo.Embedding(500, 4, 3)),
    "rnn": (
        nn.rnn(5, 300, num_layers=2, bidirectional=True),
        lambda: oo.RNN(5, 300, 2, bidirectional=True),
    ),
    "gru": (nn.gru(100, 100), lambda: oo.GRU(100, 100)),
    "lstm": (nn.lstm(100, 100), lambda: oo.LSTM(100, 100)),
    "gru_cell": (nn.gru_cell(5, 100), lambda: oo.GRUCell(5, 100)),
    "transformer_encoder_layer": (
        nn.transformer_encoder_layer(300, 2, dim_feedforward=320),
        lambda: oo.TransformerEncoderLayer(300, 2, 320),
    ),
}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The greatest difference between two distributions of numbers (Kolmogorov and Smirnov)."""
    a, b = a.flatten().sort()[0], b.flatten().sort()[0]
    points = torch.cat([a, b])
    below = [torch.searchsorted(x, points, right=True) / len(x) for x in (a, b)]
    return float((below[0] - below[1]).abs().max())


@pytest.mark.parametrize(("layer", "module"), BIG.values(), ids=BIG)
def test_initial_parameters_have_the_law_of_the_module(layer, module):
    torch.manual_seed(0)
    drawn, expected = tree.flatten_dict(layer.init(KEY)), module().state_dict()
    for path, leaf in drawn.items():
        assert distance(leaf, expected[path].detach()) < 2 * (2 / leaf.numel()) ** 0.5, path
    firsts = [float(leaf.flatten()[0]) for leaf in drawn.values()]
    random_firsts = [first for first in firsts if first not in (0, 1)]
    assert len({*random_firsts}) == len(random_firsts)  # a key of its own for each
