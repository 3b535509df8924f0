#!/usr/bin/env bash
# torch 2.15.0, CPU: the first-order gradient of BatchNorm2d in training is wrong for a batch of one image
# whose output is only squeezed and permuted on its way to the loss. Autograd and torch.func agree
# with each other and not with central differences in float64. The gradient arrives in a layout that the
# kernel misreads: made contiguous by a hook on the output, it gives the right one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
cat >"$folder/find.py" <<'PYTHON'
import torch

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
norm = torch.nn.BatchNorm2d(3, track_running_stats=False)
image, weights = torch.randn(1, 3, 2, 2), torch.randn(2, 2, 3)


def loss(x, contiguous):
    y = norm(x)
    if contiguous and y.requires_grad:
        y.register_hook(lambda g: g.contiguous())
    return (y.squeeze(0).permute(1, 2, 0) * weights).sum()


def by_autograd(contiguous):
    x = image.clone().requires_grad_()
    (y := loss(x, contiguous)).backward()
    return x.grad, y.item()


def by_differences(h=1e-6):
    out = torch.zeros(image.numel())
    for i in range(image.numel()):
        e = torch.zeros(image.numel())
        e[i] = h
        e = e.view_as(image)
        out[i] = (loss(image + e, False) - loss(image - e, False)) / (2 * h)
    return out.view_as(image)


right = by_differences()
plain, value = by_autograd(False)
mended, same = by_autograd(True)
print(f"largest error, output permuted:         {(plain - right).abs().max():.2e}")
print(f"largest error, its gradient contiguous:    {(mended - right).abs().max():.2e}")
assert value == same
assert (plain - right).abs().max() > 0.1, "torch has changed: the gradient is right now"
assert (mended - right).abs().max() < 1e-7
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/find.py"
