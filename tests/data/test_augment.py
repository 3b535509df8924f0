"""`data.random_crop` and `random_flip` against torchvision, and as functions of a key."""

import functools

import pytest
import torch
from torch.func import grad, jvp, vmap

import fdl
from fdl import data, random
from tests.support.asserts import close, draw, equal_bits, unchanged

KEY = random.key(3)
WAYS = {
    "random_crop": functools.partial(data.random_crop, padding=2),
    "random_flip": data.random_flip,
}
each_way = pytest.mark.parametrize("augment", WAYS.values(), ids=WAYS)
DTYPES = [torch.float64, torch.bfloat16, torch.uint8, torch.bool]


def by_torchvision(name: str, key: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What torchvision makes of each image `[n, c, h, w]`, with the parameters drawn here."""
    functional = pytest.importorskip("torchvision.transforms.functional")
    height, width = x.shape[-2:]
    if name == "random_crop":
        places = random.randint(key, (len(x), 2), -2, 3) + 2
        return torch.stack(
            [
                functional.crop(functional.pad(image, 2), *place.tolist(), height, width)
                for image, place in zip(x, places, strict=True)
            ]
        )
    flips = random.bernoulli(key, 0.5, (len(x),))
    return torch.stack(
        [functional.hflip(image) if f else image for image, f in zip(x, flips, strict=True)]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WAYS)
def test_equals_torchvision_with_the_same_parameters(name, dtype):
    x = draw(0, 20, 3, 5, 7)
    x = x > 0 if dtype is torch.bool else (10 * x).to(dtype)
    with unchanged(x):
        y = WAYS[name](KEY, x)
    assert y.dtype == dtype and equal_bits(y, by_torchvision(name, KEY, x))
    assert not torch.equal(x, y)


@each_way
def test_bits_are_the_same_for_one_image_under_vmap_and_compiled(augment, plain_backend):
    keys, x = random.split(KEY, 4), draw(1, 4, 1, 6, 6)
    each = torch.stack([augment(key, image) for key, image in zip(keys, x, strict=True)])
    assert not torch.equal(each, x)
    assert equal_bits(vmap(augment)(keys, x), each)
    assert equal_bits(fdl.jit(vmap(augment))(keys, x), each)
    batches = x.expand(4, 4, 1, 6, 6)
    each = torch.stack([augment(key, x) for key in keys])
    assert equal_bits(vmap(augment, (0, None))(keys, x), each)
    assert equal_bits(vmap(augment)(keys, batches), each)
    _, scanned = fdl.scan(lambda carry, key: (carry, augment(key, x)), (), keys)
    assert equal_bits(scanned, each)


@pytest.mark.slow
def test_bits_are_the_same_compiled_by_inductor():
    x = draw(1, 8, 2, 6, 6)

    def both(key, x):
        return [augment(key, x) for augment in WAYS.values()]

    for compiled in (fdl.jit(both, strict=True), torch.compile(both, fullgraph=True)):
        for got, expected in zip(compiled(KEY, x), both(KEY, x), strict=True):
            assert equal_bits(got, expected)


@each_way
def test_derivatives_pass_through_the_pixels_that_stay(augment):
    x, tangent = draw(2, 6, 1, 5, 5), draw(3, 6, 1, 5, 5)
    weights = draw(4, 6, 1, 5, 5)

    def f(x):
        return (weights * augment(KEY, x)).sum()

    close(jvp(f, (x,), (tangent,))[1], f(tangent))  # f is linear
    close((grad(f)(x) * tangent).sum(), f(tangent))


def test_crops_are_drawn_uniformly_and_half_of_the_images_are_flipped():
    place = torch.zeros(1, 5, 5)
    place[0, 2, 2] = 1
    moved = data.random_crop(KEY, place.expand(9000, 1, 5, 5), padding=1)
    counts = moved.sum((0, 1))
    assert counts[1:4, 1:4].sum() == 9000 and (counts[1:4, 1:4] - 1000).abs().max() < 150
    row = torch.tensor([[[0, 1]]]).expand(9000, 1, 1, 2)
    assert abs(data.random_flip(KEY, row)[:, 0, 0, 0].sum() - 4500) < 240  # five deviations


def test_each_image_has_a_draw_and_its_channels_share_it():
    image = draw(5, 1, 8, 8)
    for augment in WAYS.values():
        y = augment(KEY, image.expand(16, 3, 8, 8))
        assert equal_bits(y[:, 0], y[:, 2])
        assert len({str(z.tolist()) for z in y[:, 0]}) > 1


def test_empty_batches_empty_images_and_no_padding():
    for shape in [(0, 1, 4, 4), (2, 0, 4, 4), (2, 1, 0, 4)]:
        x = torch.zeros(shape)
        assert all(augment(KEY, x).shape == x.shape for augment in WAYS.values())
    x = draw(6, 3, 1, 4, 4)
    assert equal_bits(data.random_crop(KEY, x, 0), x)
    assert data.random_crop(KEY, x, 99).shape == x.shape


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: data.random_crop(0, x, 2), TypeError, "random_crop: `key`"),
        (lambda x: data.random_crop(KEY, x, 2.0), TypeError, "padding must be an int, got a float"),
        (lambda x: data.random_crop(KEY, x, True), TypeError, "padding must be an int, got a bool"),
        (lambda x: data.random_crop(KEY, x, -1), ValueError, "at least 0, got -1"),
        (lambda x: data.random_crop(KEY, x[0, 0], 1), ValueError, r"height, width\], got \[4, 4\]"),
        (lambda x: data.random_flip(KEY, x[0, 0]), ValueError, "random_flip: x must be images"),
        (lambda x: data.random_flip(KEY, [x]), TypeError, "x must be a tensor, got a list"),
        (lambda x: data.random_flip(x, KEY), TypeError, "random_flip: `key`"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 1, 4, 4))
