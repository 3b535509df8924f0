"""`from_module` and `to_module`: a module as pure functions, and back."""

import copy
from functools import partial

import pytest
import torch
from torch import nn as oo
from torch.func import functional_call, grad, jvp, vmap

import fdl
from fdl import interop, losses, nn, optim, random, tree
from tests.support.asserts import close, draw, unchanged

KEY = random.key(5)


class Tied(oo.Module):
    """Embeds and reads out with one matrix, as language models do."""

    def __init__(self):
        super().__init__()
        self.embed = oo.Linear(4, 3, bias=False)
        self.head = oo.Linear(4, 3, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.embed(x) * self.head(x).sin()


def with_norm(**kwargs):
    return oo.Sequential(oo.Linear(4, 3), oo.BatchNorm1d(3, **kwargs), oo.Tanh(), oo.Linear(3, 2))


def lstm(*args, **kwargs):
    return oo.LSTM(*args, batch_first=True, **kwargs)


def leaf(y):
    """The first tensor of what a module returns."""
    return tree.leaves(y)[0]


MODULES = {
    "linear": (lambda: oo.Linear(4, 2), [(5, 4)]),
    "tied": (Tied, [(5, 4)]),
    "batch norm": (with_norm, [(5, 4)]),
    "batch norm, running mean": (partial(with_norm, momentum=None), [(5, 4)]),
    "batch norm without buffers": (partial(with_norm, track_running_stats=False), [(5, 4)]),
    "lstm": (lambda: lstm(4, 3, num_layers=2, bidirectional=True), [(2, 5, 4)]),
    "gru": (lambda: oo.GRU(4, 3), [(5, 2, 4)]),
    "attention": (lambda: oo.MultiheadAttention(4, 2), [(5, 2, 4)] * 3),
    "transformer": (
        lambda: oo.Transformer(4, 2, 1, 1, 8, dropout=0, batch_first=True),
        [(2, 5, 4), (2, 3, 4)],
    ),
    "weight norm": (lambda: oo.utils.parametrizations.weight_norm(oo.Linear(4, 2)), [(5, 4)]),
    "spectral norm": (lambda: oo.utils.parametrizations.spectral_norm(oo.Linear(4, 2)), [(5, 4)]),
}


def made(name):
    make, shapes = MODULES[name]
    torch.manual_seed(0)
    return make().double(), [draw(i, *shape) for i, shape in enumerate(shapes)]


def call(model, params, buffers, *inputs, **options):
    """Call either kind of model; the new buffers are {} for one without."""
    if isinstance(model, nn.StatefulModel):
        return model.apply(params, buffers, *inputs, **options)
    return model.apply(params, *inputs, **options), {}


@pytest.mark.curriculum("B1")
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODULES)
def test_output_gradients_and_buffers_are_the_modules(name, train):
    module, inputs = made(name)
    model, params, buffers = interop.from_module(module)
    assert list(tree.flatten_dict(params)) == [path for path, _ in module.named_parameters()]
    assert list(tree.flatten_dict(buffers)) == [path for path, _ in module.named_buffers()]
    before = copy.deepcopy(module.state_dict())

    def loss(params):
        y, new = call(model, params, buffers, *inputs, train=train, key=KEY)
        return leaf(y).sin().sum(), (y, new)

    with unchanged(params, buffers, inputs):
        grads, (y, new) = grad(loss, has_aux=True)(params)
    close(dict(module.state_dict()), dict(before), rtol=0, atol=0)

    expected = module.train(train)(*inputs)
    leaf(expected).sin().sum().backward()
    close(y, expected)
    grads = tree.flatten_dict(grads)
    close(grads, {path: p.grad for path, p in module.named_parameters()})
    assert max(g.abs().max() for g in grads.values()) > 1e-3
    close(tree.flatten_dict(new), dict(module.named_buffers()))
    if name.startswith("batch norm") and buffers:
        assert new["1"]["num_batches_tracked"] == int(train)


