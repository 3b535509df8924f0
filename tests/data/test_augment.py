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
    "random_brightness": functools.partial(data.random_brightness, amount=0.4),
    "random_cutout": functools.partial(data.random_cutout, size=3),
    "random_rotation": functools.partial(data.random_rotation, degrees=30.0),
    "random_affine": functools.partial(
        data.random_affine, degrees=20.0, translate=(0.2, 0.1), scale=(0.7, 1.3), shear=15.0
    ),
}
LINEAR = [name for name in WAYS if name != "random_brightness"]
each_way = pytest.mark.parametrize("augment", WAYS.values(), ids=WAYS)
DTYPES = [torch.float64, torch.bfloat16, torch.uint8, torch.bool]


def between(key, n, low, high):
    return low + (high - low) * random.uniform(key, (n,), torch.float64)


def by_torchvision(name: str, key: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What torchvision makes of each image `[n, c, h, w]`, with the parameters drawn here."""
    functional = pytest.importorskip("torchvision.transforms.functional")
    n, (height, width) = len(x), x.shape[-2:]
    bilinear = functional.InterpolationMode.BILINEAR
    match name:
        case "random_crop":
            places = (random.randint(key, (n, 2), -2, 3) + 2).tolist()
            made = (
                functional.crop(functional.pad(image, 2), *place, height, width)
                for image, place in zip(x, places, strict=True)
            )
        case "random_flip":
            flips = random.bernoulli(key, 0.5, (n,))
            made = (functional.hflip(i) if f else i for i, f in zip(x, flips, strict=True))
        case "random_cutout":
            corners = [
                random.randint(k, (n,), 0, m) - 1
                for k, m in zip(random.split(key, 2), (height, width), strict=True)
            ]
            made = (
                functional.erase(image, max(i, 0), max(j, 0), 3 + min(i, 0), 3 + min(j, 0), 0)
                for image, i, j in zip(x, *(c.tolist() for c in corners), strict=True)
            )
        case "random_rotation":
            angles = between(key, n, -30.0, 30.0).tolist()
            made = (
                functional.rotate(image, angle, bilinear)
                for image, angle in zip(x, angles, strict=True)
            )
        case "random_affine":
            ranges = (
                (-20, 20),
                (-0.2 * width, 0.2 * width),
                (-0.1 * height, 0.1 * height),
                (0.7, 1.3),
                (-15, 15),
            )
            drawn = [
                between(k, n, *r).tolist()
                for k, r in zip(random.split(key, 5), ranges, strict=True)
            ]
            made = (
                functional.affine(image, angle, [right, down], factor, [slant, 0.0], bilinear)
                for image, angle, right, down, factor, slant in zip(x, *drawn, strict=True)
            )
    return torch.stack(list(made))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["random_crop", "random_flip", "random_cutout"])
def test_equals_torchvision_with_the_same_parameters(name, dtype):
    x = draw(0, 20, 3, 5, 7)
    x = x > 0 if dtype is torch.bool else (10 * x).to(dtype)
    with unchanged(x):
        y = WAYS[name](KEY, x)
    assert y.dtype == dtype and equal_bits(y, by_torchvision(name, KEY, x))
    assert not torch.equal(x, y)


@pytest.mark.parametrize("shape", [(5, 7), (8, 8), (1, 6)], ids=str)
@pytest.mark.parametrize("name", ["random_rotation", "random_affine"])
def test_equals_torchvision_between_pixels(name, shape):
    x = draw(0, 20, 2, *shape)
    close(WAYS[name](KEY, x), by_torchvision(name, KEY, x), rtol=1e-9, atol=1e-10)
    grey = (draw(1, 20, 2, *shape) * 40 + 128).clamp(0, 255).to(torch.uint8)
    gap = WAYS[name](KEY, grey).int() - by_torchvision(name, KEY, grey).int()
    assert gap.abs().max() <= 1 and (gap != 0).sum() < 3  # it computes uint8 in float32


@pytest.mark.parametrize("name", ["random_rotation", "random_affine"])
def test_a_constant_image_filled_with_its_value_stays(name):
    """torchvision multiplies by the weight of the image twice, which leaves a dark edge."""
    for x in (torch.full((9, 1, 6, 6), 0.7).double(), torch.full((9, 1, 6, 6), 200).byte()):
        y = WAYS[name](KEY, x, fill=x[0, 0, 0, 0].item())
        torch.testing.assert_close(y, x, rtol=1e-12, atol=0)


def test_a_large_fill_changes_nothing_inside():
    x = draw(0, 9, 1, 6, 6).float()
    assert equal_bits(data.random_rotation(KEY, x, 0.0, fill=1e9), x)
    turned = data.random_rotation(KEY, x, 45.0, fill=1e9)
    inside = turned.abs() < 9
    assert 0.2 < inside.double().mean() < 0.9
    close(turned[inside], data.random_rotation(KEY, x, 45.0)[inside], rtol=0, atol=0)


def test_bools_are_rounded():
    on = torch.ones(3, 1, 4, 4, dtype=torch.bool)
    assert (
        data.random_brightness(KEY, on, 0.4).all() and not data.random_rotation(KEY, on, 45.0).all()
    )


def test_brightness_multiplies_and_leaves_the_unit_interval():
    x = draw(0, 50, 3, 2, 2)
    factor = data.random_brightness(KEY, x, 0.4) / x
    assert ((factor - factor[:, :1, :1, :1]).abs() < 1e-12).all()
    close(factor[:, 0, 0, 0], between(KEY, 50, 0.6, 1.4))
    assert data.random_brightness(KEY, x, 3.0).div(x).amin() > 0  # from 0, not −2
    grey = torch.full((50, 1, 1, 1), 200, dtype=torch.uint8)
    expected = (200 * between(KEY, 50, 0.6, 1.4)).round().clamp(max=255)
    assert torch.equal(data.random_brightness(KEY, grey, 0.4).flatten().double(), expected)


def test_normalize_equals_torchvision():
    functional = pytest.importorskip("torchvision.transforms.functional")
    x, mean, std = draw(0, 4, 3, 5, 5), draw(1, 3), draw(2, 3).abs()
    close(data.normalize(x, mean, std), functional.normalize(x, mean, std))
    assert data.normalize(x.half(), mean, std).dtype == torch.float16


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

    def every(key, x):
        return [augment(key, x) for augment in WAYS.values()]

    # torch.compile is the law of tests/laws/test_public_functions.py.
    for got, expected in zip(fdl.jit(every, strict=True)(KEY, x), every(KEY, x), strict=True):
        assert equal_bits(got, expected)


@pytest.mark.parametrize("augment", [WAYS[name] for name in LINEAR], ids=LINEAR)
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
        y = augment(KEY, image.expand(16, 3, 8, 8).contiguous())
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
        (lambda x: data.random_cutout(KEY, x, 1.5), TypeError, "size must be an int"),
        (lambda x: data.random_brightness(KEY, x, -1), ValueError, "amount must be finite and at"),
        (lambda x: data.random_brightness(KEY, x + 1j, 1), TypeError, "of real numbers"),
        (lambda x: data.random_rotation(KEY, x, "9"), TypeError, "degrees must be a number, got"),
        (lambda x: data.random_rotation(KEY, x[0, 0], 9), ValueError, "must be images"),
        (lambda x: data.random_affine(KEY, x, translate=0.1), TypeError, "translate must be two"),
        (lambda x: data.random_affine(KEY, x, scale=(2.0, 1.0)), ValueError, r"low ≤ high, got"),
        (lambda x: data.random_affine(KEY, x, scale=(0.0, 1.0)), ValueError, r"0 < low"),
        (lambda x: data.random_affine(KEY, x, shear=90.0), ValueError, "below 90 degrees"),
        (lambda x: data.normalize(x.byte(), x[0, 0, 0], x[0, 0, 0]), TypeError, "data.to_float"),
        (lambda x: data.normalize(x, x[0, 0, 0], x[0, 0, 0]), ValueError, r"\[1\], got \[4\]"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 1, 4, 4))
