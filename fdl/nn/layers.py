"""Layers: each returns a `Model`, or a plain function `x -> y` where there is nothing to learn.

Images are `[batch, channel, height, width]`, weights `[out, in]` and `[out, in, height, width]`,
as everywhere in PyTorch. Activations are torch's own functions under their own names.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import gelu, leaky_relu, log_softmax, relu, silu, softmax, softplus

from fdl import random
from fdl._numerics import at_least_32_bits
from fdl.nn.init import Initializer, kaiming_uniform, ones, uniform, zeros
from fdl.nn.model import Model
from fdl.tree import Tree

sigmoid, tanh = torch.sigmoid, torch.tanh

Size = int | tuple[int, int]

__all__ = [
    "avg_pool2d",
    "conv2d",
    "dropout",
    "flatten",
    "gelu",
    "layer_norm",
    "leaky_relu",
    "linear",
    "log_softmax",
    "max_pool2d",
    "relu",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "tanh",
]


def _param(params: Tree, name: str, shape: tuple[int, ...], layer: str) -> Tensor:
    """Take one parameter, having compared its shape: torch's own message would name no path."""
    if name not in params:
        raise ValueError(f"{layer}: expected params[{name!r}] of shape {list(shape)}, got none")
    if params[name].shape != shape:
        raise ValueError(
            f"{layer}: expected params[{name!r}] of shape {list(shape)}, "
            f"got {list(params[name].shape)}"
        )
    return params[name]


def linear(
    inputs: int,
    outputs: int,
    *,
    bias: bool = True,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
) -> Model:
    """y = x Wᵀ + b, from `[..., inputs]` to `[..., outputs]`; equals `torch.nn.Linear`.

    Args:
        inputs: number of input features.
        outputs: number of output features.
        bias: learn b.
        weight_init: initializer of W `[outputs, inputs]`; U(±1/√inputs) as in `nn.Linear` if None.
        bias_init: initializer of b `[outputs]`; U(±1/√inputs) if None.

    Raises:
        ValueError: a size below 1; parameters of another shape (at apply).

    >>> layer = linear(784, 10, bias_init=zeros)
    >>> layer.apply(layer.init(random.key(0)), torch.ones(256, 784)).shape
    torch.Size([256, 10])
    """
    name = f"linear({inputs}, {outputs})"
    _check_sizes(name, inputs, outputs)
    bound = 1 / math.sqrt(inputs)
    return _affine(
        name,
        (outputs, inputs),
        weight_init or kaiming_uniform(a=math.sqrt(5)),
        (bias_init or uniform(-bound, bound)) if bias else None,
        F.linear,
    )