@pytest.mark.parametrize("name", MODULES)
def test_out_again(name):
    module, inputs = made(name)
    _, params, buffers = interop.from_module(module)
    params = tree.map(lambda p: p + 0.1, params)
    before = copy.deepcopy(module.state_dict())
    moved = interop.to_module(params, module, buffers or None).eval()
    close(dict(module.state_dict()), dict(before), rtol=0, atol=0)
    close(tree.flatten_dict(params), dict(moved.named_parameters()), rtol=0, atol=0)
    close(
        moved(*inputs),
        functional_call(module.eval(), tree.flatten_dict(params), tuple(inputs)),
    )
    kept = tree.map(torch.clone, params)
    with torch.no_grad():
        next(moved.parameters()).add_(1)
    assert not tree.diff(kept, params)


def test_ties_survive_the_round_trip():
    module = Tied()
    _, params, _ = interop.from_module(module)
    assert list(tree.flatten_dict(params)) == ["embed.weight"]
    again = interop.to_module(params, module)
    assert again.embed.weight is again.head.weight
    assert again.embed.weight.data_ptr() != params["embed"]["weight"].data_ptr()


def test_the_model_does_not_see_what_happens_to_the_module():
    module, x = oo.Sequential(oo.Linear(4, 2), oo.ReLU()), torch.ones(3, 4)
    model, params, _ = interop.from_module(module)
    y = model.apply(params, x)
    with torch.no_grad():
        module[0].weight.add_(1)
    module[1] = oo.Sigmoid()
    close(model.apply(params, x), y)
    assert not any(p.requires_grad for p in tree.leaves(params))


def test_init_gives_the_modules_own_values():
    module = with_norm()
    model, params, buffers = interop.from_module(module)
    given = model.init(KEY)
    assert not tree.diff((params, buffers), given)
    tree.leaves(given)[0].zero_()
    assert not tree.diff((params, buffers), model.init(random.key(9)))


def test_a_submodule_frozen_in_eval_mode_stays_so():
    module, x = with_norm(), draw(0, 5, 4).float()
    module[1].eval()
    model, params, buffers = interop.from_module(module)
    _, new = model.apply(params, buffers, x, train=True)
    assert not tree.diff(buffers, new)
    module.eval()  # all of it: then `train` says what is trained
    model, params, buffers = interop.from_module(module)
    _, new = model.apply(params, buffers, x, train=True)
    assert new["1"]["num_batches_tracked"] == 1


# torch has no batching rules for fused attention and fused weight norm: slow, not wrong.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["batch norm", "tied", "attention", "weight norm"])
def test_vmap_equals_a_loop_and_compiled_equals_eager(name):
    module, inputs = made(name)
    model, params, buffers = interop.from_module(module)
    rows = [
        (tree.map(lambda p, i=i: p + 0.1 * i if p.is_floating_point() else p, (params, buffers)))
        for i in range(2)
    ]

    def f(values):
        def loss(params):
            y, new = call(model, params, values[1], *inputs, train=True, key=KEY)
            return leaf(y).sin().sum(), new

        return grad(loss, has_aux=True)(values[0])

    expected = tree.stack([f(row) for row in rows])
    stacked = (
        tree.stack([r[0] for r in rows]),
        tree.stack([r[1] for r in rows]) if buffers else {},
    )
    run = vmap(f) if buffers else vmap(lambda params: f((params, {})))
    batched = stacked if buffers else stacked[0]
    close(run(batched), expected)
    torch._dynamo.reset()
    close(torch.compile(run, backend="aot_eager", fullgraph=True)(batched), expected)


def test_training_a_module_and_its_optimizer_out_again():
    module, x, y = made("linear")[0], draw(0, 8, 4), draw(1, 8, 2)
    model, _, _ = interop.from_module(module)
    opt = optim.sgd(0.1, momentum=0.9)
    loss = fdl.supervised(model, losses.mse)
    state = fdl.TrainState.create(model, opt, key=KEY)
    step = fdl.train_step(loss, opt)
    for _ in range(3):
        state, _ = step(state, (x, y))
    trained = interop.to_module(state.params, module)
    torch_opt = torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9)
    theirs = tree.unflatten_dict(dict(trained.named_parameters()))
    torch_opt.load_state_dict(optim.to_torch(state.opt_state, theirs, torch_opt))

    twin_opt = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for net, optimizer, steps in ((module, twin_opt, 4), (trained, torch_opt, 1)):
        for _ in range(steps):
            optimizer.zero_grad()
            oo.functional.mse_loss(net(x), y).backward()
            optimizer.step()
    close(dict(trained.state_dict()), dict(module.state_dict()))


# ------------------------------------------------------------------------------------- errors


