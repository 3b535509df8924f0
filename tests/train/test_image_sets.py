"""`--data-set`: every recipe on images takes every data set, and later commands follow it."""

import json
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import models
from fdl import TrainState, data, random, train_step, tree
from fdl.nn import StatefulModel
from models import torch_modules
from tests.support.image_files import KINDS, write
from train import config, recipes, run_folder
from train.image_sets import IMAGE_SETS, load_images
from train.images import read_image

RECIPES = (
    *(config.Softmax, config.Mlp, config.Dropout),
    *(config.LeNet, config.LeNetBN, config.ResnetSmall),
)


@pytest.mark.parametrize("name", KINDS)
def test_every_recipe_takes_a_step_on_every_data_set(name, tmp_path, monkeypatch):
    (x, _), _ = write(tmp_path, name, monkeypatch)
    for kind in RECIPES if name in ("emnist", "cifar10") else RECIPES[:1]:
        options = kind(data=str(tmp_path), data_set=name, batch_size=8)
        problem = recipes.build(options, random.key(0))
        assert torch.equal(problem.train.x, torch.from_numpy(x)) and problem.passes == 1
        assert problem.data.startswith(IMAGE_SETS[name].title) and "30 + 20" in problem.data
        state = TrainState.create(problem.model, problem.opt, key=random.key(1))
        batch = data.to_float(data.batch(problem.train, torch.arange(8)))
        state, metrics = train_step(problem.loss, problem.opt)(state, batch)
        assert 0 < float(metrics["loss"].value) < 20


def test_labels_are_those_of_torchvision():
    sizes = {name: len(known.labels) for name, known in IMAGE_SETS.items()}
    assert sizes == dict.fromkeys(IMAGE_SETS, 10) | {"emnist": 47, "cifar100": 100}
    emnist = torchvision.datasets.EMNIST.classes_split_dict["balanced"]
    assert list(IMAGE_SETS["emnist"].labels) == emnist
    assert list(IMAGE_SETS["kmnist"].labels) == torchvision.datasets.KMNIST.classes
    for name in ("mnist", "qmnist"):
        digits = [label.split(" - ")[0] for label in KINDS[name].classes]
        assert list(IMAGE_SETS[name].labels) == digits
    for name in ("cifar10", "cifar100"):  # both are in the order of the alphabet
        labels = IMAGE_SETS[name].labels
        assert list(labels) == sorted(set(labels))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (models.lenet(7, channels=3, side=32), torch_modules.LeNet(7, 3, 32)),
        (models.lenet_bn(7, channels=3, side=45), torch_modules.LeNetBN(7, 3, 45)),
        (models.resnet(4, 7, channels=3), torch_modules.ResNet(4, 7, 3)),
    ],
    ids=["lenet", "lenet-bn", "resnet"],
)
def test_models_of_other_sizes_equal_their_twins(ours, theirs):
    side = {"LeNet": 32, "LeNetBN": 45}.get(type(theirs).__name__, 20)
    x = random.normal(random.key(0), (2, 3, side, side), dtype=torch.float64)
    theirs = theirs.double()
    params = dict(theirs.named_parameters())
    if isinstance(ours, StatefulModel):
        like, buffers = ours.init(random.key(1))
        y, _ = ours.apply(tree.unflatten_dict(params, like=like), buffers, x, train=True)
    else:
        y = ours.apply(tree.unflatten_dict(params, like=ours.init(random.key(1))), x)
    torch.testing.assert_close(y, theirs(x), rtol=1e-10, atol=1e-12)


def test_only_what_has_a_class_in_a_mirror_is_mirrored(tmp_path, monkeypatch):
    turned = []
    monkeypatch.setattr(data, "random_flip", lambda key, x: turned.append(x) or x)
    for name in ("mnist", "cifar10"):
        write(tmp_path, name, monkeypatch)
        options = config.ResnetSmall(data=str(tmp_path), data_set=name)
        problem = recipes.build(options, random.key(0))
        state = TrainState.create(problem.model, problem.opt, key=random.key(1))
        batch = data.to_float(data.batch(problem.train, torch.arange(2)))
        train_step(problem.loss, problem.opt)(state, batch)
        assert len(turned) == (name == "cifar10")


