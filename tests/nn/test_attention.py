"""Attention and the encoder layer: masks, dropout, sizes of 0, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad

import fdl
from fdl import nn, random, tree
from tests.support.asserts import close, draw

KEY = random.key(4)
X, MEMORY = draw(0, 2, 3, 8), draw(1, 2, 5, 8)
ALLOWED = random.bernoulli(KEY, 0.6, (2, 1, 3, 5))


def double(model):
    return tree.cast(model.init(KEY), torch.float64)


def reference(params, query, memory, **options):
    """The same by torch's own product of attention."""
    weights, biases = params["in_proj_weight"].chunk(3), params["in_proj_bias"].chunk(3)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (2, 4)).transpose(1, 2)
        for x, w, b in zip((query, memory, memory), weights, biases, strict=True)
    )
    y = F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)
    return F.linear(y, *params["out_proj"].values())


@pytest.mark.parametrize(
    "mask",
    [None, ALLOWED, ALLOWED[0], ALLOWED.expand(2, 2, 3, 5), ALLOWED[0, 0], ALLOWED[:, :, :1]],
    ids=["none", "batch", "one", "heads", "matrix", "keys"],
)
def test_masks_are_those_of_scaled_dot_product_attention(mask):
    layer = nn.multihead_attention(8, 2)
    params = double(layer)
    some = None if mask is None else mask | (torch.arange(5) == 2)  # no query without a key
    x = (X, MEMORY, MEMORY) if some is None else (X, MEMORY, MEMORY, some)
    close(layer.apply(params, x), reference(params, X, MEMORY, attn_mask=some))
    if some is not None:
        added = torch.where(some, 0.0, -torch.inf).double()
        close(layer.apply(params, (*x[:3], added)), layer.apply(params, x))


def test_causal_is_that_of_scaled_dot_product_attention():
    layer = nn.multihead_attention(8, 2, causal=True)
    params = double(layer)
    close(layer.apply(params, (X, MEMORY, MEMORY)), reference(params, X, MEMORY, is_causal=True))
    before = torch.ones(3, 5).tril().bool()
    both = layer.apply(params, (X, MEMORY, MEMORY, ALLOWED))
    close(both, nn.multihead_attention(8, 2).apply(params, (X, MEMORY, MEMORY, ALLOWED & before)))


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_a_query_that_may_attend_to_nothing_has_no_effect(kind):
    layer = nn.multihead_attention(8, 2)
    params = double(layer)
    allowed = torch.tensor([[True] * 5, [False] * 5, [True] * 5])
    mask = allowed if kind == "bool" else torch.where(allowed, 0.0, -torch.inf).double()

    def f(params, x, memory):
        return layer.apply(params, (x, memory, memory, mask))

    y = f(params, X, MEMORY)
    close(y[:, 1], params["out_proj"]["bias"].expand(2, 8))
    grads = grad(lambda *args: f(*args).sin().sum(), (0, 1, 2))(params, X, MEMORY)
    assert all(leaf.isfinite().all() for leaf in tree.leaves(grads))
    assert not grads[1][:, 1].any() and grads[1][:, 0].all()
    twice = grad(lambda x: grad(lambda x: f(params, x, MEMORY).sin().sum())(x).sin().sum())(X)
    assert twice.isfinite().all()


def test_masked_keys_have_no_effect():
    layer = nn.multihead_attention(8, 2)
    params = double(layer)
    mask = torch.tensor([True, True, False, True, False])
    other = torch.where(mask[:, None], MEMORY, 100.0)
    y = layer.apply(params, (X, MEMORY, MEMORY, mask))
    close(layer.apply(params, (X, other, other, mask)), y)
    few = MEMORY[:, mask]
    close(layer.apply(params, (X, few, few)), y)


def test_dropout_of_the_weights_comes_from_the_key():
    layer, plain = nn.multihead_attention(8, 2, dropout=0.5), nn.multihead_attention(8, 2)
    params = double(layer)
    close(layer.apply(params, X, key=KEY), plain.apply(params, X), rtol=0, atol=0)
    kept = random.uniform(KEY, (2, 2, 3, 3)) >= 0.5
    q, k, v = (
        part.unflatten(-1, (2, 4)).transpose(1, 2)
        for part in F.linear(X, params["in_proj_weight"], params["in_proj_bias"]).chunk(3, -1)
    )
    weights = torch.where(kept, 2 * ((q @ k.mT) / 2).softmax(-1), 0)
    expected = F.linear((weights @ v).transpose(1, 2).flatten(2), *params["out_proj"].values())
    close(layer.apply(params, X, train=True, key=KEY), expected)
    with pytest.raises(
        ValueError, match=r"multihead_attention\(8, 2\) with train=True needs a key"
    ):
        layer.apply(params, X, train=True)
    assert layer.uses_key and not plain.uses_key


@pytest.mark.parametrize("shapes", [(0, 3, 5), (2, 0, 5), (2, 3, 0)], ids=str)
def test_sizes_of_0(shapes):
    batch, queries, keys = shapes
    layer = nn.multihead_attention(8, 2)
    params = double(layer)
    x, memory = draw(0, batch, queries, 8), draw(1, batch, keys, 8)
    y = layer.apply(params, (x, memory, memory))
    assert y.shape == (batch, queries, 8)
    if not keys:
        close(y, params["out_proj"]["bias"].expand(2, 3, 8))