def hooked():
    module = oo.Sequential(oo.Linear(2, 2))
    module[0].register_forward_hook(lambda *_: None)
    return module


def on_two_devices():
    return oo.Sequential(oo.Linear(2, 2), oo.Linear(2, 2, device="meta"))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: 3, TypeError, "must be an nn.Module, got 3"),
        (hooked, ValueError, r"0 \(Linear\): has hooks"),
        (lambda: oo.Sequential(oo.LazyLinear(2)), ValueError, r"0 \(LazyLinear\): weight is lazy"),
        (on_two_devices, ValueError, "2 devices: 0.weight on cpu, 1.weight on meta"),
    ],
    ids=["number", "hooks", "lazy", "devices"],
)
def test_from_module_refuses(make, error, text):
    with pytest.raises(error, match=text):
        interop.from_module(make())


def test_a_wrong_tree_is_named():
    model, params, buffers = interop.from_module(with_norm())
    wrong = {"0": {"weight": torch.ones(3, 5)}, "1": params["1"], "3": params["3"], "4": buffers}
    with pytest.raises(ValueError, match="apply of Sequential: params do not match") as error:
        model.apply(wrong, buffers, torch.ones(2, 4))
    lines = str(error.value).splitlines()[1:]
    assert "  0.bias: expected [3], got nothing" in lines
    assert "  0.weight: expected [3, 4], got [3, 5]" in lines
    assert "  4.1.running_mean: expected nothing, got [3]" in lines
    with pytest.raises(ValueError, match="buffers do not match the module"):
        model.apply(params, {}, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"to_module: buffers do not match(.|\n)*running_mean"):
        interop.to_module(params, with_norm())
    with pytest.raises(ValueError, match=r"to_module: params do not match the module"):
        interop.to_module(wrong, with_norm(), buffers)
    with pytest.raises(TypeError, match="params at 'weight' must be a tensor, got 3"):
        interop.to_module({"weight": 3}, oo.Linear(2, 2))


class Counting(oo.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.last = x
        return x


def test_a_forward_that_sets_attributes_is_refused_each_time():
    model, params, _ = interop.from_module(oo.Sequential(Counting()))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"0 sets its attribute 'calls'\n.*'last'"):
            model.apply(params, torch.ones(2))


def test_an_error_inside_says_in_which_module():
    model, params, _ = interop.from_module(oo.Sequential(oo.ReLU(), oo.Sequential(oo.Linear(3, 2))))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as error:
        model.apply(params, torch.ones(2, 4))
    assert error.value.__notes__ == ["in 1.0 (Linear)"]


def test_what_vmap_cannot_do_names_the_module():
    module, inputs = made("batch norm, running mean")
    model, params, buffers = interop.from_module(module)
    with pytest.raises(RuntimeError, match=r"calling .item\(\)") as error:
        vmap(lambda p, b: model.apply(p, b, *inputs, train=True))(
            *tree.stack([(params, buffers)] * 2)
        )
    assert "BatchNorm1d" in error.value.__notes__[0]


# --------------------------------------------------------------------- what surrounds the call


def test_a_callers_cache_of_parametrizations_is_not_ours():
    net = oo.utils.parametrizations.weight_norm(oo.Linear(4, 2))
    model, params, _ = interop.from_module(net)
    doubled, x = tree.map(lambda p: 2 * p, params), draw(0, 3, 4).float()
    expected = [model.apply(p, x) for p in (params, doubled)]
    with oo.utils.parametrize.cached():
        theirs = net.weight
        got = [model.apply(p, x) for p in (params, doubled)]
        assert net.weight is theirs
    close(got, expected)
    assert not torch.allclose(*got)


def test_a_flat_dict_of_named_parameters_is_taken():
    module, inputs = made("batch norm")
    model, params, buffers = interop.from_module(module)
    flat = {path: p.detach() for path, p in module.named_parameters()}
    expected = model.apply(params, buffers, *inputs)
    close(model.apply(flat, dict(module.named_buffers()), *inputs), expected)
    grads = grad(lambda p: model.apply(p, buffers, *inputs)[0].sum())(flat)
    assert grads.keys() == flat.keys()
    again = interop.to_module(flat, module, dict(module.named_buffers()))
    close(dict(again.state_dict()), dict(module.state_dict()))
    with pytest.raises(ValueError, match=r"0.weight: expected \[3, 4\], got nothing"):
        model.apply({"weight": torch.ones(3, 4)}, buffers, *inputs)


