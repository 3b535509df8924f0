"""Files that people have of a training with torch: the optimizer, schedulers, wrapped modules."""

import pytest
import torch

import fdl
from fdl import tree
from tests.support.asserts import draw, equal_bits


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def saved(tmp_path, request):
    """Save by torch in one of its formats."""

    def call(value):
        torch.save(value, tmp_path / "it.pt", _use_new_zipfile_serialization=request.param)
        return tmp_path / "it.pt"

    return call


def training(optimizer, module):
    """A module and its optimizer after two steps."""
    theirs = optimizer(module.parameters())
    for i in range(2):
        theirs.zero_grad()
        module(draw(i, 5, 1, 3, 3).to(module.fc.weight)).square().sum().backward()
        theirs.step()
    return theirs


class Net(torch.nn.Module):
    """A convolution with batch norm, and a head: buffers stand between the parameters."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
        self.fc = torch.nn.Linear(2, 3)

    def forward(self, x):
        return self.fc(self.body(x).flatten(1))


def test_the_optimizer_beside_the_weights_goes_on_where_it_was(saved):
    module = Net().double()
    theirs = training(torch.optim.Adam, module)
    file = {"model": module.state_dict(), "optimizer": theirs.state_dict(), "epoch": 3}
    loaded = fdl.io.load_torch(saved(file))
    assert loaded["epoch"] == 3
    assert loaded["optimizer"]["param_groups"] == theirs.state_dict()["param_groups"]
    got, expected = loaded["optimizer"]["state"], theirs.state_dict()["state"]
    assert list(got) == list(expected) == list(range(6))
    for number, slots in expected.items():
        assert got[number].keys() == slots.keys()
        assert all(equal_bits(got[number][name], slots[name]) for name in slots)

    parameters = dict(module.named_parameters())
    params, _ = tree.partition(loaded["model"], lambda path, leaf: path in parameters)
    flat = {path: leaf for path, leaf in tree.flatten_dict(params).items() if leaf is not None}
    params = tree.unflatten_dict(flat)
    again = torch.optim.Adam(tree.leaves(params))
    again.load_state_dict(loaded["optimizer"])
    opt, state = fdl.optim.from_torch(again, params)
    grads = tree.map(torch.cos, params)
    updates, _ = opt.update(grads, state, params)
    for parameter in parameters.values():
        parameter.grad = torch.cos(parameter.detach())
    theirs.step()
    ours = tree.flatten_dict(updates)
    for name, parameter in parameters.items():
        new = flat[name] + ours[name]
        torch.testing.assert_close(new, parameter.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: torch.optim.SGD(m.parameters(), 0.1),
        lambda m: training(torch.optim.SGD, m),
        lambda m: training(torch.optim.RAdam, m),
        lambda m: torch.optim.LBFGS(m.parameters()),
        lambda m: torch.optim.AdamW([{"params": [p]} for p in m.parameters()], amsgrad=True),
    ],
)
def test_every_state_dict_of_an_optimizer_is_read(saved, make):
    theirs = make(Net()).state_dict()
    assert not tree_of_ints_differs(fdl.io.load_torch(saved(theirs)), theirs)


def tree_of_ints_differs(got, expected):
    leaves, spec = torch.utils._pytree.tree_flatten(got)
    others, other = torch.utils._pytree.tree_flatten(expected)
    return spec != other or not all(
        equal_bits(a, b) if isinstance(a, torch.Tensor) else a == b and type(a) is type(b)
        for a, b in zip(leaves, others, strict=True)
    )


def test_what_schedulers_and_scalers_keep_is_read(saved):
    theirs = torch.optim.SGD([torch.ones(1)], 0.1, momentum=0.9)
    schedulers = torch.optim.lr_scheduler
    file = {
        "cycle": schedulers.OneCycleLR(theirs, 0.1, total_steps=9).state_dict(),
        "lambda": schedulers.LambdaLR(theirs, lambda epoch: 1.0).state_dict(),
        "plateau": schedulers.ReduceLROnPlateau(theirs).state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "rng": torch.get_rng_state(),
        "size": (2, 3),
    }
    assert not tree_of_ints_differs(fdl.io.load_torch(saved(file)), file)
    size = fdl.io.load_torch(saved({"size": torch.Size([2, 3])}))["size"]
    assert size == (2, 3) and type(size) is tuple


def test_wrapped_modules_have_their_parameters_one_level_deeper(saved):
    module = torch.nn.Linear(2, 1)
    bare = fdl.io.load_torch(saved(module.state_dict()))
    parallel = fdl.io.load_torch(saved(torch.nn.DataParallel(module).state_dict()))
    compiled = fdl.io.load_torch(saved(torch.compile(module).state_dict()))
    assert not tree.diff(parallel["module"], bare)
    assert not tree.diff(compiled["_orig_mod"], bare)
    both = torch.compile(torch.nn.DataParallel(module)).state_dict()
    assert not tree.diff(fdl.io.load_torch(saved(both))["_orig_mod"]["module"], bare)


def test_a_lightning_checkpoint_is_read(saved):
    theirs = training(torch.optim.Adam, Net())
    file = {
        "epoch": 1,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": Net().state_dict(),
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.ones(())}},
        "optimizer_states": [theirs.state_dict()],
        "lr_schedulers": [],
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
    }
    loaded = fdl.io.load_torch(saved(file))
    assert loaded["state_dict"]["body"]["0"]["weight"].shape == (2, 1, 3, 3)
    assert not tree_of_ints_differs(loaded["optimizer_states"], file["optimizer_states"])


def test_tensors_that_share_memory_share_it_again(saved):
    w = draw(0, 4, 3).bfloat16()
    loaded = fdl.io.load_torch(saved({"a": w, "b": w, "row": w[1], "half": w[:2].half()}))
    loaded["a"].zero_()
    assert loaded["b"].sum() == 0 and loaded["row"].sum() == 0 and loaded["row"].dtype == w.dtype
    assert equal_bits(loaded["half"], w[:2].half())
