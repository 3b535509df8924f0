"""A small configuration of every module of torch.nn: how to make it, and what it takes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import nn as oo

from tests.support.asserts import draw


class Case(NamedTuple):
    make: Callable[[], oo.Module]
    inputs: tuple[Any, ...]
    train: bool = True


class Loss(oo.Module):
    """A module that is called with its targets, which are no parameters."""

    def __init__(self, module: oo.Module, *targets: Any) -> None:
        super().__init__()
        self.module, self.targets = module, targets

    def forward(self, *inputs: Tensor) -> Any:
        return self.module(*inputs, *self.targets)


class LogSoftmax(oo.Module):
    """What the gradient of CTC takes for granted."""

    def __init__(self, loss: oo.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, x: Tensor, *targets: Tensor) -> Tensor:
        return self.loss(x.log_softmax(-1), *targets)


class Unpool(oo.Module):
    """Pooling and its inverse."""

    def __init__(self, pool: oo.Module, unpool: oo.Module) -> None:
        super().__init__()
        self.pool, self.unpool = pool, unpool

    def forward(self, x: Tensor) -> Tensor:
        return self.unpool(*self.pool(x))


class Listed(oo.Module):
    """A linear layer whose parameters or submodules lie in a container."""

    def __init__(self, parts: Any, *, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.parts, self.use = parts, use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.parts, x)


V, W, C = draw(1, 3, 4), draw(2, 3, 4, 6), draw(3, 2, 4, 6, 6)
P = draw(4, 2, 2, 4, 4, 4)
LABELS = torch.tensor([0, 2, 1])
SIGNS = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
IDS = torch.tensor([[0, 2, 2], [1, 0, 4]])


def on(x: Tensor, make: Callable[..., oo.Module], *args: Any, **kwargs: Any) -> Case:
    return Case(lambda: make(*args, **kwargs), (x,))


def loss(make: Callable[..., oo.Module], *targets: Any, x: Tensor = V, **kwargs: Any) -> Case:
    return Case(lambda: Loss(make(**kwargs), *targets), (x,))


def pointwise(make: Callable[..., oo.Module], *args: Any) -> Case:
    return on(V, make, *args)


CASES: dict[str, Case] = {
    # Pooling
    "AdaptiveAvgPool1d": on(W, oo.AdaptiveAvgPool1d, 3),
    "AdaptiveAvgPool2d": on(C, oo.AdaptiveAvgPool2d, (3, 2)),
    "AdaptiveAvgPool3d": on(P, oo.AdaptiveAvgPool3d, 3),
    "AdaptiveMaxPool1d": on(W, oo.AdaptiveMaxPool1d, 3),
    "AdaptiveMaxPool2d": on(C, oo.AdaptiveMaxPool2d, (3, 2)),
    "AdaptiveMaxPool3d": on(P, oo.AdaptiveMaxPool3d, 3),
    "AvgPool1d": on(W, oo.AvgPool1d, 2),
    "AvgPool2d": on(C, oo.AvgPool2d, 3, 2, 1),
    "AvgPool3d": on(P, oo.AvgPool3d, 2),
    "LPPool1d": on(W.abs(), oo.LPPool1d, 2.0, 2),
    "LPPool2d": on(C.abs(), oo.LPPool2d, 3.0, 2),
    "LPPool3d": on(P.abs(), oo.LPPool3d, 2.0, 2),
    "MaxPool1d": on(W, oo.MaxPool1d, 2),
    "MaxPool2d": on(C, oo.MaxPool2d, 3, 2, 1),
    "MaxPool3d": on(P, oo.MaxPool3d, 2),
    "MaxUnpool1d": on(W, lambda: Unpool(oo.MaxPool1d(2, return_indices=True), oo.MaxUnpool1d(2))),
    "MaxUnpool2d": on(C, lambda: Unpool(oo.MaxPool2d(2, return_indices=True), oo.MaxUnpool2d(2))),
    "MaxUnpool3d": on(P, lambda: Unpool(oo.MaxPool3d(2, return_indices=True), oo.MaxUnpool3d(2))),
    "FractionalMaxPool2d": on(C, oo.FractionalMaxPool2d, 2, 3),
    "FractionalMaxPool3d": on(P, oo.FractionalMaxPool3d, 2, 2),
    # Losses
    "AdaptiveLogSoftmaxWithLoss": loss(
        lambda: oo.AdaptiveLogSoftmaxWithLoss(4, 5, [2, 4], 2.0), torch.tensor([0, 4, 2])
    ),
    "BCELoss": loss(oo.BCELoss, V.sigmoid(), x=draw(5, 3, 4).sigmoid()),
    "BCEWithLogitsLoss": loss(oo.BCEWithLogitsLoss, V.sigmoid(), pos_weight=V[0].exp()),
    "CosineEmbeddingLoss": loss(oo.CosineEmbeddingLoss, draw(6, 3, 4), SIGNS),
    "CrossEntropyLoss": loss(oo.CrossEntropyLoss, LABELS, label_smoothing=0.1),
    "CTCLoss": loss(
        lambda: LogSoftmax(oo.CTCLoss()),
        torch.tensor([[1, 2], [2, 1]]), torch.tensor([5, 5]), torch.tensor([2, 2]),
        x=draw(7, 5, 2, 4),
    ),
    "GaussianNLLLoss": Case(lambda: oo.GaussianNLLLoss(), (V, draw(6, 3, 4), draw(7, 3, 4).exp())),
    "HingeEmbeddingLoss": loss(oo.HingeEmbeddingLoss, V.sign()),
    "HuberLoss": loss(oo.HuberLoss, draw(6, 3, 4)),
    "KLDivLoss": loss(oo.KLDivLoss, V.softmax(-1), reduction="batchmean", x=V.log_softmax(-1)),
    "L1Loss": loss(oo.L1Loss, draw(6, 3, 4)),
    "LinearCrossEntropyLoss": loss(lambda: oo.LinearCrossEntropyLoss(4, 5), LABELS),
    "MarginRankingLoss": loss(oo.MarginRankingLoss, draw(6, 3), SIGNS, x=V[:, 0], margin=0.1),
    "MSELoss": loss(oo.MSELoss, draw(6, 3, 4)),
    "MultiLabelMarginLoss": loss(
        oo.MultiLabelMarginLoss, torch.tensor([[3, 0, -1, 1], [1, -1, 0, 0], [2, 1, 0, -1]])
    ),
    "MultiLabelSoftMarginLoss": loss(oo.MultiLabelSoftMarginLoss, V.sigmoid()),
    "MultiMarginLoss": loss(oo.MultiMarginLoss, LABELS),
    "NLLLoss": loss(oo.NLLLoss, LABELS, weight=V[0].exp()),
    "NLLLoss2d": loss(oo.NLLLoss, torch.tensor([[0, 1], [2, 3]]), x=draw(1, 2, 4, 2)),
    "PoissonNLLLoss": loss(oo.PoissonNLLLoss, V.exp(), full=True),
    "SmoothL1Loss": loss(oo.SmoothL1Loss, draw(6, 3, 4)),
    "SoftMarginLoss": loss(oo.SoftMarginLoss, V.sign()),
    "TripletMarginLoss": Case(oo.TripletMarginLoss, (V, draw(6, 3, 4), draw(7, 3, 4))),
    "TripletMarginWithDistanceLoss": Case(
        oo.TripletMarginWithDistanceLoss, (V, draw(6, 3, 4), draw(7, 3, 4))
    ),
    # Normalisation
    "BatchNorm1d": on(V, oo.BatchNorm1d, 4),
    "BatchNorm2d": on(C, oo.BatchNorm2d, 4),
    "BatchNorm3d": on(P, oo.BatchNorm3d, 2),
    "BatchNorm1d of sequences": on(W, oo.BatchNorm1d, 4, affine=False, track_running_stats=False),
    "BatchNorm1d in eval mode": Case(lambda: oo.BatchNorm1d(4), (V,), train=False),
    "SyncBatchNorm": Case(lambda: oo.SyncBatchNorm(4), (C,), train=False),
    "GroupNorm": on(C, oo.GroupNorm, 2, 4),
    "InstanceNorm1d": on(W, oo.InstanceNorm1d, 4, affine=True, track_running_stats=True),
    "InstanceNorm2d": on(C, oo.InstanceNorm2d, 4, affine=True),
    "InstanceNorm3d": on(P, oo.InstanceNorm3d, 2),
    "InstanceNorm1d in eval mode": Case(
        lambda: oo.InstanceNorm1d(4, affine=True, track_running_stats=True), (W,), train=False
    ),
    "LayerNorm": on(W, oo.LayerNorm, (4, 6)),
    "LayerNorm without bias": on(V, oo.LayerNorm, 4, bias=False),
    "RMSNorm": on(V, oo.RMSNorm, 4),
    "LocalResponseNorm": on(C, oo.LocalResponseNorm, 2),
    "CrossMapLRN2d": on(C, oo.CrossMapLRN2d, 2),
    "weight_norm": on(V, lambda: oo.utils.parametrizations.weight_norm(oo.Linear(4, 2))),
    "weight_norm of all": on(
        V, lambda: oo.utils.parametrizations.weight_norm(oo.Linear(4, 2), dim=None)
    ),
    "spectral_norm": Case(
        lambda: oo.utils.parametrizations.spectral_norm(oo.Linear(4, 2)), (V,), train=False
    ),
    "orthogonal": on(
        V, lambda: oo.utils.parametrizations.orthogonal(oo.Linear(4, 4), orthogonal_map="cayley")
    ),
    # Linear maps, convolutions
    "Linear": on(V, oo.Linear, 4, 2),
    "Bilinear": Case(lambda: oo.Bilinear(4, 3, 2), (V, draw(6, 3, 3))),
    "Identity": on(V, oo.Identity),
    "Conv1d": on(W, oo.Conv1d, 4, 2, 3, padding=1),
    "Conv2d": on(C, oo.Conv2d, 4, 4, 3, 2, 1, dilation=2, groups=2),
    "Conv3d": on(P, oo.Conv3d, 2, 2, 2, padding="same", padding_mode="circular"),
    "ConvTranspose1d": on(W, oo.ConvTranspose1d, 4, 2, 3, stride=2, output_padding=1),
    "ConvTranspose2d": on(C, oo.ConvTranspose2d, 4, 2, 3),
    "ConvTranspose3d": on(P, oo.ConvTranspose3d, 2, 2, 2),
    "Embedding": Case(lambda: oo.Embedding(5, 4), (IDS,)),
    "Embedding with padding": Case(lambda: oo.Embedding(5, 4, padding_idx=3), (IDS,)),
    "Embedding, sparse": Case(lambda: oo.Embedding(5, 4, sparse=True), (IDS,)),
    "EmbeddingBag": Case(lambda: oo.EmbeddingBag(5, 4, padding_idx=0), (IDS,)),
    "EmbeddingBag of sums": Case(lambda: oo.EmbeddingBag(5, 4, mode="sum", sparse=True), (IDS,)),
    "EmbeddingBag of maxima": Case(lambda: oo.EmbeddingBag(5, 4, mode="max"), (IDS,)),
    # Recurrent
    "RNN": on(W, oo.RNN, 6, 2, 2, batch_first=True, dropout=0.5),
    "LSTM": on(W, oo.LSTM, 6, 2, bidirectional=True),
    "LSTM with projections": on(W, oo.LSTM, 6, 3, proj_size=2),
    "GRU": on(W, oo.GRU, 6, 2, batch_first=True),
    "RNNCell": on(V, oo.RNNCell, 4, 2, nonlinearity="relu"),
    "LSTMCell": on(V, oo.LSTMCell, 4, 2),
    "GRUCell": on(V, oo.GRUCell, 4, 2),
    # Attention
    "MultiheadAttention": Case(
        lambda: oo.MultiheadAttention(4, 2, batch_first=True), (draw(1, 2, 3, 4),) * 3
    ),
    "MultiheadAttention without weights": Case(
        lambda: Fast(oo.MultiheadAttention(4, 2, 0.5, batch_first=True)), (draw(1, 2, 3, 4),)
    ),
    "MultiheadAttention in eval mode": Case(
        lambda: Fast(oo.MultiheadAttention(4, 2, batch_first=True)),
        (draw(1, 2, 3, 4),),
        train=False,
    ),
    "Transformer": Case(
        lambda: oo.Transformer(4, 2, 1, 1, 8, 0.1, batch_first=True),
        (draw(1, 2, 3, 4), draw(2, 2, 2, 4)),
    ),
    "TransformerEncoder": on(
        draw(1, 2, 3, 4), lambda: oo.TransformerEncoder(encoder_layer(), 1, oo.LayerNorm(4))
    ),
    "TransformerEncoderLayer": on(draw(1, 2, 3, 4), lambda: encoder_layer()),
    "TransformerEncoderLayer in eval mode": Case(
        lambda: encoder_layer(), (draw(1, 2, 3, 4),), train=False
    ),
    "TransformerDecoder": Case(
        lambda: oo.TransformerDecoder(decoder_layer(), 1), (draw(1, 2, 3, 4), draw(2, 2, 2, 4))
    ),
    "TransformerDecoderLayer": Case(
        lambda: decoder_layer(), (draw(1, 2, 3, 4), draw(2, 2, 2, 4))
    ),
    # Pointwise
    "CELU": pointwise(oo.CELU),
    "ELU": pointwise(oo.ELU),
    "GELU": pointwise(oo.GELU),
    "GELU in tanh form": pointwise(oo.GELU, "tanh"),
    "GLU": pointwise(oo.GLU),
    "Hardshrink": pointwise(oo.Hardshrink),
    "Hardsigmoid": pointwise(oo.Hardsigmoid),
    "Hardswish": pointwise(oo.Hardswish),
    "Hardtanh": pointwise(oo.Hardtanh),
    "LeakyReLU": pointwise(oo.LeakyReLU),
    "LogSigmoid": pointwise(oo.LogSigmoid),
    "LogSoftmax": pointwise(oo.LogSoftmax, -1),
    "Mish": pointwise(oo.Mish),
    "PReLU": pointwise(oo.PReLU, 4),
    "RReLU": pointwise(oo.RReLU),
    "ReLU": pointwise(oo.ReLU),
    "ReLU6": pointwise(oo.ReLU6),
    "SELU": pointwise(oo.SELU),
    "SiLU": pointwise(oo.SiLU),
    "Sigmoid": pointwise(oo.Sigmoid),
    "Softmax": pointwise(oo.Softmax, -1),
    "Softmax2d": on(C, oo.Softmax2d),
    "Softmin": pointwise(oo.Softmin, -1),
    "Softplus": pointwise(oo.Softplus),
    "Softshrink": pointwise(oo.Softshrink),
    "Softsign": pointwise(oo.Softsign),
    "Tanh": pointwise(oo.Tanh),
    "Tanhshrink": pointwise(oo.Tanhshrink),
    "Threshold": pointwise(oo.Threshold, 0.1, 2.0),
    # Random
    "AlphaDropout": pointwise(oo.AlphaDropout, 0.5),
    "Dropout": pointwise(oo.Dropout, 0.5),
    "Dropout1d": on(W, oo.Dropout1d, 0.5),
    "Dropout2d": on(C, oo.Dropout2d, 0.5),
    "Dropout3d": on(P, oo.Dropout3d, 0.5),
    "FeatureAlphaDropout": on(C, oo.FeatureAlphaDropout, 0.5),
    # Distances
    "CosineSimilarity": Case(lambda: oo.CosineSimilarity(), (V, draw(6, 3, 4))),
    "PairwiseDistance": Case(lambda: oo.PairwiseDistance(), (V, draw(6, 3, 4))),
    # Shapes
    "ChannelShuffle": on(C, oo.ChannelShuffle, 2),
    "CircularPad1d": on(W, oo.CircularPad1d, 2),
    "CircularPad2d": on(C, oo.CircularPad2d, 2),
    "CircularPad3d": on(P, oo.CircularPad3d, 2),
    "ConstantPad1d": on(W, oo.ConstantPad1d, 2, 1.5),
    "ConstantPad2d": on(C, oo.ConstantPad2d, 2, 1.5),
    "ConstantPad3d": on(P, oo.ConstantPad3d, 2, 1.5),
    "Flatten": on(C, oo.Flatten),
    "Fold": on(draw(1, 2, 8, 4), oo.Fold, (3, 3), (2, 2)),
    "PixelShuffle": on(C, oo.PixelShuffle, 2),
    "PixelUnshuffle": on(C, oo.PixelUnshuffle, 2),
    "ReflectionPad1d": on(W, oo.ReflectionPad1d, 2),
    "ReflectionPad2d": on(C, oo.ReflectionPad2d, 2),
    "ReflectionPad3d": on(P, oo.ReflectionPad3d, 2),
    "ReplicationPad1d": on(W, oo.ReplicationPad1d, 2),
    "ReplicationPad2d": on(C, oo.ReplicationPad2d, 2),
    "ReplicationPad3d": on(P, oo.ReplicationPad3d, 2),
    "Unflatten": pointwise(oo.Unflatten, 1, (2, 2)),
    "Unfold": on(C, oo.Unfold, 2),
    "Upsample": on(C, oo.Upsample, None, 2, "bicubic"),
    "Upsample, linear": on(W, oo.Upsample, None, 2, "linear"),
    "Upsample, trilinear": on(P, oo.Upsample, None, 2, "trilinear"),
    "UpsamplingBilinear2d": on(C, oo.UpsamplingBilinear2d, None, 2),
    "UpsamplingNearest2d": on(C, oo.UpsamplingNearest2d, None, 2),
    "ZeroPad1d": on(W, oo.ZeroPad1d, 1),
    "ZeroPad2d": on(C, oo.ZeroPad2d, 1),
    "ZeroPad3d": on(P, oo.ZeroPad3d, 1),
    # Containers
    "ModuleDict": on(
        V, lambda: Listed(oo.ModuleDict({"a": oo.Linear(4, 2)}), use=lambda m, x: m["a"](x))
    ),
    "ModuleList": on(V, lambda: Listed(oo.ModuleList([oo.Linear(4, 2)]), use=lambda m, x: m[0](x))),
    "ParameterDict": on(
        V, lambda: Listed(oo.ParameterDict({"a": draw(9, 4, 2)}), use=lambda p, x: x @ p["a"])
    ),
    "ParameterList": on(
        V, lambda: Listed(oo.ParameterList([draw(9, 4, 2)]), use=lambda p, x: x @ p[0])
    ),
    "Sequential": on(V, lambda: oo.Sequential(oo.Linear(4, 3), oo.Tanh(), oo.Linear(3, 2))),
}  # fmt: skip
if not hasattr(oo, "LinearCrossEntropyLoss"):  # an older torch
    del CASES["LinearCrossEntropyLoss"]


class Fast(oo.Module):
    """Self-attention that does not ask for the weights: the fused kernels."""

    def __init__(self, net: oo.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x, x, x, need_weights=False)[0]


def encoder_layer() -> oo.Module:
    return oo.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)


def decoder_layer() -> oo.Module:
    return oo.TransformerDecoderLayer(4, 2, 8, 0.0, batch_first=True)


# Nothing to call: bases, options.
ABSTRACT = {"Module", "Container", "RNNBase", "RNNCellBase", "LinearCrossEntropyOptions"}
# What raises, by name: a pattern of checks (see test_modules) and of what the error says.
REFUSED: dict[str, tuple[str, str]] = {
    "FractionalMaxPool2d": (".*", "fractional_max_pool2d draws from torch's global generator"),
    "FractionalMaxPool3d": (".*", "fractional_max_pool3d draws from torch's global generator"),
    "AdaptiveLogSoftmaxWithLoss": ("vmap", "expanded size|index_copy_"),
    "GaussianNLLLoss": ("vmap", r"calling .item\(\)"),
    "CTCLoss": ("f|[rf][rf]+", "ctc_loss has no derivatives but the first, in reverse mode"),
    "MultiLabelMarginLoss": ("f|[rf][rf]+", "multilabel_margin_loss has no derivatives but"),
    "MultiMarginLoss": ("f|[rf][rf]+", "multi_margin_loss has no derivatives but the first"),
    "EmbeddingBag": ("f|[rf][rf]+", "embedding_bag has no derivatives but the first"),
    "EmbeddingBag of sums": ("f|[rf][rf]+", "embedding_bag has no derivatives but the first"),
    "EmbeddingBag of maxima": ("f|[rf][rf]+", "embedding_bag has no derivatives but the first"),
    "CrossMapLRN2d": ("[rf]+|vmap", "autograd.Function"),
    "ConvTranspose1d": ("rrr", "output_padding is not supported"),
}
# What draws random numbers in training.
DRAWING = {
    *("AlphaDropout", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "FeatureAlphaDropout"),
    *("FractionalMaxPool2d", "FractionalMaxPool3d", "MultiheadAttention without weights"),
    *("RNN", "RReLU", "Transformer"),
}
