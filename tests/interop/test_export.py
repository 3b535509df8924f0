"""A model leaves through `torch.export` and ONNX, its parameters being inputs."""

import pytest
import torch
import torch.nn.functional as F

import models
from fdl import interop, losses, random, tree
from tests.support.asserts import close, draw


class Program(torch.nn.Module):
    """What the exporters take: `apply` as a module without parameters."""

    def __init__(self, apply):
        super().__init__()
        self.apply_ = apply

    def forward(self, params, x):
        return self.apply_(params, x)


def lenet():
    model = models.lenet()
    params = model.init(random.key(0))
    other = tree.map(lambda p: p + 0.1, params)
    return model, params, other, draw(0, 4, 1, 28, 28).float()


def test_torch_export_with_params_as_inputs():
    model, params, other, x = lenet()
    program = torch.export.export(Program(model.apply), (params, x)).module()
    for values in (params, other):
        close(program(values, x), model.apply(values, x), rtol=1e-6, atol=1e-6)


def test_torch_export_of_a_module_that_came_in():
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout(0.5))
    model, params, _ = interop.from_module(module)
    program = torch.export.export(Program(model.apply), (params, torch.ones(2, 4))).module()
    close(program(params, torch.ones(2, 4)), module.eval()(torch.ones(2, 4)).detach())


def onnx(f, *inputs):
    """Export `f` with all leaves of its arguments as inputs; give a function that runs it."""
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    runtime = pytest.importorskip("onnxruntime")
    program = torch.onnx.export(Function(f), inputs, dynamo=True, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    names = [node.name for node in session.get_inputs()]

    def run(*inputs):
        arrays = interop.to_numpy(tree.leaves(inputs))
        (y,) = session.run(None, dict(zip(names, arrays, strict=True)))
        return torch.from_numpy(y)

    return run


class Function(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *inputs):
        return self.f(*inputs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_onnx():
    model, params, other, x = lenet()
    run = onnx(model.apply, params, x)
    for values in (params, other):
        close(run(values, x), model.apply(values, x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model.apply(other, x), model.apply(params, x), atol=1e-2)


SEQUENCE, IMAGES = draw(1, 2, 3, 4).float(), draw(2, 2, 3, 4, 4).float()
CAME_IN = {
    "batch norm": (
        lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.BatchNorm2d(2)), IMAGES,
    ),
    "instance norm": (lambda: torch.nn.InstanceNorm2d(3, affine=True), IMAGES),
    "group norm": (lambda: torch.nn.GroupNorm(3, 3), IMAGES),
    "layer norm": (lambda: torch.nn.LayerNorm(4), SEQUENCE),
    "rms norm": (lambda: torch.nn.RMSNorm(4), SEQUENCE),
    "attention": (
        lambda: torch.nn.TransformerEncoderLayer(4, 2, 8, 0.1, batch_first=True), SEQUENCE,
    ),
    "embedding": (lambda: torch.nn.Embedding(5, 4, padding_idx=0), torch.tensor([[0, 3]])),
    "weight norm": (
        lambda: torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 2)), SEQUENCE,
    ),
    "gru": (lambda: torch.nn.GRU(4, 3), SEQUENCE),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CAME_IN)
def test_onnx_of_a_module_that_came_in(name):
    make, x = CAME_IN[name]
    model, params, buffers = interop.from_module(make())

    def apply(params, buffers, x):
        y = model.apply(params, buffers, x)[0] if buffers else model.apply(params, x)
        return tree.leaves(y)[0]

    run = onnx(apply, params, buffers, x)
    for shift in (0.0, 0.3):  # that no constant of the program stands for a parameter
        values = tree.map(
            lambda p, shift=shift: p + shift if p.is_floating_point() else p, (params, buffers)
        )
        close(run(*values, x), apply(*values, x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_of_losses_as_the_page_says():
    logits, labels = draw(3, 4, 3).float(), torch.tensor([0, 2, 1, 1])

    def smoothed(logits, labels):
        return losses.cross_entropy(logits, labels, label_smoothing=0.1)

    close(onnx(smoothed, logits, labels)(logits, labels), smoothed(logits, labels), rtol=1e-5)
    x, y = torch.tensor([-100.0, -20.0, 0.0, 50.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    run = onnx(lambda x, y: F.softplus(x) - x * y, x, y)
    expected = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    close(run(x, y), expected, rtol=1e-5, atol=1e-8)
