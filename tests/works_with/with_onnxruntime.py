"""A model leaves as an ONNX file whose batch may have any size."""

import onnxruntime
import torch

from fdl import interop, nn, random

model = nn.sequential(nn.linear(4, 8), nn.batch_norm(8), nn.tanh, nn.linear(8, 3))
x = random.normal(random.key(1), (5, 4))

# Recipe
module = interop.as_module(model, *model.init(random.key(0))).eval()
batch = ({0: torch.export.Dim("batch")},)
torch.onnx.export(module, (x,), "model.onnx", dynamic_shapes=batch, input_names=["x"])
session = onnxruntime.InferenceSession("model.onnx")
(y,) = session.run(None, {"x": x[:3].numpy()})

# Check
torch.testing.assert_close(torch.from_numpy(y), module(x[:3]).detach())
