"""Random nets of sequences, as lists of layers that hypothesis draws and prints."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad_and_value

Layer = tuple[Any, ...]  # a name and options
Weight = Callable[..., Tensor]  # (*shape) -> the next parameter
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "gate": lambda x: torch.sigmoid(x[..., ::2]) * x[..., 1::2] if x.shape[2] % 2 == 0 else x,
    "glu": lambda x: F.glu(x, -1) if x.shape[2] % 2 == 0 else x,
    "chunks": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "softmax": lambda x: F.softmax(x, -1),
    "softmax of tokens": lambda x: F.log_softmax(x, 1),
    "transposed": lambda x: x.transpose(1, 2),
    "without mean": lambda x: x - x.mean(1, keepdim=True),
    "variance": lambda x: x / (1 + x.var(2, keepdim=True)) if x.shape[2] > 1 else x,
    "rms norm": lambda x: F.rms_norm(x, x.shape[2:], eps=1e-3),
    "correlation": lambda x: x @ x.transpose(1, 2) / x.shape[2],
    "covariance": lambda x: x.mT @ x / x.shape[1],
    "largest": lambda x: x - x.amax(1, keepdim=True),
    "first token": lambda x: x + x[:, :1],
    "last token": lambda x: x * x[:, -1].unsqueeze(1),
    "split": lambda x: torch.cat(x.split([1, x.shape[1] - 1], 1)[::-1], 1),
    "centred": lambda x: x - x.mean(0),
    "images turned": lambda x: x + x.flip(0),
    "causal": lambda x: x * torch.ones(x.shape[1:], dtype=x.dtype).tril(),
}


class Net(NamedTuple):
    """A net, its batch, and the numbers of which its parameters are made."""

    shape: tuple[int, int, int]
    layers: list[Layer]
    seed: int


def problem(net: Net) -> tuple[Any, ...]:
    """Return parameters and sequences, and a target."""
    generator = torch.Generator().manual_seed(net.seed)
    params: dict[str, Tensor] = {}

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def weight(*shape: int) -> Tensor:
        params[str(len(params))] = new(*shape)
        return params[str(len(params) - 1)]

    x = new(*net.shape)
    return (params, x), new(*apply(net, x, weight).shape)


def loss_of(net: Net) -> Callable[..., Any]:
    """Return ((params, sequences), target) -> the gradients, the loss and the activations."""

    def loss(variables: Any, target: Tensor) -> Any:
        params, x = variables
        weights = iter(params.values())
        out = apply(net, x, lambda *shape: next(weights))
        return (out - target).square().mean(), out

    return grad_and_value(loss, has_aux=True)


def apply(net: Net, x: Tensor, weight: Weight) -> Tensor:
    """Return the activations of a linear layer, and the layers after it."""
    past: list[Tensor] = []
    for layer in [("linear", 6, True), *net.layers]:
        past.append(x)
        x = _layer(layer, x, weight, past)
    return x


def _layer(layer: Layer, x: Tensor, weight: Weight, past: list[Tensor]) -> Tensor:
    name, *options = layer
    features = x.shape[2]
    if name == "linear":
        outputs, bias = options
        w = weight(outputs, features) / features**0.5
        return F.linear(x, w, weight(outputs) if bias else None)
    if name == "attention":
        return _attention(x, weight, *options)
    if name == "layer norm":
        return F.layer_norm(x, (features,), weight(features), weight(features))
    if name == "positions":
        return x + weight(*x.shape[1:])
    if name == "residual":
        same = [y for y in past[:-1] if y.shape == x.shape]
        return x + same[0] if same else x + x.tanh()
    return FUNCTIONS[name](x)


def _attention(x: Tensor, weight: Weight, heads: int, size: int, causal: bool) -> Tensor:
    images, tokens, features = x.shape
    w = weight(3 * heads * size, features) / features**0.5
    q, k, v = F.linear(x, w).view(images, tokens, 3, heads, size).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) / size**0.5
    if causal:
        later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    out = torch.softmax(scores, -1) @ v
    return out.transpose(1, 2).reshape(images, tokens, heads * size)


linears = st.tuples(st.just("linear"), st.integers(1, 40), st.booleans())
attentions = st.tuples(st.just("attention"), st.integers(1, 4), st.integers(1, 9), st.booleans())
others = st.sampled_from([*FUNCTIONS, "layer norm", "positions", "residual"]).map(lambda z: (z,))
batches = st.sampled_from([2, 10, 17, 33])


def nets(most: int = 8) -> st.SearchStrategy[Net]:
    """Draw nets of up to `most` layers."""
    layers = st.lists(st.one_of(linears, attentions, others, others), min_size=1, max_size=most)
    shapes = st.tuples(batches, st.integers(2, 24), st.integers(2, 32))
    return st.builds(Net, shapes, layers, st.integers(0, 99))
