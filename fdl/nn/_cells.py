"""Recurrent cells, and the parts that they share with the layers over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fdl import random
from fdl._checks import describe
from fdl.nn._helpers import check_dtype, check_sequence, check_sizes, get_param
from fdl.nn._model import Model
from fdl.nn.init import uniform
from fdl.tree import Tree

Nonlinearity = Literal["tanh", "relu"]
State = tuple[Tensor, ...]


def rnn_cell(
    input_size: int, hidden_size: int, *, nonlinearity: Nonlinearity = "tanh", bias: bool = True
) -> Model:
    """Compute one step of `rnn`; equals `torch.nn.RNNCell`.

    x is `[..., input_size]`, or a pair of it and the state, `h`; without one the state is 0. The
    result is the next state, `[..., hidden_size]`.

    Args:
        input_size: number of features of x.
        hidden_size: number of features of the state.
        nonlinearity: `"tanh"` or `"relu"`.
        bias: if False, there are no biases.

    Raises:
        TypeError: at apply, x or the state is not floating or has another dtype than the
            parameters.
        ValueError: a size below 1 or an unknown `nonlinearity`; at apply, x, the state or a
            parameter of another shape.

    >>> import torch
    >>> cell = rnn_cell(3, 4)
    >>> cell.apply(cell.init(random.key(0)), torch.ones(2, 3)).shape
    torch.Size([2, 4])
    """
    return _cell(rnn_kind("rnn_cell", nonlinearity), input_size, hidden_size, bias)


def gru_cell(input_size: int, hidden_size: int, *, bias: bool = True) -> Model:
    """Compute one step of `gru`; equals `torch.nn.GRUCell`.

    x is `[..., input_size]`, or a pair of it and the state, `h`; without one the state is 0. The
    result is the next state, `[..., hidden_size]`.

    Args:
        input_size: number of features of x.
        hidden_size: number of features of the state.
        bias: if False, there are no biases.

    Raises:
        TypeError: at apply, x or the state is not floating or has another dtype than the
            parameters.
        ValueError: a size below 1; at apply, x, the state or a parameter of another shape.

    >>> import torch
    >>> cell = gru_cell(3, 4)
    >>> cell.apply(cell.init(random.key(0)), torch.ones(2, 3)).shape
    torch.Size([2, 4])
    """
    return _cell(GRU, input_size, hidden_size, bias)


def lstm_cell(input_size: int, hidden_size: int, *, bias: bool = True) -> Model:
    """Compute one step of `lstm`; equals `torch.nn.LSTMCell`.

    x is `[..., input_size]`, or a pair of it and the state, `(h, c)`; without one the state is 0.
    The result is the next state, `(h, c)`, two tensors `[..., hidden_size]`.

    Args:
        input_size: number of features of x.
        hidden_size: number of features of the state.
        bias: if False, there are no biases.

    Raises:
        TypeError: at apply, x or the state is not floating or has another dtype than the
            parameters.
        ValueError: a size below 1; at apply, x, the state or a parameter of another shape.

    >>> import torch
    >>> cell = lstm_cell(3, 4)
    >>> h, c = cell.apply(cell.init(random.key(0)), torch.ones(2, 3))
    >>> h.shape, c.shape
    (torch.Size([2, 4]), torch.Size([2, 4]))
    """
    return _cell(LSTM, input_size, hidden_size, bias)


class Kind(NamedTuple):
    """The maths of one step; all weights of x, and all of the state, are products of their own."""

    name: str
    gates: int  # blocks of hidden_size rows in the weights
    states: tuple[str, ...]  # names of the parts of the state; the first is the output
    step: Callable[[Tensor, Tensor, State], State]  # (W_ih x + b_ih, W_hh h + b_hh, state) -> state


def rnn_kind(caller: str, nonlinearity: str) -> Kind:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"{caller}: nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    f = getattr(torch, nonlinearity)

    def step(from_x: Tensor, from_h: Tensor, state: State) -> State:
        return (f(from_x + from_h).to(state[0].dtype),)  # autocast computes products in 16 bits

    return Kind("rnn", 1, ("h",), step)


def _gru_step(from_x: Tensor, from_h: Tensor, state: State) -> State:
    (h,) = state
    reset_x, update_x, new_x = from_x.chunk(3, -1)
    reset_h, update_h, new_h = from_h.chunk(3, -1)
    new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
    return (new + torch.sigmoid(update_x + update_h) * (h - new),)


def _lstm_step(from_x: Tensor, from_h: Tensor, state: State) -> State:
    _, c = state
    enter, forget, new, out = (from_x + from_h).chunk(4, -1)
    c = torch.sigmoid(forget) * c + torch.sigmoid(enter) * torch.tanh(new)
    return torch.sigmoid(out) * torch.tanh(c), c


GRU = Kind("gru", 3, ("h",), _gru_step)
LSTM = Kind("lstm", 4, ("h", "c"), _lstm_step)


def cell_shapes(kind: Kind, inputs: int, hidden: int, bias: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a cell's parameters, in torch's order."""
    rows = kind.gates * hidden
    weights = {"weight_ih": (rows, inputs), "weight_hh": (rows, hidden)}
    return weights | ({"bias_ih": (rows,), "bias_hh": (rows,)} if bias else {})


