"""`nn.rearrange` and `nn.reduce` are einops, checked when built."""

import einops
import pytest
import torch
from torch.func import grad, vmap

import fdl
from fdl import nn, random
from tests.support.asserts import close, draw

PATCHES = "b c (h p) (w q) -> b (h w) (c p q)"


def test_equal_einops():
    x = draw(0, 2, 3, 4, 6)
    close(nn.rearrange(PATCHES, p=2, q=3)(x), einops.rearrange(x, PATCHES, p=2, q=3))
    for reduction in ("mean", "sum", "max", "min", "prod"):
        pattern = "b c (h 2) w -> b c h"
        close(nn.reduce(pattern, reduction)(x), einops.reduce(x, pattern, reduction))


@pytest.mark.parametrize("jitted", [False, True])
def test_as_layers_under_transformations(jitted, plain_backend):
    net = nn.sequential(
        nn.rearrange(PATCHES, p=2, q=3), nn.linear(18, 5), nn.reduce("b n f -> b f", "max")
    )
    params, x = net.init(random.key(0)), draw(0, 3, 2, 3, 4, 6).float()

    def gradient(x):
        return grad(lambda p: net.apply(p, x).sin().sum())(params)

    batched = fdl.jit(vmap(gradient)) if jitted else vmap(gradient)
    expected = [gradient(row) for row in x]
    for name in ("weight", "bias"):
        close(
            batched(x)["1"][name],
            torch.stack([g["1"][name] for g in expected]),
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nn.rearrange("b c"), "rearrange: einops cannot read this pattern"),
        (lambda: nn.rearrange("b c -> b"), "(?s)rearrange: .*only on one side"),
        (lambda: nn.rearrange("b c -> c b", d=2), r"(?s)rearrange: .*d=2"),
        (lambda: nn.reduce("b c -> b", "median"), "(?s)reduce: .*median"),
        (lambda: nn.reduce("b c -> b d", "mean"), r"(?s)reduce: .*\{'d'\}"),
        (lambda: nn.reduce(torch.ones(2), "mean"), "reduce: einops cannot read"),
    ],
    ids=range(6),
)
def test_a_bad_pattern_raises_when_the_layer_is_built(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_a_shape_that_does_not_fit_names_pattern_and_shape():
    with pytest.raises(einops.EinopsError, match=r"(?s)rearrange.*\(w q\).*\[2, 3, 4, 5\]"):
        nn.rearrange(PATCHES, p=2, q=3)(torch.ones(2, 3, 4, 5))
