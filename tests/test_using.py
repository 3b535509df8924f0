"""`python -m train eval` and `predict`: what a run has saved, put to use."""

import json
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import fdl
from fdl import data
from fdl.data import LABELS
from train.__main__ import main
from train.using import read_image


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run of `softmax`, `softmax-bf16` and `linreg`."""
    folder, argv = tmp_path_factory.mktemp("runs"), sys.argv
    softmax = ["softmax", "--data", "sample", "--epochs", "2", "--compile", "off"]
    for name, options in {
        "softmax": softmax,
        "bfloat16": [*softmax, "--precision", "bfloat16"],
        "linreg": ["linreg"],
    }.items():
        sys.argv = ["python -m train", *options, "--out", str(folder / name)]
        assert main() == 0
    sys.argv = argv
    return folder


@pytest.fixture
def run(runs, monkeypatch, capsys):
    """Run a command beside the runs; give its exit code, output and errors."""
    monkeypatch.chdir(runs)
    capsys.readouterr()

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["python -m train", *map(str, args)])
        return main(), *capsys.readouterr()

    return call


@pytest.mark.parametrize("name", ["softmax", "bfloat16"])
def test_eval_finds_what_the_run_reported(run, runs, name):
    code, out, _ = run("eval", name)
    last = json.loads((runs / name / "metrics.jsonl").read_text().splitlines()[-1])
    first, loss, accuracy = out.splitlines()
    assert code == 0 and first.startswith(f"softmax after step {last['step']}: a SAMPLE")
    assert loss == f"test loss {last['test_loss']:.6g}"
    assert accuracy == f"test accuracy {last['test_accuracy']:.6g}"


def test_eval_of_a_run_without_test_data(run):
    code, out, _ = run("eval", "linreg")
    assert code == 0 and "linreg after step 300" in out
    assert float(out.split("train loss ")[1]) < 1e-4


def test_predict_gives_the_probabilities_of_the_model(run, runs, tmp_path):
    images = data.fashion_mnist_sample(train=False).x
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, image in zip(paths, images, strict=False):
        Image.fromarray(image.numpy()).save(path)
    code, out, _ = run("predict", "softmax", *paths)
    assert code == 0 and len(out.splitlines()) == 3 * 11
    params = fdl.load(runs / "softmax" / "params.safetensors")
    x = images[:3].reshape(3, -1).float() / 255
    expected = (x @ params["1"]["weight"].T + params["1"]["bias"]).softmax(1)
    for i, path in enumerate(paths):
        head, *rows = out.splitlines()[11 * i : 11 * i + 11]
        assert head == f"{path}: {LABELS[int(expected[i].argmax())]}"
        found = {row[:16].strip(): float(row[16:]) for row in rows}
        assert list(found.values()) == sorted(found.values(), reverse=True)
        for label, p in zip(LABELS, expected[i].tolist(), strict=True):
            assert found[label] == pytest.approx(p, abs=1e-4)


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


def test_what_is_transparent_is_black(tmp_path):
    white = np.full((28, 28, 4), 255, np.uint8)
    white[:14, :, 3] = 0
    Image.fromarray(white).save(tmp_path / "it.png")
    image, _ = read_image(tmp_path / "it.png")
    assert (image[:14] == 0).all() and (image[14:] == 255).all()


def test_another_size_is_resized_and_said(run, tmp_path):
    path = tmp_path / "it.png"
    Image.fromarray(np.full((300, 56), 80, np.uint8)).save(path)
    image, _ = read_image(path)
    assert image.shape == (28, 28) and (image == 80).all()
    _, out, _ = run("predict", "softmax", path)
    assert "(resized from 56 × 300 to 28 × 28)" in out.splitlines()[0]


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
        ("empty", "it.png is not a PNG file"),
        ("jpeg", "it.png is not a PNG file"),
        ("cut", "it.png cannot be read: "),
        ("flipped", "it.png cannot be read: "),
        ("enormous", "it.png is too large: "),
    ],
)
def test_what_is_no_image_is_one_clear_message(run, tmp_path, what, message):
    path = tmp_path / "it.png"
    noise = np.random.default_rng(0).integers(0, 255, (28, 28), np.uint8)
    if what == "folder":
        path.mkdir()
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "jpeg":
        Image.fromarray(noise).save(path, format="JPEG")
    elif what == "enormous":
        enormous(path)
    elif what != "absent":
        Image.fromarray(noise).save(path)
        content = bytearray(path.read_bytes())
        content[60] ^= 1
        path.write_bytes(content[:-200] if what == "cut" else content)
    code, out, err = run("predict", "softmax", path)
    assert code == 2 and message in err and not out


@pytest.mark.parametrize(
    "args, message",
    [
        (["predict", "linreg", "it.png"], "predict needs a run on images, linreg is one of linreg"),
        (["predict", "nowhere", "it.png"], "nowhere holds no run"),
        (["predict", "softmax"], "predict needs at least one image"),
        (["eval", "nowhere"], "nowhere holds no run: there is no nowhere/config.json"),
        (["eval", "linreg", "--data", "sample"], "--data: linreg is a run of linreg, on drawn"),
        (["eval", "softmax", "--data", "nowhere"], "--data must be auto, sample or a folder"),
        (["eval", "softmax", "--device", "gpu"], "--device must be auto, cpu, cuda"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_argument_is_one_clear_message(run, args, message):
    code, out, err = run(*args)
    assert code == 2 and message in err and not out


def test_a_run_without_a_checkpoint(run, runs):
    hidden = runs / "hidden"
    (runs / "linreg" / "checkpoints").rename(hidden)
    code, _, err = run("eval", "linreg")
    hidden.rename(runs / "linreg" / "checkpoints")
    assert code == 2 and "linreg holds no checkpoint yet" in err
