"""Files of Keras: a model with layers of every kind, and what must be refused.

`files/keras_net.py` made the files.
"""

import io
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fdl
from fdl import interop, losses, nn, optim, random, tree
from tests.support.asserts import close

h5py = pytest.importorskip("h5py")
NET = Path(__file__).parent / "files" / "keras_net.keras"
NAMES = {
    name: f"net.{name}"
    for name in ("conv", "norm", "depth", "groups", "up", "inner.mix", "inner.shift")
}
NAMES |= {
    "hidden": "net.hidden",
    "layer": "head.layer",
    "attention": "head.attention",
    "logits": "head.logits",
}
IMAGE = {"hidden": (2, 6, 6)}


def functions():
    """The model of keras_net.py, but for the embedding."""
    inner = nn.sequential(mix=nn.conv2d(3, 2, 1), shift=nn.batch_norm(2, eps=1e-3, momentum=0.01))
    net = nn.sequential(
        pad=lambda x: F.pad(x, (0, 1, 0, 1)),
        conv=nn.conv2d(2, 4, 3, stride=2),
        norm=nn.batch_norm(4, eps=1e-3, momentum=0.01),
        depth=nn.conv2d(4, 8, 3, padding=1, groups=4),
        groups=nn.group_norm(2, 8, eps=1e-3),
        up=nn.conv_transpose2d(8, 3, 2, stride=2),
        inner=inner,
        flatten=nn.flatten(),
        hidden=nn.linear(72, 8),
        tanh=nn.tanh,
    )
    head = nn.sequential(
        layer=nn.layer_norm(4, eps=1e-3),
        attention=nn.multihead_attention(4, 2),
        flatten=nn.flatten(),
        logits=nn.linear(8, 3, bias=False),
    )
    return net, head, nn.embedding(5, 4)


def whole():
    """The model as one: x is a pair of images and ids."""
    net, head, embed = functions()

    def init(key):
        params, buffers = net.init(key)
        params["inner"]["shift"].pop("weight")  # scale=False in Keras: it is 1
        return {"net": params, "head": head.init(key), "embed": embed.init(key)}, {"net": buffers}

    def apply(params, buffers, x, *, train=False, key=None, mask=None):
        ones = {"weight": torch.ones_like(params["net"]["inner"]["shift"]["bias"])}
        inner = params["net"]["inner"]
        filled = params["net"] | {"inner": inner | {"shift": inner["shift"] | ones}}
        hidden, new = net.apply(filled, buffers["net"], x[0], train=train)
        seen = hidden.unflatten(1, (2, 4)) + embed.apply(params["embed"], x[1])
        return head.apply(params["head"], seen), {"net": new}

    return nn.StatefulModel(init, apply)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_a_model_of_every_layer_gives_the_same_and_trains_the_same(suffix):
    model, seen = whole(), fdl.io.load(NET.with_suffix(".safetensors"))
    params, buffers = interop.from_keras(
        NET.with_suffix(suffix), IMAGE, like=model.init(random.key(0)), names=NAMES
    )
    x = seen["image"].movedim(-1, 1), seen["ids"]
    close(model.apply(params, buffers, x)[0], seen["evaluated"], rtol=1e-5, atol=1e-5)
    opt = optim.sgd(0.1)
    state = fdl.TrainState.create(model, opt, key=random.key(0), params=params)
    state = state._replace(buffers=buffers)
    step, found = fdl.train_step(fdl.supervised(model, losses.cross_entropy), opt), []
    for _ in seen["losses"]:
        state, metrics = step(state, (x, seen["labels"]))
        found.append(metrics["loss"].value)
    close(torch.stack(found), seen["losses"], rtol=1e-5, atol=1e-6)


def test_without_like_the_names_are_those_of_the_file():
    found = interop.from_keras(NET, {})
    assert found["inner"]["shift"].keys() == {"bias", "running_mean", "running_var"}
    assert found["depth"]["weight"].shape == (8, 1, 3, 3)
    assert tree.allclose(found, interop.from_keras(NET.with_suffix(".h5"), {}))


def edited(path, change_config=None, change_weights=None, compression=zipfile.ZIP_STORED):
    """Write the file again with changes."""
    with zipfile.ZipFile(NET) as archive:
        config = json.loads(archive.read("config.json"))
        weights = io.BytesIO(archive.read("model.weights.h5"))
    if change_config:
        config = change_config(config) or config
    if change_weights:
        with h5py.File(weights, "r+") as file:
            change_weights(file)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", weights.getvalue())
    return path


def layer(config, name):
    return next(x for x in config["config"]["layers"] if x["config"]["name"] == name)


def replaced(path, **options):
    """Return a change of a dataset: gone, and written again with these options."""

    def change(file):
        del file[path]
        file.create_dataset(path, **options)

    return change


def linked(link):
    def change(file):
        del file["layers/dense/vars/0"]
        file["layers/dense/vars/0"] = link

    return change


