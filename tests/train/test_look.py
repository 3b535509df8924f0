"""`python -m train look`: the confusion matrix and the images with the largest loss."""

import numpy as np
import pytest
import torch
from PIL import Image

import fdl
from fdl import data
from train import plots


@pytest.mark.slow
def test_it_draws_what_the_weights_confuse(run, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(plots, "draw_mistakes", lambda *parts: given.extend(parts))
    options = ("--data", "sample", "--batch-size", 3000, "--epochs", 1, "--compile", "off")
    assert run("softmax", *options, "--out", "it")[0] == 0
    code, out, err = run("look", "it")
    assert code == 0 and not err
    path, title, matrix, worst, predicted, labels = given
    assert str(path) == "it/look.png" and out.endswith("picture: it/look.png\n")
    assert run("look", "it", "--out", "new/other.png")[1].endswith("picture: new/other.png\n")

    params = fdl.io.load(tmp_path / "it" / "params.safetensors")["1"]
    images, truth = (part.numpy() for part in data.fashion_mnist_sample(train=False))
    x = images.reshape(len(images), -1) / 255.0
    logits = x @ params["weight"].numpy().astype(float).T + params["bias"].numpy().astype(float)
    shifted = logits - logits.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(x)), truth]
    expected = np.zeros((10, 10))
    np.add.at(expected, (truth, logits.argmax(1)), 1)
    assert np.array_equal(matrix.numpy(), expected) and labels == data.LABELS
    order = np.argsort(-losses)[:30]
    assert np.array_equal(worst.x.numpy(), images[order])
    assert np.array_equal(worst.y.numpy(), truth[order])
    assert np.array_equal(predicted.numpy(), logits.argmax(1)[order])

    share = expected.trace() / len(x)
    head, _, first, *_ = out.splitlines()
    assert head.startswith("softmax after step 20, 1,000 test images: loss ")
    assert f"loss {losses.mean():.4f}"[:10] in head and head.endswith(f"accuracy {share:.6g}")
    assert title.endswith(f"accuracy {share:.4f}")
    np.fill_diagonal(expected, 0)
    label, other = np.unravel_index(expected.argmax(), expected.shape)
    assert first.startswith(f"    {labels[label]} for {labels[other]}, {expected.max():.0f} of 100")


def test_it_draws_fewer_images_in_colour_and_more_classes(tmp_path):
    matrix = torch.eye(60, dtype=torch.float64)  # counts of so many would overlap
    matrix[3] = 0  # a class without examples
    worst = data.Dataset(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1]))
    labels = [str(i) for i in range(60)]
    plots.draw_mistakes(tmp_path / "it.png", "", matrix, worst, worst.y, labels)
    with Image.open(tmp_path / "it.png") as picture:
        assert picture.size == (1700, 800)
        colors = np.asarray(picture.convert("RGB"))[100:600, 100:600]
    assert len(np.unique(colors.reshape(-1, 3), axis=0)) > 1


def test_it_needs_a_run_on_images(run):
    assert run("linreg", "--epochs", 1, "--compile", "off", "--out", "lines")[0] == 0
    code, _, err = run("look", "lines")
    assert code == 2 and "look needs a run on images, got lines, a run of linreg" in err