# ------------------------------------------------------------ buffers, however they are reached


NORMS = {
    "BatchNorm1d": (lambda: oo.BatchNorm1d(4), (3, 4)),
    "BatchNorm2d": (lambda: oo.BatchNorm2d(4), (2, 4, 3, 3)),
    "InstanceNorm1d": (lambda: oo.InstanceNorm1d(4, track_running_stats=True), (3, 4, 6)),
    "InstanceNorm2d": (
        lambda: oo.InstanceNorm2d(4, affine=True, track_running_stats=True), (2, 4, 3, 3),
    ),
    "spectral_norm": (lambda: oo.utils.parametrizations.spectral_norm(oo.Linear(4, 3)), (3, 4)),
}  # fmt: skip


@pytest.mark.parametrize("way", ["plain", "jvp", "hvp", "vmap"])
@pytest.mark.parametrize("name", NORMS)
def test_buffers_are_the_modules_under_every_transformation(name, way):
    make, shape = NORMS[name]
    module, x = make().double(), draw(0, *shape)
    model, params, buffers = interop.from_module(module)
    other = draw(1, *shape)

    def f(x):
        y, new = model.apply(params, buffers, x, train=True)
        return y.sin().sum(), new

    def slope(x):
        gradient, new = grad(f, has_aux=True)(x)
        return gradient.sum(), new

    def buffers_of(x):
        module = make().double()
        module.load_state_dict(dict(theirs))
        module.train()(x)
        return tree.unflatten_dict(dict(module.named_buffers()))

    theirs = module.state_dict()
    with unchanged(buffers, x):
        if way == "plain":
            new = f(x)[1]
        elif way == "jvp":
            new = jvp(f, (x,), (other,), has_aux=True)[2]
        elif way == "hvp":
            new = grad(slope, has_aux=True)(x)[1]
        else:
            new = vmap(lambda x: f(x)[1])(torch.stack([x, other]))
    expected = [buffers_of(x), buffers_of(other)]
    close(new, tree.stack(expected) if way == "vmap" else expected[0])


# --------------------------------------------------------------------- gradients in odd layouts


LAYERS = {
    "BatchNorm2d": lambda: oo.BatchNorm2d(3),
    "BatchNorm2d without buffers": lambda: oo.BatchNorm2d(3, track_running_stats=False),
    "InstanceNorm2d": lambda: oo.InstanceNorm2d(3, affine=True),
    "GroupNorm": lambda: oo.GroupNorm(3, 3),
    "LayerNorm": lambda: oo.LayerNorm((3, 4, 4)),
    "RMSNorm": lambda: oo.RMSNorm(4),
    "Conv2d": lambda: oo.Conv2d(3, 3, 3, padding=1),
    "Conv2d of groups": lambda: oo.Conv2d(3, 3, 3, padding=1, groups=3),
    "ConvTranspose2d": lambda: oo.ConvTranspose2d(3, 3, 3, padding=1),
    "AvgPool2d": lambda: oo.AvgPool2d(3, 1, 1),
    "MaxPool2d": lambda: oo.MaxPool2d(3, 1, 1),
    "Upsample": lambda: oo.Upsample(None, 2, "bilinear"),
}
VIEWS = {
    "squeezed": lambda y: y.squeeze(0).movedim(-3, -1),
    "permuted": lambda y: y.permute(0, 2, 3, 1),
    "transposed": lambda y: y.transpose(2, 3),
    "flipped": lambda y: y.flip(-1),
    "summed": lambda y: y.sum((2, 3)),
}


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_the_layout_of_a_gradient_does_not_matter(name, batch, memory):
    torch.manual_seed(0)
    model, params, buffers = interop.from_module(LAYERS[name]().double())
    x, v = draw(0, batch, 3, 4, 4).contiguous(memory_format=memory), draw(1, batch, 3, 4, 4)
    for view in VIEWS.values():

        def f(x, view=view):
            y = view(call(model, params, buffers, x, train=True)[0])
            return (y.sin() * torch.arange(y.numel()).view(y.shape).sin()).sum()

        h = 1e-5
        close((grad(f)(x) * v).sum(), (f(x + h * v) - f(x - h * v)) / (2 * h), rtol=1e-6, atol=1e-6)