CONV = "layers/conv2d/vars/0"
CASES = {
    "an unknown class": (
        lambda c: layer(c, "conv").update(class_name="ConvLSTM2D"), None,
        "no rule for the weights of .*conv2d/vars/0"),
    "a class of somebody": (
        lambda c: layer(c, "norm").update(module="mine"), None,
        r"no rule for the weights of \[\"'norm' \(BatchNormalization\)\"\]"),
    "a subclassed model": (lambda c: c.update(class_name="Mine"), None, "TypeError: it is a Mine"),
    "no layers": (lambda c: {"class_name": "Functional"}, None, "is not what Keras 3 saves"),
    "weights of another": (
        lambda c: layer(c, "hidden")["config"].update(name="other"), None,
        "has the weights of 'hidden'"),
    "a missing array": (
        None, lambda f: f.__delitem__(CONV),
        "no weights of 'conv' .Conv2D. at 'layers/conv2d/vars/0'.*shared by several models"),
    "one array more": (
        None, lambda f: f.create_dataset("layers/dense/vars/2", data=[1.0]),
        "weights of .*'hidden' .Dense"),
    "a soft link": (None, linked(h5py.SoftLink(f"/{CONV}")), "'layers/dense/vars/0' is a link"),
    "a link to a file": (None, linked(h5py.ExternalLink("x.h5", "/a")), "is a link"),
    "a loop": (None, lambda f: f["layers"].__setitem__("again", f["layers"]), "is there twice"),
    "bytes of another file": (
        None, replaced(CONV, shape=(3, 3, 2, 4), dtype="f4", external="/etc/hostname"),
        "not stored in"),
    "a compressed array": (
        None, replaced(CONV, shape=(3, 3, 2, 4), dtype="f4", compression="gzip"), "not stored in"),
    "an array of nothing": (None, replaced(CONV, shape=(2**40,), dtype="f4"), "not stored in"),
    "text": (None, replaced(CONV, data="text"), "has the dtype object"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "weights", "text"), CASES.values(), ids=CASES)
def test_what_must_not_be_read_is_refused(config, weights, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        interop.from_keras(edited(tmp_path / "net.keras", config, weights), IMAGE)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is compressed, which Keras"):
        interop.from_keras(edited(tmp_path / "z.keras", compression=zipfile.ZIP_DEFLATED))
    (tmp_path / "cut.keras").write_bytes(NET.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot read"):
        interop.from_keras(tmp_path / "cut.keras")
    with zipfile.ZipFile(tmp_path / "empty.keras", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(ValueError, match="with 0 times"):
        interop.from_keras(tmp_path / "empty.keras")
    with h5py.File(tmp_path / "net.weights.h5", "w") as file:
        file["layers/dense/vars/0"] = [1.0]
    with pytest.raises(ValueError, match="no configuration that tells"):
        interop.from_keras(tmp_path / "net.weights.h5")
    with pytest.raises(FileNotFoundError, match="from_keras: no such file"):
        interop.from_keras(tmp_path / "none.keras")


def test_flattened_images_need_their_sizes():
    with pytest.raises(ValueError, match=r"\['flatten', 'flatten_1'\] flatten images"):
        interop.from_keras(NET)
    with pytest.raises(ValueError, match=r"image=\(2, 3, 3\)"):
        interop.from_keras(NET, {"hidden": (2, 3, 3)})


def test_an_h5_file_has_names_of_models_in_its_paths_or_none(tmp_path):
    """As Keras writes them for a Sequential, and for a functional model inside another."""
    dense = {"class_name": "Dense", "config": {"name": "dense", "use_bias": False}}
    inner = {"class_name": "Functional", "config": {"name": "inner", "layers": [dense]}}
    config = {"class_name": "Sequential", "config": {"layers": [dense, inner]}}
    with h5py.File(tmp_path / "net.h5", "w") as file:
        file.attrs["model_config"] = json.dumps(config)
        file["model_weights/dense/sequential/dense/kernel"] = [[1.0, 2.0]]
        file["model_weights/inner/dense/kernel"] = [[3.0], [4.0]]
    found = interop.from_keras(tmp_path / "net.h5")
    assert found["dense"]["weight"].tolist() == [[1.0], [2.0]]
    assert found["inner"]["dense"]["weight"].tolist() == [[3.0, 4.0]]
    with h5py.File(tmp_path / "net.h5", "a") as file:
        file["model_weights/inner/other/dense/kernel"] = [[5.0]]
    with pytest.raises(ValueError, match="2 arrays model_weights/inner/…/dense/kernel"):
        interop.from_keras(tmp_path / "net.h5")


def test_bfloat16(tmp_path):
    def change(file):
        import ml_dtypes

        values = file[CONV][()].astype(ml_dtypes.bfloat16)
        del file[CONV]
        file.create_dataset(CONV, data=values).attrs["dtype"] = "bfloat16"

    pytest.importorskip("ml_dtypes")
    wide = interop.from_keras(NET, {})["conv"]["weight"]
    found = interop.from_keras(edited(tmp_path / "net.keras", None, change), {})["conv"]["weight"]
    assert torch.equal(found, wide.bfloat16())


def test_without_h5py(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match="pip install h5py"):
        interop.from_keras(NET)
