"""A forward that writes to what belongs to the caller is refused before it has written."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn as oo
from torch.func import grad, vmap

import fdl
from fdl import interop, losses, nn, optim, random, tree
from tests.support.asserts import close, draw, unchanged
from tests.support.modules import CASES

KEY = random.key(1)


class Writing(oo.Module):
    """A linear layer whose forward first does something to itself or to its input."""

    def __init__(self, write):
        super().__init__()
        self.linear, self.write = oo.Linear(4, 2), write
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x):
        self.write(self, x)
        return self.linear(x)


def with_no_grad(self, x):
    with torch.no_grad():
        self.linear.weight.copy_(self.linear.weight.clamp(-1, 1))


def set_data(self, x):
    self.linear.weight.data = self.linear.weight.data.clamp(-1, 1)


def set_item(self, x):
    x[0] = 1


def add_to(self, x):
    x += 1


WRITES = {
    "data": (lambda self, x: self.linear.weight.data.clamp_(-0.1, 0.1), "params '0.linear.weight'"),
    "set data": (set_data, "params '0.linear.weight'"),
    "no_grad": (with_no_grad, "params '0.linear.weight'"),
    "detached": (lambda self, x: self.linear.bias.detach().zero_(), "params '0.linear.bias'"),
    "view": (lambda self, x: self.linear.weight[0].mul_(2), "params '0.linear.weight'"),
    "init": (lambda self, x: oo.init.zeros_(self.linear.weight), "params '0.linear.weight'"),
    "normal": (lambda self, x: oo.init.normal_(self.linear.weight), "params '0.linear.weight'"),
    "foreach": (
        lambda self, x: torch._foreach_mul_([*self.parameters()], 2), "params '0.linear.weight'",
    ),
    "out": (lambda self, x: torch.add(x, 1, out=x), "input '0'"),
    "relu": (lambda self, x: F.relu(x, inplace=True), "input '0'"),
    "relu, by position": (lambda self, x: F.relu(x, True), "input '0'"),
    "dropout": (lambda self, x: F.dropout(x, 0.5, self.training, True), "input '0'"),
    "item": (set_item, "input '0'"),
    "operator": (add_to, "input '0'"),
    "aten": (lambda self, x: torch.ops.aten.add_.Tensor(x, 1), "input '0'"),
    "uniform": (lambda self, x: x.uniform_(), "input '0'"),
    "renormalised": (
        lambda self, x: torch.embedding_renorm_(x, torch.tensor([0]), 1.0, 2), "input '0'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("under", ["plain", "grad", "vmap", "vmap of grad"])
@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_refused_before_it_happens(name, under):
    write, where = WRITES[name]
    model, params, buffers = interop.from_module(oo.Sequential(Writing(write)))
    x = draw(0, 3, 4).float()

    def f(params, x):
        return model.apply(params, buffers, x, train=True, key=KEY)[0].sum()

    run = {
        "plain": f, "grad": grad(f, (0, 1)), "vmap": vmap(f, (None, 0)),
        "vmap of grad": vmap(grad(f, (0, 1)), (None, 0)),
    }[under]  # fmt: skip
    stacked = torch.stack([x, x]) if "vmap" in under else x
    # `.data` has no meaning under vmap, says torch.
    text = f"would write to {where}.*belongs to the caller|under vmap transform is not allowed"
    with unchanged(params, buffers, stacked), pytest.raises((ValueError, RuntimeError), match=text):
        run(params, stacked)


def test_the_error_names_the_module():
    model, params, _ = interop.from_module(oo.Sequential(oo.ReLU(inplace=True), oo.Linear(4, 2)))
    x = draw(0, 3, 4).float()
    with unchanged(x), pytest.raises(ValueError, match="relu would write to input '0'") as error:
        model.apply(params, x)
    assert error.value.__notes__ == ["in 0 (ReLU)"]


@pytest.mark.parametrize("make", [oo.Embedding, oo.EmbeddingBag])
def test_max_norm_is_refused(make):
    model, params, _ = interop.from_module(make(5, 4, max_norm=0.1))
    with unchanged(params), pytest.raises(ValueError, match="max_norm would write to the weight"):
        model.apply(params, torch.tensor([[0, 1]]))


@pytest.mark.parametrize("name", ["no_grad", "data", "relu"])
@pytest.mark.parametrize("way", ["train_step", "eval_step", "jit"])
def test_steps_leave_state_and_batch_alone(name, way, plain_backend):
    model, _, _ = interop.from_module(Writing(WRITES[name][0]))
    opt = optim.sgd(0.1)
    state = fdl.TrainState.create(model, opt, key=KEY)
    batch = (draw(0, 3, 4).float(), torch.tensor([0, 1, 0]))
    loss = fdl.supervised(model, losses.cross_entropy)
    step = fdl.eval_step(loss) if way == "eval_step" else fdl.train_step(loss, opt)
    step = fdl.jit(step) if way == "jit" else step
    with unchanged(state, batch), pytest.raises(Exception, match="would write to"):
        step(state, batch)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("Fractional")])
def test_no_module_of_torch_changes_what_is_given(name, train):
    case = CASES[name]
    torch.manual_seed(0)
    module = case.make().double()
    model, params, buffers = interop.from_module(module)
    values = (params, buffers) if isinstance(model, nn.StatefulModel) else (params,)
    train = train and case.train
    with unchanged(params, buffers, case.inputs, dict(module.state_dict())):
        model.apply(*values, *case.inputs, train=train, key=KEY)


# ------------------------------------------------------------------------- what may be written


def test_buffers_may_be_written_in_any_way():
    def write(self, x):
        self.n += 1
        self.n.data.mul_(2)
        self.n = self.n + x.shape[0]

    model, params, buffers = interop.from_module(Writing(write))
    with unchanged(params, buffers):
        _, new = model.apply(params, buffers, torch.ones(3, 4), train=True)
    assert new["n"] == 5


def test_what_the_forward_made_may_be_written():
    def forward(x):
        y = x.clone()
        y[0] = 0
        y += 1
        return F.relu(F.dropout(y * 2, 0.0, inplace=True), inplace=True)

    net = oo.Sequential(oo.Linear(4, 3), oo.ReLU(inplace=True), oo.BatchNorm1d(3), Call(forward))
    model, params, buffers = interop.from_module(net)
    x = draw(0, 5, 4).float()
    y, _ = model.apply(params, buffers, x, train=True)
    close(y, net(x).detach(), rtol=1e-5)
    grad(lambda p: model.apply(p, buffers, x, train=True)[0].sum())(params)


def test_dropout_in_place_writes_nothing_in_evaluation():
    model, params, _ = interop.from_module(oo.Sequential(oo.Dropout(0.5, inplace=True)))
    x = torch.ones(3)
    with unchanged(x):
        assert torch.equal(model.apply(params, x), x)
        with pytest.raises(ValueError, match="dropout would write to input '0'"):
            model.apply(params, x, train=True, key=KEY)


class Call(oo.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


def test_a_parameter_that_is_replaced_is_hidden_state():
    def write(self, x):
        self.linear.weight = oo.Parameter(self.linear.weight.clamp(-1, 1))

    model, params, buffers = interop.from_module(Writing(write))
    with (
        unchanged(params),
        pytest.raises(ValueError, match=r"replaces the parameter 'linear\.weight'"),
    ):
        model.apply(params, buffers, torch.ones(3, 4))


def test_an_input_that_asks_for_its_gradient_may_come():
    class Slope(oo.Module):
        def forward(self, x):
            x = x.requires_grad_()
            return torch.autograd.grad((x**3).sum(), x)[0]

    model, params, _ = interop.from_module(Slope())
    close(model.apply(params, torch.tensor([2.0])), torch.tensor([12.0]))


def test_numpy_arrays_among_the_inputs_are_let_through():
    class Add(oo.Module):
        def forward(self, x, *, array):
            return x + torch.from_numpy(array)

    model, params, _ = interop.from_module(Add())
    assert tree.leaves(model.apply(params, torch.ones(2), array=np.ones(2)))[0].tolist() == [2, 2]


class Counting(torch.nn.Module):
    """Keeps count in what is neither a parameter nor a buffer."""

    def __init__(self, count):
        super().__init__()
        self.count, self.tensor, self.list, self.dict = count, torch.zeros(1), [], {"n": 0}

    def forward(self, x):
        self.count(self)
        return x + self.tensor + len(self.list) + self.dict["n"]


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (lambda module: module.tensor.add_(1), "would write to attribute 'tensor'"),
        (lambda module: module.list.append(1), "changes the content of its attribute 'list'"),
        (lambda module: module.dict.update(n=1), "changes the content of its attribute 'dict'"),
    ],
    ids=["tensor", "list", "dict"],
)
def test_attributes_that_are_no_buffers_keep_no_count(count, message):
    model, params = interop.from_module(Counting(count))[:2]
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            model.apply(params, torch.ones(1))
    quiet = Counting(lambda module: None)
    quiet.set = set(range(0, 80, 8))
    quiet.set -= {0, 8}  # a copy of it comes in another order
    quiet, params = interop.from_module(quiet)[:2]
    assert quiet.apply(params, torch.ones(1)).item() == 1
