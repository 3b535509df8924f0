"""`residual`, `parallel` and `concat`: values, paths, keys, buffers, masks, errors."""

import pytest
import torch
from torch import nn as oo
from torch.func import grad

import fdl
from fdl import nn, random, tree
from tests.support.asserts import close, draw, unchanged

KEY = random.key(3)
MASK = torch.tensor([True, True, False, True])


def double(model):
    return tree.cast(model.init(KEY), torch.float64)


class Module(oo.Module):
    """The branches in torch: `merge` of the outputs of the named children."""

    def __init__(self, merge, **children):
        super().__init__()
        self.merge = merge
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.merge(x, [child(x) for child in self.children()])


class Residual(oo.Sequential):
    """A residual block whose parameters have the paths of the inner layers."""

    def forward(self, x):
        return x + super().forward(x)


CASES = {
    "residual": (
        nn.residual(nn.sequential(nn.linear(3, 3), nn.tanh)),
        lambda: Residual(oo.Linear(3, 3), oo.Tanh()),
    ),
    "parallel": (
        nn.parallel(body=nn.linear(3, 4), shortcut=nn.linear(3, 2, bias=False)),
        lambda: Module(
            lambda x, ys: tuple(ys), body=oo.Linear(3, 4), shortcut=oo.Linear(3, 2, bias=False)
        ),
    ),
    "concat": (
        nn.concat(nn.linear(3, 4), torch.sin, nn.linear(3, 1), dim=-1),
        lambda: Module(
            lambda x, ys: torch.cat([ys[0], x.sin(), ys[1]], -1),
            **{"0": oo.Linear(3, 4), "2": oo.Linear(3, 1)},
        ),
    ),
}


def number(y):
    return sum(leaf.sin().sum() for leaf in tree.leaves(y))


@pytest.mark.parametrize(("net", "module"), CASES.values(), ids=CASES)
def test_equals_the_module(net, module):
    params, x, twin = double(net), draw(0, 5, 3), module().double()
    twin.load_state_dict(tree.flatten_dict(params))
    assert list(tree.flatten_dict(params)) == list(twin.state_dict())
    with unchanged(params, x):
        close(net.apply(params, x), tree.map(torch.detach, twin(x)))
        grads = grad(lambda p: number(net.apply(p, x)))(params)
    number(twin(x)).backward()
    close(tree.flatten_dict(grads), {name: p.grad for name, p in twin.named_parameters()})


@pytest.mark.parametrize("join", [nn.parallel, nn.concat])
def test_branches_have_the_keys_of_sequential(join):
    branches = [nn.linear(3, 3), nn.dropout(0.5), nn.dropout(0.5)]
    net, x = join(*branches), torch.ones(4, 3)
    keys = [random.fold_in(KEY, i) for i in range(3)]
    params = net.init(KEY)
    assert tree.diff(params, {"0": branches[0].init(keys[0])}) == [] and net.uses_key
    ys = [
        branches[0].apply(params["0"], x),
        *(branches[i].apply({}, x, train=True, key=keys[i]) for i in (1, 2)),
    ]
    expected = torch.cat(ys, 1) if join is nn.concat else tuple(ys)
    close(net.apply(params, x, train=True, key=KEY), expected, rtol=0, atol=0)
    assert not join(nn.linear(3, 3), nn.relu).uses_key


def test_residual_hands_mode_and_key_down():
    net, x = nn.residual(nn.dropout(0.5)), torch.ones(50)
    assert (
        net.uses_key and not nn.residual(nn.relu).uses_key and nn.residual(nn.relu).init(KEY) == {}
    )
    y = net.apply({}, x, train=True, key=KEY)
    close(y, 1 + nn.dropout(0.5).apply({}, x, train=True, key=KEY), rtol=0, atol=0)
    close(net.apply({}, x), x + x)


@pytest.mark.parametrize("mask", [None, MASK])
def test_buffers_go_through(mask):
    norm, x = nn.batch_norm(3), draw(0, 4, 3)
    params, buffers = tree.cast(norm.init(KEY), torch.float64)
    y, new = norm.apply(params, buffers, x, train=True, mask=mask)

    net = nn.residual(norm)
    assert isinstance(net, nn.StatefulModel) and net.takes_mask
    close(net.apply(params, buffers, x, train=True, mask=mask), (x + y, new))

    for net, expected in (
        (nn.parallel(a=norm, b=nn.relu), (y, x.relu())),
        (nn.concat(a=norm, b=nn.relu), torch.cat([y, x.relu()], 1)),
    ):
        assert isinstance(net, nn.StatefulModel) and net.takes_mask
        start = tree.cast(net.init(KEY), torch.float64)
        assert tree.diff(start, ({"a": params}, {"a": buffers})) == []
        found = net.apply({"a": params}, {"a": buffers}, x, train=True, mask=mask)
        close(found, (expected, {"a": new}))


