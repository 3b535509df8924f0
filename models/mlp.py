"""The multilayer perceptron, with dropout where rates are given."""

from __future__ import annotations

from collections.abc import Sequence

from fdl import nn
from fdl.nn import Layer, Model

__all__ = ["mlp"]


def mlp(
    features: int = 784,
    hidden: Sequence[int] = (256,),
    classes: int = 10,
    *,
    rates: Sequence[float] = (),
    std: float = 0.01,
) -> Model:
    """h₀ = x; hᵢ = dropout(relu(hᵢ₋₁ Wᵢᵀ + bᵢ)); o = h W_outᵀ + b_out.

    The course's two: 784–256–10, and 784–256–256–10 with dropout rates 0.2 and 0.5.

    Args:
        features: pixels of an image.
        hidden: the width of each hidden layer.
        classes: the number of classes.
        rates: the dropout rate after each hidden layer; none if empty.
        std: weights are drawn from N(0, std²); biases start at 0.

    Returns:
        A model from images `[batch, ...]` with `features` pixels to logits `[batch, classes]`, with
        the parameters `hidden0.weight` `[hidden[0], features]`, `hidden0.bias`, …,
        `output.weight`, `output.bias`.

    Raises:
        ValueError: `rates` is given, but not one for each hidden layer.

    >>> from fdl import random, tree
    >>> list(tree.flatten_dict(mlp(hidden=(256, 256), rates=(0.2, 0.5)).init(random.key(0))))
    ['hidden0.weight', 'hidden0.bias', 'hidden1.weight', 'hidden1.bias', 'output.weight', \
'output.bias']
    """
    if rates and len(rates) != len(hidden):
        raise ValueError(f"mlp: expected {len(hidden)} rates, one per hidden layer, got {rates}")

    def dense(inputs: int, outputs: int) -> Model:
        return nn.linear(inputs, outputs, weight_init=nn.init.normal(std), bias_init=nn.init.zeros)

    layers: dict[str, Layer] = {"flatten": nn.flatten()}
    for i, (inputs, outputs) in enumerate(zip([features, *hidden], hidden, strict=False)):
        layers[f"hidden{i}"] = dense(inputs, outputs)
        layers[f"relu{i}"] = nn.relu
        if rates:
            layers[f"dropout{i}"] = nn.dropout(rates[i])
    layers["output"] = dense([features, *hidden][-1], classes)
    return nn.sequential(**layers)
