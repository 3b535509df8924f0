"""A model leaves through `torch.export` and ONNX, its parameters being inputs."""

import pytest
import torch
from laws import close, draw

import models
from fdl import interop, random, tree


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


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_onnx():
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    runtime = pytest.importorskip("onnxruntime")
    model, params, other, x = lenet()
    program = torch.onnx.export(Program(model.apply), (params, x), dynamo=True, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    names = [node.name for node in session.get_inputs()]
    for values in (params, other):
        arrays = interop.to_numpy([*tree.leaves(values), x])
        (logits,) = session.run(None, dict(zip(names, arrays, strict=True)))
        expected = model.apply(values, x)
        close(torch.from_numpy(logits), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, model.apply(params, x), atol=1e-2)