def uniform_init(shapes: dict[str, tuple[int, ...]], hidden: int) -> Callable[[Tensor], Tree]:
    """Return an init that draws all parameters from U(±1/√hidden), as torch does."""
    draw = uniform(-(hidden**-0.5), hidden**-0.5)

    def init(key: Tensor) -> Tree:
        keys = random.split(key, len(shapes))
        return {
            name: draw(own, shape, torch.float32)
            for own, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    return init


def _cell(kind: Kind, inputs: int, hidden: int, bias: bool) -> Model:
    name = f"{kind.name}_cell({inputs}, {hidden})"
    check_sizes(name, inputs, hidden)
    shapes = cell_shapes(kind, inputs, hidden, bias)

    def apply(params: Tree, x: Any, *, train: bool = False, key: Tensor | None = None) -> Any:
        x, state = input_and_state(name, x, inputs, "...")
        values = {path: get_param(params, path, shape, name) for path, shape in shapes.items()}
        check_dtype(name, x, values["weight_ih"])
        state = checked_state(kind, name, x, state, (*x.shape[:-1], hidden))
        from_x = F.linear(x, values["weight_ih"], values.get("bias_ih"))
        from_h = F.linear(state[0], values["weight_hh"], values.get("bias_hh"))
        return as_torch(kind.step(from_x, from_h, state))

    return Model(uniform_init(shapes, hidden), apply, uses_key=False)


def input_and_state(name: str, x: Any, inputs: int, axes: str) -> tuple[Tensor, Any]:
    """Split what a recurrent layer is given into x and the state, None if there is none.

    Args:
        name: the layer's name, used in error messages.
        x: `[..., inputs]`, or a pair of it and the state.
        inputs: size of the last axis.
        axes: names of the axes before the last.
    """
    pair = x if isinstance(x, tuple | list) else (x, None)
    if len(pair) != 2:
        raise TypeError(
            f"{name}: x must be a tensor, or a pair of it and the state, got {len(pair)} parts"
        )
    check_sequence(name, pair[0], inputs, axes=axes)
    return pair[0], pair[1]


def checked_state(kind: Kind, name: str, x: Tensor, state: Any, shape: tuple[int, ...]) -> State:
    """Return the parts of a state, or zeros if it is None; raise an error that names a bad part.

    Args:
        kind: which parts a state has.
        name: the layer's name, used in error messages.
        x: the input, of the same dtype.
        state: a tensor, a tuple of tensors or None.
        shape: shape of each part.
    """
    if state is None:
        return tuple(x.new_zeros(shape) for _ in kind.states)
    parts = tuple(state) if isinstance(state, tuple | list) else (state,)
    if len(parts) != len(kind.states):
        raise TypeError(
            f"{name}: the state must be {' and '.join(kind.states)}, got {describe(state)}"
        )
    for part_name, part in zip(kind.states, parts, strict=True):
        if not isinstance(part, Tensor) or part.dtype != x.dtype:
            raise TypeError(
                f"{name}: the state {part_name} must be a tensor of the dtype of x, got "
                f"{describe(part)}, and x {describe(x)}"
            )
        if part.shape != shape:
            raise ValueError(
                f"{name}: expected the state {part_name} {list(shape)}, got {list(part.shape)}"
            )
    return parts


def as_torch(state: State) -> Any:
    """Return h alone, or the pair (h, c)."""
    return state if len(state) > 1 else state[0]
