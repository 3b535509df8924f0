"""Random modules inside `from_module` follow the key, and nothing else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn as oo
from torch.func import vmap

from fdl import interop, nn, random, tree
from fdl.interop._key_mode import REFUSED, RULES
from tests.support.asserts import close, draw

KEY = random.key(7)


class Fn(oo.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *inputs):
        return self.f(*inputs)


def first(module):
    """Let a module of several results give the first."""
    return oo.Sequential(module, Fn(lambda y: y[0]))


def attention(**kwargs):
    net = oo.MultiheadAttention(4, 2, dropout=0.5, batch_first=True).double()
    return Fn2(net, kwargs)


class Fn2(oo.Module):
    def __init__(self, net, kwargs):
        super().__init__()
        self.net, self.kwargs = net, kwargs

    def forward(self, x):
        return self.net(x, x, x, **self.kwargs)[0]


def depth(x):
    from torchvision.ops import stochastic_depth

    return stochastic_depth(x, 0.5, "row")


CASES = {
    "dropout": lambda: oo.Dropout(0.5),
    "dropout in place": lambda: oo.Sequential(oo.ELU(), oo.Dropout(0.5, inplace=True)),
    "dropout1d": lambda: oo.Dropout1d(0.5),
    "dropout2d": lambda: oo.Sequential(oo.Unflatten(-1, (2, 2)), oo.Dropout2d(0.5)),
    "dropout3d": lambda: oo.Sequential(oo.Unflatten(-1, (2, 2, 1)), oo.Dropout3d(0.5)),
    "alpha dropout": lambda: oo.AlphaDropout(0.5),
    "feature alpha dropout": lambda: oo.FeatureAlphaDropout(0.5),
    "rrelu": lambda: oo.RReLU(),
    "attention": attention,
    "attention without weights": lambda: attention(need_weights=False),
    "encoder layer": lambda: oo.TransformerEncoderLayer(4, 2, 8, 0.5, batch_first=True).double(),
    "stochastic depth": lambda: Fn(depth),
    "gumbel softmax": lambda: Fn(lambda x: F.gumbel_softmax(x, 0.5)),
    "rand": lambda: Fn(lambda x: x * torch.rand(x.shape) + torch.rand_like(x)),
    "randn": lambda: Fn(lambda x: x + torch.randn(*x.shape, dtype=x.dtype) * torch.randn_like(x)),
    "randint": lambda: Fn(lambda x: x + torch.randint(0, 99, (5, 4)) + torch.randint(9, (4,))),
    "randperm": lambda: Fn(lambda x: x.flatten()[torch.randperm(x.numel())]),
    "bernoulli": lambda: Fn(lambda x: x * torch.bernoulli(torch.full_like(x, 0.5))),
    "filled": lambda: Fn(
        lambda x: (
            x + torch.empty_like(x).normal_() * torch.empty(4).uniform_(1, 2)
            + x.new_empty(4).exponential_(2.0)
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_key_decides_alone(name):
    model, params, _ = interop.from_module(CASES[name]())
    x, keys = draw(0, 6, 5, 4), random.split(KEY, 4)
    state = torch.get_rng_state()
    rows = [model.apply(params, x, train=True, key=key) for key in keys]
    close(model.apply(params, x, train=True, key=keys[0]), rows[0], rtol=0, atol=0)
    assert not all(torch.equal(rows[0], row) for row in rows[1:])
    if name != "dropout in place":  # ELU makes its result before there is a key
        f = lambda key: model.apply(params, x, train=True, key=key)  # noqa: E731
        close(vmap(f)(keys), torch.stack(rows))
    assert torch.equal(torch.get_rng_state(), state)


# One of each kind: a function, an opened one, a method that fills, a maker of numbers.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["dropout2d", "attention", "stochastic depth", "rand", "randint", "bernoulli"]
)
def test_compiled_equals_eager(name):
    model, params, _ = interop.from_module(CASES[name]())
    x = draw(0, 6, 5, 4)

    def f(params, key):
        return model.apply(params, x, train=True, key=key)

    torch._dynamo.reset()
    state = torch.get_rng_state()
    close(torch.compile(f, backend="eager", fullgraph=True)(params, KEY), f(params, KEY))
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------- what is drawn, by closed forms


def kept(n, shape, rate=0.5):
    return nn.dropout(rate).apply(
        {}, torch.ones(shape, dtype=torch.float64), train=True, key=random.fold_in(KEY, n)
    )


def test_the_nth_dropout_is_ours_with_the_key_folded_with_n():
    net = oo.Sequential(oo.Dropout(0.5), oo.Tanh(), oo.Dropout(0.2))
    model, params, _ = interop.from_module(net)
    x = draw(0, 8, 5)
    expected = (x * kept(0, x.shape)).tanh() * kept(1, x.shape, 0.2)
    close(model.apply(params, x, train=True, key=KEY), expected)
    close(model.apply(params, x), x.tanh())


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "fused"])
def test_attention_drops_its_weights(weights):
    net = attention(need_weights=weights)
    model, params, _ = interop.from_module(net)
    x, p = draw(0, 3, 5, 4), params["net"]
    q, k, v = (x @ p["in_proj_weight"].T + p["in_proj_bias"]).chunk(3, -1)
    q, k, v = (z.unflatten(-1, (2, 2)).transpose(1, 2) for z in (q, k, v))
    scores = (q @ k.mT / 2**0.5).softmax(-1)
    mask = kept(0, (6, 5, 5) if weights else (3, 2, 5, 5)).view(3, 2, 5, 5)
    y = ((scores * mask) @ v).transpose(1, 2).flatten(2)
    expected = y @ p["out_proj"]["weight"].T + p["out_proj"]["bias"]
    close(model.apply(params, x, train=True, key=KEY), expected)


@pytest.mark.parametrize("masked", ["causal", "bool", "float"])
def test_fused_attention_with_dropout_equals_the_formula(masked):
    q, k, v = (draw(i, 2, 4, 3, 3) for i in range(3))
    k, v = (z[:, :2] for z in (k, v))
    allowed = torch.ones(3, 3, dtype=torch.bool).tril()
    options = {
        "causal": {"is_causal": True},
        "bool": {"attn_mask": allowed},
        "float": {"attn_mask": torch.zeros(3, 3).double().masked_fill(~allowed, -torch.inf)},
    }[masked]

    def at(rate, key):
        f = Fn(lambda *x: F.scaled_dot_product_attention(
            *x, dropout_p=rate, enable_gqa=True, scale=0.3, **options))  # fmt: skip
        return interop.from_module(f)[0].apply({}, q, k, v, train=True, key=key)

    plain = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.3, **options)
    close(at(0.0, None), plain)
    weights = (q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(~allowed, -torch.inf).softmax(-1)
    close(at(0.5, KEY), (weights * kept(0, weights.shape)) @ v.repeat_interleave(2, 1))


@pytest.mark.parametrize("kind", [oo.LSTM, oo.GRU, oo.RNN], ids=lambda kind: kind.__name__)
def test_recurrent_layers_drop_out_between_them(kind):
    net = kind(4, 3, num_layers=2, dropout=0.5, bidirectional=True, batch_first=True).double()
    model, params, _ = interop.from_module(net)
    x = draw(0, 2, 5, 4)
    y, end = model.apply(params, x, train=True, key=KEY)

    layers = [kind(n, 3, bidirectional=True, batch_first=True).double() for n in (4, 6)]
    for i, layer in enumerate(layers):
        own = {name.replace("l0", f"l{i}"): p for name, p in layer.named_parameters()}
        for name, p in own.items():
            p.data.copy_(params[name])
    h, first_end = layers[0](x)
    expected, second_end = layers[1](h * kept(0, h.shape))
    close(y, expected)
    ends = zip(first_end, second_end, strict=True) if kind is oo.LSTM else [(first_end, second_end)]
    close(list(end) if kind is oo.LSTM else [end], [torch.cat(pair) for pair in ends])
    close(model.apply(params, x)[0], net.eval()(x)[0])


def test_alpha_dropout_keeps_mean_and_variance():
    model, params, _ = interop.from_module(oo.AlphaDropout(0.3))
    y = model.apply(params, draw(0, 400, 500), train=True, key=KEY)
    assert y.mean().abs() < 0.02 and (y.var() - 1).abs() < 0.02
    assert (y == y.min()).double().mean() < 0.01 < 0.29 < (y == y.mode(0)[0]).double().mean() < 0.31


# ------------------------------------------------------------------------------------- errors


def test_without_a_key_the_error_names_the_fix_and_the_module():
    model, params, _ = interop.from_module(oo.Sequential(oo.Linear(4, 4), oo.Dropout(0.5)))
    with pytest.raises(ValueError, match=r"needs a key: pass key=fdl.random.key") as error:
        model.apply(params, torch.ones(2, 4), train=True)
    assert error.value.__notes__ == ["in 1 (Dropout)"]
    assert model.apply(params, torch.ones(2, 4)).shape == (2, 4)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (oo.FractionalMaxPool2d(2, output_size=2), "fractional_max_pool2d .*cannot draw from"),
        (Fn(lambda x: torch.multinomial(x[0, 0].abs(), 1)), "multinomial .*cannot draw from"),
        (Fn(lambda x: torch.rand(2, generator=torch.Generator())), "Generator cannot draw from"),
    ],
    ids=["pool", "multinomial", "generator"],
)
def test_what_cannot_follow_the_key_is_refused(module, text):
    model, params, _ = interop.from_module(module)
    with pytest.raises(NotImplementedError, match=text) as error:
        model.apply(params, torch.ones(1, 1, 6, 6), train=True, key=KEY)
    assert type(module).__name__ in error.value.__notes__[0]


def test_a_packed_sequence_with_dropout_is_refused():
    net = oo.LSTM(4, 3, num_layers=2, dropout=0.5)
    model, params, _ = interop.from_module(net)
    x = oo.utils.rnn.pack_sequence([torch.ones(3, 4), torch.ones(2, 4)])
    with pytest.raises(NotImplementedError, match="packed sequence cannot draw from a key"):
        model.apply(params, x, train=True, key=KEY)
    close(model.apply(params, x)[0].data, net.eval()(x)[0].data, rtol=1e-6)


def test_every_random_function_of_torch_is_known():
    tag = torch.Tag.nondeterministic_seeded
    packets = [getattr(torch.ops.aten, name) for name in dir(torch.ops.aten)]
    drawing = {
        packet.__name__
        for packet in packets
        if hasattr(packet, "overloads")
        and any(tag in getattr(packet, o).tags for o in packet.overloads())
    }
    assert {"rand", "bernoulli_", "native_dropout"} <= drawing
    # What nobody calls: the halves of compiled programs and of fused kernels.
    inner = ("_cudnn", "miopen", "_efficient", "_flash", "_scaled_dot", "_fused")
    functional = {name.removesuffix("_") for name in drawing if name.endswith("_")}
    public = {name for name in drawing - functional if not name.startswith(inner)}
    known = {name.partition(".")[2] for name in RULES} | REFUSED
    unknown = {name for name in public - known if hasattr(torch, name) or hasattr(F, name)}
    assert unknown == set()
    assert tree.leaves(sorted(functional - known - {"rrelu_with_noise"})) == sorted(
        name for name in functional - known if name != "rrelu_with_noise"
    )
