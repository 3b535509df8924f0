"""The rows of `fdl.data` in the table of public functions."""

import torch

from fdl import data, random
from tests.laws.rows import Case, draw, labelled_rows, predictions, with_keys

DATA: dict[str, Case] = {
    "batch": Case(
        lambda x, y, index, mask: data.batch((x, y), (index, mask)),
        lambda key: (draw(key, 6, 2), *labelled_rows(key)),
    ),
    "batches": Case(
        lambda x, y, index: tuple(data.batches((x, y), index)),
        lambda key: (draw(key, 6, 2), torch.arange(6), random.permutation(key, 6).view(3, 2)),
    ),
    "bootstrap_indices": with_keys(lambda key: data.bootstrap_indices(key, 7, 3)),
    "epoch_indices": with_keys(lambda key: data.epoch_indices(key, 7, 3)),
    "poisson_indices": with_keys(lambda key: data.poisson_indices(key, 7, 0.3, 2)),
    "normalize": Case(
        lambda x, mean: data.normalize(x, mean, torch.exp(mean)),
        lambda key: (draw(key, 3, 2, 3, 4), draw(key, 2)),
    ),
    "random_affine": with_keys(
        lambda key, x: data.random_affine(key, x, 30.0, (0.1, 0.1), (0.5, 2.0), 10.0),
        (3, 2, 3, 4),
    ),
    "random_brightness": with_keys(
        lambda key, x: data.random_brightness(key, x, 0.3), (3, 2, 3, 4)
    ),
    "random_crop": with_keys(lambda key, x: data.random_crop(key, x, 1), (3, 2, 3, 4)),
    "random_cutout": with_keys(lambda key, x: data.random_cutout(key, x, 2), (3, 2, 3, 4)),
    "random_flip": with_keys(lambda key, x: data.random_flip(key, x), (3, 2, 3, 4)),
    "random_rotation": with_keys(lambda key, x: data.random_rotation(key, x, 30.0), (3, 2, 3, 4)),
    "split": with_keys(lambda key, x: data.split(key, {"x": x, "y": x[:, 0]}, 0.3), (5, 2)),
    "synthetic_linear": with_keys(
        lambda key, w: data.synthetic_linear(key, w, 4.2, n=5, noise=0.1), (2,)
    ),
    "pad_to": Case(
        lambda x, y, w: [data.pad_to((x, y), 6), data.pad_to((x, y, w), 6)],
        predictions,
        (0, 1, 2),
    ),
    "take": Case(
        lambda x, index: data.take({"x": x, "y": x[:, 0]}, index),
        lambda key: (draw(key, 6, 2), random.permutation(key, 6)),
    ),
    "to_float": Case(
        lambda x, images: (data.to_float(x), data.to_float(data.Dataset(images, x))),
        lambda key: (draw(key, 4, 2), random.randint(key, (4, 3, 3), 0, 256, torch.uint8)),
    ),
}
