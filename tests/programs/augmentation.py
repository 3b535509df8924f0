"""A classifier on images that are cropped and flipped at random inside the step."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fdl import losses, nn, random, tree
from tests.support.programs import Program

PAD, SIZE = 2, 8
model = nn.sequential(nn.conv2d(1, 4, 3), nn.relu, nn.avg_pool2d(2), nn.flatten(), nn.linear(36, 3))


def augment(key, image):
    crop, flip = random.split(key)
    top, left = random.randint(crop, (2,), 0, 2 * PAD + 1)
    rows, columns = top + torch.arange(SIZE), left + torch.arange(SIZE)
    image = F.pad(image, (PAD, PAD, PAD, PAD))[:, rows[:, None], columns]
    return torch.where(random.bernoulli(flip), image.flip(-1), image)


def loss_fn(params, images, labels):
    return losses.cross_entropy(model.apply(params, images), labels)


def step(state, batch):
    images, labels = batch
    key, draw = random.split(state["key"])
    images = torch.vmap(augment)(random.split(draw, len(images)), images)
    grads, loss = torch.func.grad_and_value(loss_fn)(state["params"], images, labels)
    params = tree.map(lambda p, g: p - 0.1 * g, state["params"], grads)
    return {"params": params, "key": key}, (loss, images.mean((1, 2, 3)))


def batches():
    images = random.uniform(random.key(2), (4, 6, 1, SIZE, SIZE))
    return images, random.randint(random.key(3), (4, 6), 0, 3)


PROGRAM = Program(
    step,
    init=lambda: {"params": model.init(random.key(0)), "key": random.key(1)},
    xs=batches,
)
