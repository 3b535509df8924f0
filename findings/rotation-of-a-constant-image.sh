#!/usr/bin/env bash
# torchvision 0.29.2 (torch 2.15.0): an image of one value, rotated with bilinear interpolation and filled with
# just that value, gets dark edges: 0.53 where 0.7 is all there is. The old functions and v2 do it alike, `affine`
# too. Pixels on the edge are a mean with the zeros that pad the image, and then mixed with `fill` by the weight
# of the image once more, w (w v) + (1 - w) fill. With the nearest pixel, or after fill is subtracted before and
# added afterwards, the image stays as it is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 torchvision==0.29.2 numpy==2.4.6
cat >"$folder/find.py" <<'PYTHON'
import torch
from torchvision.transforms import InterpolationMode, functional
from torchvision.transforms.v2 import functional as v2

grey = torch.full((1, 8, 8), 0.7)
bilinear, nearest = InterpolationMode.BILINEAR, InterpolationMode.NEAREST
for name, module in (("functional", functional), ("v2.functional", v2)):
    made = {
        "rotate": module.rotate(grey, 30.0, bilinear, fill=[0.7]),
        "affine": module.affine(grey, 30.0, [0, 0], 1.0, [0.0, 0.0], bilinear, fill=[0.7]),
        "rotate, nearest": module.rotate(grey, 30.0, nearest, fill=[0.7]),
        "rotate of x - fill, + fill": module.rotate(grey - 0.7, 30.0, bilinear) + 0.7,
    }
    for what, image in made.items():
        print(f"{name:14} {what:27} smallest {image.min():.3f}, largest {image.max():.3f}")
        dark = what in ("rotate", "affine")
        assert (image.min() < 0.54) == dark and (image.max() - 0.7).abs() < 1e-6, "it has changed"
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/find.py"
