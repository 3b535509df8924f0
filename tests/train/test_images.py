"""Pictures in files, as `python -m train predict` reads them."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import fdl
import models
from fdl import data, random
from train.images import read_image


def grid(width=28, height=28):
    return np.arange(width * height).reshape(height, width).astype(np.uint8)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "16 bits"])
def test_images_of_every_kind_are_the_same_grey(tmp_path, mode):
    path, pixels = tmp_path / "it.png", grid()
    if mode == "16 bits":
        Image.fromarray(pixels.astype(np.uint16) * 257).save(path)
    elif mode == "1":
        pixels = np.where(pixels > 99, 255, 0).astype(np.uint8)
        Image.fromarray(pixels).convert("1").save(path)
    else:
        Image.fromarray(pixels).convert(mode).save(path)
    image, note = read_image(path)
    assert image.dtype == torch.uint8 and note == ""
    assert np.array_equal(image.numpy(), pixels)


@pytest.mark.parametrize("color", [255, 0])
def test_what_is_transparent_is_black(tmp_path, color):
    """White is light on black already, and black is taken off white, then inverted."""
    pixels = np.full((28, 28, 4), color, np.uint8)
    pixels[:14, :, 3], pixels[14:, :, 3] = 0, 255
    Image.fromarray(pixels).save(tmp_path / "it.png")
    image, note = read_image(tmp_path / "it.png")
    assert (image[:14] == 0).all() and (image[14:] == 255).all()
    assert note == ("" if color else "inverted: its background is light")


def test_an_empty_picture_is_black(tmp_path):
    for level in (0, 80, 255):
        Image.fromarray(np.full((300, 56), level, np.uint8)).save(tmp_path / "it.png")
        image, note = read_image(tmp_path / "it.png")
        assert image.shape == (28, 28) and (image == 0).all()
        assert note.endswith("cropped, and resized from 56 × 300 to 28 × 28")


def test_inverting_can_be_demanded_and_forbidden(tmp_path):
    path, pixels = tmp_path / "it.png", 255 - grid() // 4
    Image.fromarray(pixels).save(path)
    assert np.array_equal(read_image(path, "off")[0].numpy(), pixels)
    for invert in ("on", "auto"):
        assert np.array_equal(read_image(path, invert)[0].numpy(), 255 - pixels)


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    pixels = np.zeros((28, 28), np.uint8)
    pixels[20:24, 4:24] = 255  # a bar at the bottom
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "it.jpg", exif=exif, quality=100)
    image = read_image(tmp_path / "it.jpg")[0]
    assert image[5:7, 6:22].min() > 200 and image[14:].max() < 60


# ------------------------------------------- as good as the images the model has learned from


def on_canvas(image, height, width, background):
    canvas = np.full((height, width), background, np.uint8)
    top, left = (height - image.shape[0]) // 2, (width - image.shape[1]) // 2
    canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas


def cut_out(image, shown):
    """Make transparent what is nearly black in the image."""
    alpha = np.where(image > 8, 255, 0).astype(np.uint8)
    return np.dstack([shown, shown, shown, alpha])


def photograph(image):
    """Something dark on a wall: 300 × 200, in colour, unevenly lit, with noise."""
    large = Image.fromarray(255 - image).resize((150, 150), Image.Resampling.BICUBIC)
    wall = on_canvas((np.asarray(large) * (235 / 255)).astype(np.uint8), 200, 300, 235)
    noise = np.random.default_rng(0).normal(0, 4, wall.shape) + np.linspace(-6, 6, 300)
    colors = np.dstack([(wall + noise) * tint for tint in (1, 0.98, 0.95)])
    return colors.clip(0, 255).astype(np.uint8)


MADE = {
    "plain": lambda image: image,
    "inverted": lambda image: 255 - image,
    "wide": lambda image: on_canvas(image, 28, 84, 0),
    "tall and inverted": lambda image: on_canvas(255 - image, 100, 28, 255),
    "cut out": lambda image: cut_out(image, image),
    "cut out, dark": lambda image: cut_out(image, 255 - image),
    "enlarged": lambda image: np.kron(image, np.ones((5, 5), np.uint8)),
    "photograph": photograph,
}
NEAR = {"cut out": 0.08, "cut out, dark": 0.08}  # 0.04 for the others


@pytest.fixture(scope="module")
def model():
    """Softmax regression after ten epochs on the sample, and 200 of its test images."""
    train, test = (data.fashion_mnist_sample(train=train) for train in (True, False))
    model, opt = models.softmax_regression(), fdl.optim.sgd(0.1)
    step = fdl.train_step(fdl.supervised(model, fdl.losses.cross_entropy), opt)
    state = fdl.TrainState.create(model, opt, key=random.key(0))
    for epoch in range(10):
        for row in zip(*data.epoch_indices(random.key(epoch), 6000, 256), strict=True):
            state, _ = step(state, data.to_float(data.batch(train, row)))
    return lambda x: model.apply(state.params, x).argmax(1), test.x[::5].numpy(), test.y[::5]


def accuracy(model, tmp_path, make, ending=".png"):
    guess, images, labels = model
    read = []
    for image in images:
        Image.fromarray(make(image)).save(tmp_path / f"it{ending}")
        read.append(read_image(tmp_path / f"it{ending}")[0])
    x = torch.stack(read)[:, None].float() / 255
    return (guess(x) == labels).double().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("kind", MADE)
def test_a_picture_however_made_is_recognised_as_well(model, tmp_path, kind):
    plain = accuracy(model, tmp_path, MADE["plain"])
    assert plain > 0.75
    endings = [".jpg", ".png", ".webp"] if kind == "photograph" else [".png"]
    for ending in endings:
        assert accuracy(model, tmp_path, MADE[kind], ending) > plain - NEAR.get(kind, 0.04)


def enormous(path):
    """Write a PNG file of a few bytes that claims 50,000 × 50,000 pixels."""
    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in chunks
        )
    )


@pytest.mark.parametrize(
    "what, message",
    [
        ("absent", "it.png: no such file"),
        ("folder", "it.png: no such file"),
        ("empty", "it.png is not a PNG, JPEG or WebP file"),
        ("bitmap", "it.png is not a PNG, JPEG or WebP file"),
        ("cut", "it.png cannot be read: "),
        ("flipped", "it.png cannot be read: "),
        ("enormous", "it.png is too large: "),
    ],
)
def test_what_is_no_image_is_one_clear_message(tmp_path, what, message):
    path = tmp_path / "it.png"
    noise = np.random.default_rng(0).integers(0, 255, (28, 28), np.uint8)
    if what == "folder":
        path.mkdir()
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "bitmap":
        Image.fromarray(noise).save(path, format="BMP")
    elif what == "enormous":
        enormous(path)
    elif what != "absent":
        Image.fromarray(noise).save(path)
        content = bytearray(path.read_bytes())
        content[60] ^= 1
        path.write_bytes(content[:-200] if what == "cut" else content)
    with pytest.raises(ValueError) as raised:
        read_image(path)
    assert message in str(raised.value) and "\n" not in str(raised.value)
