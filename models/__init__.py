"""The models of the course, one per file; each function returns a model."""

from __future__ import annotations

from models.cnn import cnn
from models.lenet import lenet
from models.lenet_bn import lenet_bn
from models.linreg import linreg
from models.mlp import mlp
from models.resnet import resnet
from models.softmax_regression import softmax_regression
from models.transformer import transformer

__all__ = [
    "cnn",
    "lenet",
    "lenet_bn",
    "linreg",
    "mlp",
    "resnet",
    "softmax_regression",
    "transformer",
]