def conv2d(
    inputs: int,
    outputs: int,
    kernel_size: Size,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    bias: bool = True,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
) -> Model:
    """Cross-correlate `[batch, inputs, h, w]` with learned kernels; equals `torch.nn.Conv2d`.

    Args:
        inputs: number of input channels.
        outputs: number of output channels.
        kernel_size: height and width of the kernel, or one number for both; likewise below.
        stride: step between output pixels.
        padding: zeros around the image, or `"same"` or `"valid"`.
        dilation: distance between kernel elements.
        groups: channel groups that do not see each other; divides `inputs` and `outputs`. As in
            torch, an initializer that goes by the fan-out (Xavier's, `mode="fan_out"`) counts the
            outputs of all groups, though an input reaches only `outputs / groups` of them.
        bias: learn one number per output channel.
        weight_init: initializer of `[outputs, inputs / groups, *kernel_size]`; U(±1/√fan_in) if
            None.
        bias_init: initializer of `[outputs]`; U(±1/√fan_in) if None.

    Raises:
        ValueError: a size below 1 or not one or two numbers, `groups` that does not divide, a
            negative or unknown padding, `"same"` with a stride; parameters of another shape (at
            apply).

    >>> layer = conv2d(1, 1, 3, padding=1, stride=2)
    >>> layer.apply(layer.init(random.key(0)), torch.ones(1, 1, 8, 8)).shape
    torch.Size([1, 1, 4, 4])
    """
    name = f"conv2d({inputs}, {outputs}, {kernel_size})"
    height, width = _pair(name, "kernel_size", kernel_size)
    steps = _pair(name, "stride", stride)
    _pair(name, "dilation", dilation)
    _check_sizes(name, inputs, outputs, groups)
    if inputs % groups or outputs % groups:
        raise ValueError(f"{name}: groups={groups} must divide both channel counts")
    if not isinstance(padding, str):
        _pair(name, "padding", padding, least=0)
    elif padding not in ("same", "valid"):
        raise ValueError(f"{name}: padding must be 'same', 'valid' or numbers, got {padding!r}")
    elif padding == "same" and steps != (1, 1):
        raise ValueError(f"{name}: padding='same' needs stride=1, got {stride}")
    bound = 1 / math.sqrt(inputs // groups * height * width)

    def convolve(x: Tensor, weight: Tensor, b: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, b, stride, padding, dilation, groups)

    return _affine(
        name,
        (outputs, inputs // groups, height, width),
        weight_init or kaiming_uniform(a=math.sqrt(5)),
        (bias_init or uniform(-bound, bound)) if bias else None,
        convolve,
    )


def _pair(name: str, what: str, size: Size, least: int = 1) -> tuple[int, int]:
    """Make (height, width) of one number or two, each at least `least`."""
    pair = (size, size) if isinstance(size, int) else size
    if not (
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and all(isinstance(n, int) and n >= least for n in pair)
    ):
        raise ValueError(
            f"{name}: {what} must be an int or (height, width), at least {least}, got {size!r}"
        )
    return pair[0], pair[1]


def _check_sizes(name: str, *sizes: int) -> None:
    if min(sizes) < 1:
        raise ValueError(f"{name}: every size must be at least 1")


def _affine(
    name: str,
    shape: tuple[int, ...],
    weight_init: Initializer,
    bias_init: Initializer | None,
    f: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> Model:
    """A layer with a weight of `shape` and, given its initializer, a bias `[shape[0]]`."""

    def init(key: Tensor) -> Tree:
        weight_key, bias_key = random.split(key)
        params = {"weight": weight_init(weight_key, shape, torch.float32)}
        if bias_init is not None:
            params["bias"] = bias_init(bias_key, shape[:1], torch.float32)
        return params

    def apply(params: Tree, x: Tensor, *, train: bool = False, key: Tensor | None = None) -> Tensor:
        weight = _param(params, "weight", shape, name)
        return f(x, weight, _param(params, "bias", shape[:1], name) if bias_init else None)

    return Model(init, apply, draws=False)


def _check_window(name: str, kernel_size: Size, stride: Size | None, padding: Size) -> None:
    sizes = _pair(name, "kernel_size", kernel_size)
    if stride is not None:
        _pair(name, "stride", stride)
    if any(2 * p > k for p, k in zip(_pair(name, "padding", padding, least=0), sizes, strict=True)):
        raise ValueError(f"{name}: padding {padding} is more than half the window {kernel_size}")


def max_pool2d(
    kernel_size: Size, stride: Size | None = None, padding: Size = 0
) -> Callable[[Tensor], Tensor]:
    """Take the maximum of each window; equals `torch.nn.MaxPool2d`.

    Args:
        kernel_size: height and width of the window, or one number for both; likewise below.
        stride: step between windows; `kernel_size` if None.
        padding: −∞ around the image, at most half the window.

    Raises:
        ValueError: a size below 1 or not one or two numbers, a padding below 0 or above half the
            window.

    >>> max_pool2d(2)(torch.arange(16.0).view(1, 1, 4, 4)).flatten()
    tensor([ 5.,  7., 13., 15.])
    """
    _check_window("max_pool2d", kernel_size, stride, padding)
    return lambda x: F.max_pool2d(x, kernel_size, stride, padding)


def avg_pool2d(
    kernel_size: Size, stride: Size | None = None, padding: Size = 0
) -> Callable[[Tensor], Tensor]:
    """Take the mean of each window, padding counted; equals `torch.nn.AvgPool2d`.

    Args:
        kernel_size: height and width of the window, or one number for both; likewise below.
        stride: step between windows; `kernel_size` if None.
        padding: zeros around the image, at most half the window.

    Raises:
        ValueError: a size below 1 or not one or two numbers, a padding below 0 or above half the
            window.

    >>> avg_pool2d(2)(torch.arange(16.0).view(1, 1, 4, 4)).flatten()
    tensor([ 2.5000,  4.5000, 10.5000, 12.5000])
    """
    _check_window("avg_pool2d", kernel_size, stride, padding)
    return lambda x: F.avg_pool2d(x, kernel_size, stride, padding)


def flatten(start: int = 1, end: int = -1) -> Callable[[Tensor], Tensor]:
    """Flatten the axes from `start` to `end`, all but the batch by default; `torch.nn.Flatten`.

    >>> flatten()(torch.zeros(256, 1, 28, 28)).shape
    torch.Size([256, 784])
    """
    return lambda x: x.flatten(start, end)


def dropout(rate: float) -> Model:
    """Zero each element with probability `rate` and scale the rest by 1 / (1 − rate), in training.

    With `train=False` it is the identity. Equals `torch.nn.Dropout` in distribution; the mask is
    `random.uniform(key, x.shape) >= rate`. Source: Srivastava et al., 2014.

    Args:
        rate: the fraction dropped, in [0, 1).

    Raises:
        ValueError: `rate` outside [0, 1); `train=True` without a key (at apply).

    >>> layer = dropout(0.5)
    >>> layer.apply({}, torch.ones(6), train=True, key=random.key(3)).unique()
    tensor([0., 2.])
    >>> layer.apply({}, torch.ones(6))
    tensor([1., 1., 1., 1., 1., 1.])
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout: rate, the fraction dropped, must be in [0, 1), got {rate}")

    def apply(params: Tree, x: Tensor, *, train: bool = False, key: Tensor | None = None) -> Tensor:
        if not train or rate == 0:
            return x
        if key is None:
            raise ValueError(
                f"dropout({rate}) with train=True needs a key: pass key=fdl.random.key(seed) to "
                "apply, or train=False to evaluate"
            )
        return torch.where(random.uniform(key, x.shape) >= rate, x / (1 - rate), 0)

    return Model(lambda key: {}, apply, draws=rate > 0)


def layer_norm(shape: int | Sequence[int], *, eps: float = 1e-5) -> Model:
    """Normalise over the last axes, of sizes `shape`, then scale and shift; `torch.nn.LayerNorm`.

    y = (x − mean) / √(variance + eps) · weight + bias, with derivatives of every order, forward and
    reverse. Source: Ba et al., 2016.

    Args:
        shape: the sizes of the axes normalised over, or one number for the last axis alone.
        eps: added to the variance.

    Raises:
        ValueError: a size below 1; x whose last axes have other sizes (at apply).

    >>> layer = layer_norm(3)
    >>> layer.apply(layer.init(random.key(0)), torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[-1.2247,  0.0000,  1.2247]])
    """
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    name = f"layer_norm({shape})"
    _check_sizes(name, *sizes)

    def init(key: Tensor) -> Tree:
        return {
            "weight": ones(key, sizes, torch.float32),
            "bias": zeros(key, sizes, torch.float32),
        }

    def apply(params: Tree, x: Tensor, *, train: bool = False, key: Tensor | None = None) -> Tensor:
        weight, bias = (_param(params, p, sizes, name) for p in ("weight", "bias"))
        if x.shape[-len(sizes) :] != sizes:
            raise ValueError(f"{name}: expected x [..., {str(sizes)[1:-1]}], got {list(x.shape)}")
        # Written out: the derivatives of F.layer_norm's own derivative are wrong (third orders, and
        # forward over reverse). Compiled, it is the same program.
        wide = x.to(at_least_32_bits(x))
        var, mean = torch.var_mean(wide, list(range(-len(sizes), 0)), correction=0, keepdim=True)
        return ((wide - mean) * (var + eps).rsqrt() * weight + bias).to(x.dtype)

    return Model(init, apply, draws=False)
