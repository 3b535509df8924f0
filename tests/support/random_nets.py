"""Random convolutional nets, as lists of layers that hypothesis draws and prints."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad_and_value

from fdl.random import key, split, uniform

Layer = tuple[Any, ...]  # a name and options
Weight = Callable[..., Tensor]  # (*shape) -> the next parameter
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "leaky relu": lambda x: F.leaky_relu(x, 0.1),
    "elu": F.elu,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "relu6": F.relu6,
    "where": lambda x: torch.where(x > 0.1, x, x * 0.3 - 1),
    "where not": lambda x: torch.where(~((x > 0.1) & (x < 1)), 0.5, x * x),
    "clamp": lambda x: x.clamp(-0.7, 0.9),
    "clamp_min": lambda x: x.clamp(min=-0.2),
    "square": lambda x: x**2,
    "power": lambda x: (x.abs() + 0.1) ** 1.5,
    "root": lambda x: (x.abs() + 0.1).sqrt(),
    "log": lambda x: torch.log1p(x.abs()),
    "quotient": lambda x: x / (1 + x.abs()),
    "alpha": lambda x: torch.add(x, torch.sigmoid(x), alpha=0.5),
    "subtracted": lambda x: torch.sub(1, x, alpha=2),
    "rounded": lambda x: torch.div(x, 0.3, rounding_mode="floor") + x,
    "in float32": lambda x: x.float().sigmoid().to(x.dtype) + x,
    "softmax": lambda x: F.softmax(x, 1),
    "signs": lambda x: x.sign() * x,
}
MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "cat": lambda x: torch.cat([x, torch.tanh(x)], 1),
    "cat of rows": lambda x: torch.cat([x, x.flip(2), -x], 2),
    "channels": lambda x: x[:, ::2] if x.shape[1] > 1 else x,
    "crop": lambda x: x[..., 1:-1] if x.shape[-1] > 3 else x,
    "strided rows": lambda x: x[:, :, 1::2] if x.shape[2] > 2 else x,
    "swapped": lambda x: x.transpose(1, -1) if x.shape[-1] <= 8 else x,
    "folded": lambda x: x.reshape(x.shape[0], -1, 1) if x.ndim == 3 else x.flatten(2).unsqueeze(2),
    "chunks": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "padded": lambda x: F.pad(x, (1, 2)),
    "excited": lambda x: x * torch.sigmoid(x.mean(tuple(range(2, x.ndim)), keepdim=True)),
    "rows' means": lambda x: x - x.mean(-1, keepdim=True),
    "centred": lambda x: x - x.mean(0),
    "centred in all": lambda x: x - x.mean(),
    "channel norm": lambda x: x / (1 + x.square().sum(1, keepdim=True)),
    "scaled by images": lambda x: x / (1 + x.detach().abs().amax(tuple(range(1, x.ndim)), True)),
    "images turned": lambda x: x + x.flip(0),
    "larger": lambda x: torch.maximum(x, x.roll(1, 1)),
    "frozen": lambda x: x + x.detach() * 0.1,
}


class Net(NamedTuple):
    """A net, its batch, and the numbers of which its parameters are made."""

    shape: tuple[int, ...]
    layers: list[Layer]
    seed: int

    def used(self) -> list[str]:
        """List the layers, without those for which the activations are too small or too large."""
        names: list[str] = []
        _run(self, names)
        return names


def problem(net: Net) -> tuple[Any, ...]:
    """Return parameters and images, a target, and a key."""
    return _run(net, [])


def _run(net: Net, names: list[str]) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(net.seed)
    params: dict[str, Tensor] = {}

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def weight(*shape: int) -> Tensor:
        params[str(len(params))] = new(*shape)
        return params[str(len(params) - 1)]

    x = new(*net.shape)
    out = apply(net, x, weight, key(net.seed), names)
    return (params, x), new(*out.shape), key(net.seed)


def loss_of(net: Net) -> Callable[..., Any]:
    """Return ((params, images), target, key) -> the gradients, the loss and the activations."""

    def loss(variables: Any, target: Tensor, key: Tensor) -> Any:
        params, x = variables
        weights = iter(params.values())
        out = apply(net, x, lambda *shape: next(weights), key)
        return (out - target).square().mean(), out

    return grad_and_value(loss, has_aux=True)


def apply(
    net: Net, x: Tensor, weight: Weight, key: Tensor, names: list[str] | None = None
) -> Tensor:
    """Return the activations after the last layer, and note the layers in `names`."""
    past: list[Tensor] = []
    for i, layer in enumerate(net.layers):
        y = _layer(layer, x, weight, split(key, len(net.layers))[i], past)
        if y is not None and 0 not in y.shape and y[0].numel() < 20_000:
            past.append(y)
            x = y
            if names is not None:
                names.append(layer[0])
    return x


def _layer(
    layer: Layer, x: Tensor, weight: Weight, key: Tensor, past: list[Tensor]
) -> Tensor | None:
    name, *options = layer
    n, channels = x.ndim - 2, x.shape[1]
    shape = (1, channels, *[1] * n)
    if name == "convolution":
        return _convolution(x, weight, *options)
    if name == "max pool":
        return _max_pool(x, *options)
    if name == "average pool":
        return _average_pool(x, *options)
    if name in ACTIVATIONS:
        return ACTIVATIONS[name](x)
    if name in MIXING:
        return MIXING[name](x)
    if name == "residual":
        same = [y for y in past[:-1] if y.shape == x.shape]
        return x + same[0] if same else x + x.tanh()
    if name == "batch norm":
        if x.numel() == channels:
            return None
        return F.batch_norm(x, None, None, weight(channels), weight(channels), training=True)
    if name == "group norm":
        return F.group_norm(x, 1, weight(channels), weight(channels))
    if name == "scale":
        return x * weight(*shape) + weight(channels, *[1] * n)
    if name == "scale of pixels":
        return x * weight(*x.shape[1:]) + weight(*x.shape[2:])
    if name == "dropout":
        return torch.where(uniform(key, x.shape) >= 0.3, x / 0.7, 0)
    raise ValueError(name)


def _convolution(
    x: Tensor, weight: Weight, outputs: int, kernel: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int], dilation: tuple[int, int], groups: int, bias: bool,
) -> Tensor | None:  # fmt: skip
    n, channels = x.ndim - 2, x.shape[1]
    kernel, stride, padding, dilation = (z[:n] for z in (kernel, stride, padding, dilation))
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if any(s > m + 2 * p for s, m, p in zip(spans, x.shape[2:], padding, strict=True)):
        return None
    groups = groups if channels % groups == 0 else 1
    outputs += -outputs % groups
    scale = (channels // groups * kernel[0] * kernel[-1]) ** 0.5
    w = weight(outputs, channels // groups, *kernel) / scale
    convolve = F.conv1d if n == 1 else F.conv2d
    return convolve(x, w, weight(outputs) if bias else None, stride, padding, dilation, groups)


def _max_pool(
    x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], pad: tuple[int, int],
    dilation: tuple[int, int], ceil: bool,
) -> Tensor | None:  # fmt: skip
    n = x.ndim - 2
    if any((k - 1) * d + 1 > m for k, d, m in zip(kernel, dilation, x.shape[2:], strict=False)):
        return None
    pad = tuple(min(p, k // 2) for p, k in zip(pad, kernel, strict=True))  # type: ignore[assignment]
    if n == 1:
        return F.max_pool1d(x, kernel[0], stride[0], pad[0], dilation[0], ceil)
    return F.max_pool2d(x, kernel, stride, pad, dilation, ceil)


def _average_pool(
    x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], pad: tuple[int, int],
    ceil: bool, count: bool, divisor: int | None,
) -> Tensor | None:  # fmt: skip
    n = x.ndim - 2
    if any(k > m for k, m in zip(kernel, x.shape[2:], strict=False)):
        return None
    pad = tuple(min(p, k // 2) for p, k in zip(pad, kernel, strict=True))  # type: ignore[assignment]
    if n == 1:
        return F.avg_pool1d(x, kernel[0], stride[0], pad[0], ceil, count)
    return F.avg_pool2d(x, kernel, stride, pad, ceil, count, divisor)


def pairs(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    number = st.integers(low, high)
    return st.one_of(number.map(lambda k: (k, k)), st.tuples(number, number))


convolutions = st.tuples(
    st.just("convolution"), st.integers(1, 40), pairs(1, 7), pairs(1, 3), pairs(0, 4), pairs(1, 2),
    st.sampled_from([1, 1, 1, 2, 3, 4]), st.booleans(),
)  # fmt: skip
pools = st.one_of(
    st.tuples(
        st.just("max pool"), pairs(1, 4), pairs(1, 3), pairs(0, 2), pairs(1, 2), st.booleans()
    ),
    st.tuples(
        st.just("average pool"), pairs(1, 4), pairs(1, 3), pairs(0, 2), st.booleans(),
        st.booleans(), st.sampled_from([None, None, 1, 3]),
    ),
)  # fmt: skip
OTHERS = ("residual", "batch norm", "group norm", "scale", "scale of pixels", "dropout")
others = st.sampled_from([*ACTIVATIONS, *MIXING, *OTHERS]).map(lambda name: (name,))
images = st.one_of(
    st.tuples(st.integers(1, 70), st.integers(1, 8), st.integers(5, 32), st.integers(5, 32)),
    st.tuples(st.integers(1, 70), st.integers(1, 40), st.integers(5, 12), st.integers(5, 12)),
    st.tuples(st.integers(1, 70), st.integers(1, 8), st.integers(5, 32)),
)


def nets(most: int = 8) -> st.SearchStrategy[Net]:
    """Draw nets of a convolution and up to `most` more layers."""
    layers = st.lists(st.one_of(convolutions, pools, others, others), min_size=1, max_size=most)
    both = st.tuples(st.lists(others, max_size=1), convolutions, layers)
    listed = both.map(lambda parts: [*parts[0], parts[1], *parts[2]])
    return st.builds(Net, images, listed, st.integers(0, 99))