def test_a_layer_without_a_mask_is_refused_in_every_nest():
    counter = nn.StatefulModel(
        lambda key: ({}, {"calls": torch.tensor(0)}),
        lambda params, buffers, x, *, train=False, key=None: (x, {"calls": buffers["calls"] + 1}),
    )
    net = nn.sequential(nn.residual(nn.parallel(counter, nn.relu)), sum)
    _, buffers = net.init(KEY)
    assert not net.takes_mask and list(tree.flatten_dict(buffers)) == ["0.0.calls"]


def test_nested_as_a_residual_net(plain_backend):
    block = nn.sequential(
        nn.parallel(
            body=nn.sequential(nn.conv2d(2, 4, 3, padding=1), nn.batch_norm(4), nn.relu),
            shortcut=nn.conv2d(2, 4, 1, bias=False),
        ),
        sum,
        nn.residual(nn.sequential(nn.conv2d(4, 4, 3, padding="same"), nn.group_norm(2, 4))),
        nn.adaptive_avg_pool2d(1),
        nn.flatten(),
    )
    params, buffers = block.init(KEY)
    assert list(tree.flatten_dict(params)) == [
        *("0.body.0.weight", "0.body.0.bias", "0.body.1.weight", "0.body.1.bias"),
        *("0.shortcut.weight", "2.0.weight", "2.0.bias", "2.1.weight", "2.1.bias"),
    ]
    x = torch.ones(2, 2, 5, 5)
    apply = lambda *args: block.apply(*args, train=True, key=KEY)  # noqa: E731
    eager = apply(params, buffers, x)
    assert eager[0].shape == (2, 4)
    close(fdl.jit(apply)(params, buffers, x), eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: nn.parallel(), ValueError, "parallel: needs at least one layer"),
        (lambda: nn.concat(dim=0), ValueError, "concat: needs at least one layer"),
        (lambda: nn.concat(nn.relu, dim="0"), TypeError, "concat: dim must be an int, got a str"),
        (
            lambda: nn.parallel(nn.relu, a=nn.relu),
            TypeError,
            "parallel: give layers by position or",
        ),
        (
            lambda: nn.concat(nn.relu, 3),
            TypeError,
            "concat: layer '1' must be a Model .* got an int",
        ),
        (
            lambda: nn.parallel(nn.linear),
            TypeError,
            "parallel: layer '0' is the function nn.linear",
        ),
        (lambda: nn.parallel(**{"a.b": nn.relu}), ValueError, "parallel: a name must not contain"),
        (lambda: nn.residual(3), TypeError, "residual: layer must be a Model or a function"),
        (
            lambda: nn.residual(oo.Linear(1, 1)),
            TypeError,
            "residual: layer is the torch module Linear",
        ),
        (lambda: nn.residual(nn.dropout), TypeError, "residual: layer is the function nn.dropout"),
    ],
    ids=range(10),
)
def test_bad_arguments_raise_when_the_model_is_built(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    ("net", "text"),
    [
        (
            nn.residual(nn.linear(3, 1)),
            r"must keep the shape .* float32\[2, 3\], .* float32\[2, 1\]",
        ),
        (nn.residual(lambda x: x.sum(0)), "must keep the shape"),
        (nn.concat(a=nn.relu, b=lambda x: x[:1], dim=1), r"in axis 1 alone, .*'a': .2, 3., 'b'"),
        (nn.concat(nn.relu, lambda x: x[0]), "every output needs an axis 1, got shapes"),
        (nn.concat(nn.relu, lambda x: x[0], dim=-1), r"in axis -1 alone, .* '1': \[3\]"),
    ],
    ids=range(5),
)
def test_shapes_that_do_not_fit_raise(net, text, jitted, plain_backend):
    apply = fdl.jit(net.apply) if jitted else net.apply
    with pytest.raises(ValueError, match=text):
        apply(net.init(KEY), torch.ones(2, 3))


def test_errors_name_the_branch():
    net = nn.parallel(a=nn.relu, b=nn.sequential(nn.linear(4, 1)))
    with pytest.raises(ValueError) as error:
        net.apply(net.init(KEY), torch.ones(2, 3))
    assert error.value.__notes__ == ["in layer '0' of sequential", "in layer 'b' of parallel"]
    with pytest.raises(
        ValueError, match=r"parallel: params has entries \['c'\], but the layers are"
    ):
        net.apply({"c": {}}, torch.ones(2, 3))
