"""`from_module` and `to_module`: a module as pure functions, and back."""

import copy
from functools import partial

import pytest
import torch
from laws import close, draw, unchanged
from torch import nn as oo
from torch.func import functional_call, grad, vmap

import fdl
from fdl import interop, losses, nn, optim, random, tree

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
    loss = fdl.supervised(model.apply, losses.mse)
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
    with pytest.raises(ValueError, match="apply of Sequential: params are not those") as error:
        model.apply(wrong, buffers, torch.ones(2, 4))
    lines = str(error.value).splitlines()[1:]
    assert "  0.bias: expected [3], got nothing" in lines
    assert "  0.weight: expected [3, 4], got [3, 5]" in lines
    assert "  4.1.running_mean: expected nothing, got [3]" in lines
    with pytest.raises(ValueError, match="buffers are not those"):
        model.apply(params, {}, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"to_module: buffers are not those(.|\n)*running_mean"):
        interop.to_module(params, with_norm())
    with pytest.raises(ValueError, match=r"to_module: params are not those"):
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


@pytest.mark.parametrize(("name", "where"), [("lstm", "LSTM"), ("spectral norm", "_SpectralNorm")])
def test_what_vmap_cannot_do_names_the_module(name, where):
    module, inputs = made(name)
    model, params, buffers = interop.from_module(module)
    values = tree.stack([(params, buffers)] * 2) if buffers else tree.stack([params] * 2)

    def f(values):
        params, buffers_ = values if buffers else (values, {})
        return leaf(call(model, params, buffers_, *inputs, train=True)[0])

    with pytest.raises(RuntimeError, match="Batching rule not implemented") as error:
        vmap(f)(values)
    assert where in error.value.__notes__[0]