def test_in_16_bits_under_a_policy():
    layer, x = nn.multihead_attention(8, 2, causal=True), X.float()
    params = layer.init(KEY)
    y = nn.with_policy(layer).apply(params, (x, x, x, torch.zeros(3, 3)))
    assert y.dtype == torch.float32
    close(y, layer.apply(params, x), rtol=0.05, atol=0.05)


def test_the_encoder_layer_drops_by_four_keys():
    layer = nn.transformer_encoder_layer(8, 2, dim_feedforward=6, dropout=0.5)
    params, drop = double(layer), nn.dropout(0.5)
    keys = random.split(KEY, 4)
    attention = nn.multihead_attention(8, 2, dropout=0.5)
    y = attention.apply(params["self_attn"], X, train=True, key=keys[0])
    x = nn.layer_norm(8).apply(params["norm1"], X + drop.apply({}, y, train=True, key=keys[1]))
    y = drop.apply({}, nn.linear(8, 6).apply(params["linear1"], x).relu(), train=True, key=keys[2])
    y = drop.apply({}, nn.linear(6, 8).apply(params["linear2"], y), train=True, key=keys[3])
    close(
        layer.apply(params, X, train=True, key=KEY), nn.layer_norm(8).apply(params["norm2"], x + y)
    )
    with pytest.raises(
        ValueError, match=r"transformer_encoder_layer\(8, 2\) with train=True needs"
    ):
        layer.apply(params, X, train=True)


def test_encoder_layers_hand_the_mask_on():
    layer = nn.transformer_encoder_layer(8, 2, dim_feedforward=6, dropout=0.0)
    net, mask = nn.sequential(layer, layer), torch.arange(3) < 2
    params = double(net)
    y, same = net.apply(params, (X, mask))
    assert same is mask
    close(y[:, :2], net.apply(params, X[:, :2])[:, :2])


A, B = torch.ones(2, 3, 8), torch.ones(2, 5, 8)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: nn.multihead_attention(0, 1), ValueError, "every size must be at least 1"),
        (
            lambda: nn.multihead_attention(8, 3),
            ValueError,
            r"\(8, 3\): num_heads must divide embed_d",
        ),
        (
            lambda: nn.multihead_attention(8, 2, dropout=2),
            ValueError,
            "dropout, the fraction dropped",
        ),
        (lambda: nn.transformer_encoder_layer(8, 3), ValueError, "num_heads must divide embed_dim"),
        (
            lambda: nn.transformer_encoder_layer(8, 2, activation="relu"),
            TypeError,
            r"transformer_encoder_layer\(8, 2\): activation must be a function, got a str",
        ),
    ],
    ids=range(5),
)
def test_bad_arguments_raise_when_the_layer_is_built(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (
            A[..., :7],
            ValueError,
            r"multihead_attention\(8, 2\): expected query \[batch, length, 8\], g",
        ),
        (A[0, 0], ValueError, r"expected query .*, got \[8\]"),
        ((A, B), TypeError, r"x must be a tensor, \(query, keys, values\) or .*got a tuple"),
        (
            (A, B, A),
            ValueError,
            "keys and values one length, got .2, 3, 8., .2, 5, 8. and .2, 3, 8.",
        ),
        ((A, B[:1], B[:1]), ValueError, "must have one batch"),
        (
            (A, B, B.double()),
            TypeError,
            "values must have the dtype of query, got a tensor float64",
        ),
        (A.double(), TypeError, "x and params must have one dtype"),
        (A.long(), TypeError, "query must be floating"),
        (
            (A, B, B, torch.ones(3, 5).long()),
            TypeError,
            "mask must be a bool or floating tensor, got",
        ),
        ((A, B, B, torch.ones(2, 5)), ValueError, r"keys\] \[2, 2, 3, 5\], got \[2, 5\]"),
        ((A, B, B, torch.ones(1, 1, 1, 3, 5)), ValueError, "mask must broadcast against"),
    ],
    ids=range(11),
)
def test_a_bad_x_names_the_layer(x, error, text, jitted, plain_backend):
    layer = nn.multihead_attention(8, 2)
    apply = fdl.jit(layer.apply) if jitted else layer.apply
    with pytest.raises(error, match=text):
        apply(layer.init(KEY), x)


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (
            A[..., :7],
            ValueError,
            r"transformer_encoder_layer\(8, 2\): expected x \[batch, length, 8\]",
        ),
        ((A, A, A), TypeError, r"transformer_encoder_layer\(8, 2\): .* \(x, mask\), got 3 parts"),
        (A.long(), TypeError, r"transformer_encoder_layer\(8, 2\): x must be floating"),
    ],
    ids=range(3),
)
def test_a_bad_x_names_the_encoder_layer(x, error, text):
    layer = nn.transformer_encoder_layer(8, 2, dim_feedforward=6)
    with pytest.raises(error, match=text):
        layer.apply(layer.init(KEY), x)