@pytest.mark.slow
def test_later_commands_follow_the_data_set_of_a_run(run, tmp_path, monkeypatch):
    folder = tmp_path / "files"
    write(folder, "cifar100", monkeypatch)
    where = ("--data", folder)
    options = ("--data-set", "cifar100", *where, "--epochs", 1, "--batch-size", 10)
    code, out, err = run("softmax", *options, "--out", "it")
    assert (code, err) == (0, "") and out.startswith("softmax: CIFAR-100, 30 + 20 images; ")
    assert "usual" not in out
    record = json.loads((tmp_path / "it" / "config.json").read_text())
    assert record["options"]["data_set"] == "cifar100"
    code, out, _ = run("eval", "it")
    assert code == 0 and "CIFAR-100, 30 + 20 images" in out
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "it.png")
    code, out, _ = run("predict", "it", "it.png")
    label = out.splitlines()[0].removeprefix("it.png: ")
    assert code == 0 and label in IMAGE_SETS["cifar100"].labels and len(out.splitlines()) == 12
    assert "resized from 50 × 40 to 32 × 32" in out
    code, _, err = run("softmax", "--resume", "it", "--data-set", "cifar10")
    assert code == 2 and "--data-set is cifar100 in it, got cifar10" in err
    code, out, err = run("softmax", "--resume", "it", "--epochs", 2)
    assert (code, err) == (0, "") and "epoch 2/2" in out
    code, out, _ = run("data", "--data-set", "cifar100", *where)
    assert code == 0 and (tmp_path / "runs/data/images.png").is_file()
    del record["options"]["data_set"]  # as in runs of before
    (tmp_path / "it" / "config.json").write_text(json.dumps(record))
    assert run_folder.read_run(tmp_path / "it").config.data_set == "fashion-mnist"


def test_without_a_network_the_reason_is_on_one_line(run, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    for name in KINDS:
        code, _, err = run("lenet", "--data-set", name)
        last = err.splitlines()[-1]
        assert code == 2 and last.startswith(
            f"error: --data-set {name}: torchvision could neither "
        )
        assert last.endswith("read it from data nor download it: Name or service not known")


def test_wrong_options_and_files_are_named(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"--data sample is a sample of Fashion-MNIST; of .* mnist"
    ):
        load_images("sample", "mnist")
    with pytest.raises(ValueError, match="'nowhere': no such folder"):
        load_images("nowhere", "cifar10")
    write(tmp_path, "qmnist", monkeypatch)
    labels = tmp_path / "QMNIST/raw/qmnist-test-labels-idx2-int"
    content = labels.read_bytes()
    labels.write_bytes(content[:12] + bytes([0, 0, 0, 10]) + content[16:])
    with pytest.raises(
        ValueError, match=r"must hold images \[28, 28\] and labels 0 to 9, got .* 10"
    ):
        load_images(str(tmp_path), "qmnist")
    labels.write_bytes(content[:50])
    with pytest.raises(ValueError, match=r"could neither read it from .* nor download it: ."):
        load_images(str(tmp_path), "qmnist")


@pytest.mark.parametrize("name", IMAGE_SETS)
def test_pictures_become_images_like_those_of_the_data_set(name, tmp_path):
    """A white square on black fills the image up to the margin; a photograph keeps its colours."""
    like = IMAGE_SETS[name]
    pixels = np.zeros((100, 140, 3), np.uint8)
    pixels[30:70, 50:90] = (255, 255, 255) if like.channels == 1 else (200, 10, 90)
    Image.fromarray(pixels).save(tmp_path / "it.png")
    image, _ = read_image(tmp_path / "it.png", "auto", like)
    side, margin = like.side, like.margin
    if like.channels == 3:
        assert image.shape == (3, side, side) and image[:, 16, 16].tolist() == [200, 10, 90]
        assert (image[:, :3] == 0).all() and image.dtype == torch.uint8
        inverted, _ = read_image(tmp_path / "it.png", "on", like)
        assert torch.equal(inverted, 255 - image)
        return
    expected = torch.zeros(side, side, dtype=torch.uint8)
    expected[margin : side - margin, margin : side - margin] = 255
    assert torch.equal(image, expected)


def test_models_say_which_images_are_too_small():
    for model in (models.lenet, models.lenet_bn):
        model(side=16)
        with pytest.raises(ValueError, match=f"{model.__name__}: side must be at least 16, got 15"):
            model(side=15)
