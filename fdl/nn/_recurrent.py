"""Recurrent layers: cells over time, by `scan`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fdl import random
from fdl._compiler import scan
from fdl.nn._cells import (
    GRU,
    LSTM,
    Kind,
    Nonlinearity,
    State,
    as_torch,
    cell_shapes,
    checked_state,
    input_and_state,
    rnn_kind,
    uniform_init,
)
from fdl.nn._dropout import check_rate
from fdl.nn._dropout import dropout as dropout_layer
from fdl.nn._helpers import check_dtype, check_key_given, check_sizes, get_param
from fdl.nn._model import Model
from fdl.tree import Tree


def rnn(
    input_size: int,
    hidden_size: int,
    *,
    num_layers: int = 1,
    nonlinearity: Nonlinearity = "tanh",
    bias: bool = True,
    dropout: float = 0.0,
    bidirectional: bool = False,
) -> Model:
    """Apply an Elman network to sequences; equals `torch.nn.RNN`, batch first.

    h' = tanh(W_ih x + b_ih + W_hh h + b_hh).

    x is `[batch, time, input_size]` or `[time, input_size]`, or a pair of it and the first state,
    `h0`; without one the first state is 0. The result is a pair: the outputs of the last layer,
    `[batch, time, directions · hidden_size]`, and the last state, `h_n`. States have the shape
    `[num_layers · directions, batch, hidden_size]`. Time is a `fdl.scan`, with derivatives of every
    order and under `vmap`.

    Args:
        input_size: number of features of x.
        hidden_size: number of features of the state.
        num_layers: number of layers; each reads the outputs of the one before.
        nonlinearity: `"tanh"` or `"relu"`.
        bias: if False, there are no biases.
        dropout: fraction of the outputs of each layer but the last that is dropped, in training.
            Layer i ≥ 1 reads what `nn.dropout(dropout)` with the key `fold_in(key, i)` returns for
            the outputs before it, `[time, batch, features]`.
        bidirectional: if True, each layer also reads backwards, with parameters of its own, and its
            outputs are those of both directions.

    Raises:
        TypeError: at apply, x or a state is not floating or has another dtype than the parameters.
        ValueError: a size below 1, an unknown `nonlinearity` or a `dropout` outside [0, 1); at
            apply, x, a state or a parameter of another shape, or dropout in training without a key.

    Source: Elman, Finding Structure in Time, 1990.

    >>> import torch
    >>> layer = rnn(3, 4, num_layers=2)
    >>> params = layer.init(random.key(0))
    >>> y, h = layer.apply(params, torch.ones(2, 5, 3))
    >>> y.shape, h.shape
    (torch.Size([2, 5, 4]), torch.Size([2, 2, 4]))
    """
    kind = rnn_kind("rnn", nonlinearity)
    return _layers(kind, input_size, hidden_size, num_layers, bias, dropout, bidirectional)


def gru(
    input_size: int,
    hidden_size: int,
    *,
    num_layers: int = 1,
    bias: bool = True,
    dropout: float = 0.0,
    bidirectional: bool = False,
) -> Model:
    """Apply gated recurrent units to sequences; equals `torch.nn.GRU`, batch first.

    r, z = σ(W_ih x + b_ih + W_hh h + b_hh), n = tanh(W_in x + b_in + r · (W_hn h + b_hn)),
    h' = (1 − z) · n + z · h.

    x is `[batch, time, input_size]` or `[time, input_size]`, or a pair of it and the first state,
    `h0`; without one the first state is 0. The result is a pair: the outputs of the last layer,
    `[batch, time, directions · hidden_size]`, and the last state, `h_n`. States have the shape
    `[num_layers · directions, batch, hidden_size]`. Time is a `fdl.scan`, with derivatives of every
    order and under `vmap`.

    Args:
        input_size: number of features of x.
        hidden_size: number of features of the state.
        num_layers: number of layers; each reads the outputs of the one before.
        bias: if False, there are no biases.
        dropout: fraction of the outputs of each layer but the last that is dropped, in training.
            Layer i ≥ 1 reads what `nn.dropout(dropout)` with the key `fold_in(key, i)` returns for
            the outputs before it, `[time, batch, features]`.
        bidirectional: if True, each layer also reads backwards, with parameters of its own, and its
            outputs are those of both directions.

    Raises:
        TypeError: at apply, x or a state is not floating or has another dtype than the parameters.
        ValueError: a size below 1 or a `dropout` outside [0, 1); at apply, x, a state
            or a parameter of another shape, or dropout in training without a key.

    Source: Cho et al., Learning Phrase Representations using RNN Encoder-Decoder for Statistical
    Machine Translation, 2014, https://arxiv.org/abs/1406.1078

    >>> import torch
    >>> layer = gru(3, 4, num_layers=2)
    >>> params = layer.init(random.key(0))
    >>> y, h = layer.apply(params, torch.ones(2, 5, 3))
    >>> y.shape, h.shape
    (torch.Size([2, 5, 4]), torch.Size([2, 2, 4]))
    """
    return _layers(GRU, input_size, hidden_size, num_layers, bias, dropout, bidirectional)


def lstm(
    input_size: int,
    hidden_size: int,
    *,
    num_layers: int = 1,
    bias: bool = True,
    dropout: float = 0.0,
    bidirectional: bool = False,
) -> Model:
    """Apply long short-term memory to sequences; equals `torch.nn.LSTM`, batch first.

    i, f, g, o = W_ih x + b_ih + W_hh h + b_hh, c' = σ(f) · c + σ(i) · tanh(g),
    h' = σ(o) · tanh(c').

    x is `[batch, time, input_size]` or `[time, input_size]`, or a pair of it and the first state,
    `(h0, c0)`; without one the first state is 0. The result is a pair: the outputs of the last
    layer, `[batch, time, directions · hidden_size]`, and the last state, `(h_n, c_n)`. States have
    the shape `[num_layers · directions, batch, hidden_size]`. Time is a `fdl.scan`, with
    derivatives of every order and under `vmap`.

    Args:
        input_size: number of features of x.
        hidden_size: number of features of the state.
        num_layers: number of layers; each reads the outputs of the one before.
        bias: if False, there are no biases.
        dropout: fraction of the outputs of each layer but the last that is dropped, in training.
            Layer i ≥ 1 reads what `nn.dropout(dropout)` with the key `fold_in(key, i)` returns for
            the outputs before it, `[time, batch, features]`.
        bidirectional: if True, each layer also reads backwards, with parameters of its own, and its
            outputs are those of both directions.

    Raises:
        TypeError: at apply, x or a state is not floating or has another dtype than the parameters.
        ValueError: a size below 1 or a `dropout` outside [0, 1); at apply, x, a state
            or a parameter of another shape, or dropout in training without a key.

    Source: Hochreiter and Schmidhuber, Long Short-Term Memory, 1997.

    >>> import torch
    >>> layer = lstm(3, 4, num_layers=2)
    >>> params = layer.init(random.key(0))
    >>> y, (h, c) = layer.apply(params, torch.ones(2, 5, 3))
    >>> y.shape, h.shape, c.shape
    (torch.Size([2, 5, 4]), torch.Size([2, 2, 4]), torch.Size([2, 2, 4]))
    """
    return _layers(LSTM, input_size, hidden_size, num_layers, bias, dropout, bidirectional)


def _layers(
    kind: Kind,
    inputs: int,
    hidden: int,
    num_layers: int,
    bias: bool,
    dropout: float,
    bidirectional: bool,
) -> Model:
    name = f"{kind.name}({inputs}, {hidden})"
    check_sizes(name, inputs, hidden, num_layers)
    check_rate(name, "dropout", dropout)
    drop, uses_key = dropout_layer(dropout), dropout > 0 and num_layers > 1
    directions = ("", "_reverse") if bidirectional else ("",)
    width = len(directions) * hidden
    cells = {  # by the ends of their parameters' names
        f"_l{i}{end}": cell_shapes(kind, width if i else inputs, hidden, bias)
        for i in range(num_layers)
        for end in directions
    }
    shapes = {f"{path}{end}": s for end, cell in cells.items() for path, s in cell.items()}

    def apply(params: Tree, x: Any, *, train: bool = False, key: Tensor | None = None) -> Any:
        x, state = input_and_state(name, x, inputs, "batch, time")
        values = {path: get_param(params, path, shape, name) for path, shape in shapes.items()}
        check_dtype(name, x, values["weight_ih_l0"])
        state = checked_state(kind, name, x, state, (len(cells), *x.shape[:-2], hidden))
        drop_key = check_key_given(name, key) if train and uses_key else None

        rows = x.movedim(-2, 0)  # [time, ..., features]
        ends = []
        for i in range(num_layers):
            if i and drop_key is not None:
                rows = drop.apply({}, rows, train=True, key=random.fold_in(drop_key, i))
            outputs = []
            for j, end in enumerate(directions):
                weights = [values[f"{path}_l{i}{end}"] for path in ("weight_ih", "weight_hh")]
                biases = [values.get(f"{path}_l{i}{end}") for path in ("bias_ih", "bias_hh")]
                first = tuple(part[i * len(directions) + j] for part in state)
                last, output = _over_time(kind, weights, biases, rows, first, reverse=j == 1)
                ends.append(last)
                outputs.append(output)
            rows = torch.cat(outputs, -1) if bidirectional else outputs[0]
        last_state = tuple(torch.stack(parts) for parts in zip(*ends, strict=True))
        return rows.movedim(0, -2), as_torch(last_state)

    return Model(uniform_init(shapes, hidden), apply, uses_key)


def _over_time(
    kind: Kind,
    weights: list[Tensor],
    biases: list[Tensor | None],
    rows: Tensor,
    first: State,
    reverse: bool,
) -> tuple[State, Tensor]:
    """Run a cell over `[time, ..., features]`; return its last state and all outputs."""

    def step(state: State, from_x: Tensor) -> tuple[State, Tensor]:
        state = kind.step(from_x, F.linear(state[0], weights[1], biases[1]), state)
        return state, state[0]

    return scan(step, first, F.linear(rows, weights[0], biases[0]), reverse=reverse)  # one product
