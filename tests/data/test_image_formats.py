"""Fashion-MNIST in the formats that people have, against the IDX files of the full set."""

import hashlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fdl import data
from fdl.data import _fashion_mnist_download
from tests.data.test_fashion_mnist import IMAGES, LABELS, RAW, idx, needs_full_data, put

GENERATOR = np.random.default_rng(0)
X = GENERATOR.integers(0, 256, (20, 28, 28), dtype=np.uint8)
Y = GENERATOR.integers(0, 10, 20, dtype=np.uint8)
EMPTY = np.zeros((0, 28, 28), np.uint8), np.zeros(0, np.uint8)


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let twenty made-up images stand for both splits, in an empty working directory."""
    digests = {
        name.replace("t10k", split): hashlib.md5(idx(part)).hexdigest()
        for name, part in ((IMAGES, X), (LABELS, Y))
        for split in ("t10k", "train")
    }
    monkeypatch.setattr(_fashion_mnist_download, "_FULL", digests)
    monkeypatch.setattr(_fashion_mnist_download, "_SYSTEM_FOLDER", tmp_path / "system")
    monkeypatch.chdir(tmp_path)


def read(root: str | Path, train: bool = False) -> data.Dataset:
    return data.fashion_mnist(root, train=train, download=False)


def check(got: data.Dataset) -> None:
    assert (got.x.dtype, got.y.dtype) == (torch.uint8, torch.int64)
    assert np.array_equal(got.x.numpy(), X)
    assert np.array_equal(got.y.numpy(), Y)
    got.x.zero_()
    got.y.zero_()


def npz(path: str | Path, x: Any = X, y: Any = Y, save: Any = np.savez, **more: Any) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save(path, x_train=x, y_train=y, x_test=x, y_test=y, **more)
    return Path(path)


def png(image: np.ndarray, mode: str = "L", kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).convert(mode).save(content, kind)
    return content.getvalue()


def parquet(path: str | Path, images: Sequence[Any], labels: Sequence[Any], **names: str) -> Path:
    """Write a file as the hub of Hugging Face serves it, with its metadata."""
    arrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    columns = {names.get("image", "image"): images, names.get("label", "label"): labels}
    table = arrow.table(columns).replace_schema_metadata({"huggingface": '{"info": {}}'})
    write_table(table, path)
    return Path(path)


def structs(images: np.ndarray) -> list[dict[str, Any]]:
    return [{"bytes": png(image), "path": None} for image in images]


# Every format gives the same tensors


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: (x, y),
        lambda x, y: (x[..., None], y.astype(np.int64)),
        lambda x, y: (np.asfortranarray(x), y.astype(">i2")),
    ],
    ids=["as-keras", "with-a-channel", "other-orders"],
)
def test_npz(save: Any, form: Callable[..., Any]) -> None:
    path = npz("mine/fashion.npz", *form(X, Y), save, more=np.zeros(3))
    for train in (True, False):
        check(read("mine", train))
        check(read(path, train))


def test_the_npz_with_the_right_names_is_taken() -> None:
    np.savez("a.npz", x=X)
    Path("b.npz").write_bytes(b"not an archive")
    npz("c.npz")
    check(read("."))


@pytest.mark.parametrize(
    "name",
    [
        "{}-00000-of-00001.parquet",
        "fashion_mnist/{}-00000-of-00001.parquet",
        "data/{}-00000-of-00001.parquet",
        "fashion_mnist/{}/0000.parquet",
        "{}.parquet",
    ],
)
def test_parquet(name: str) -> None:
    for split in ("train", "test"):
        parquet(Path("mine", name.format(split)), structs(X), Y.tolist())
    for train in (True, False):
        check(read("mine", train))


def test_parquet_of_bare_bytes_and_in_several_files() -> None:
    for i, rows in enumerate((slice(0, 7), slice(7, 19), slice(19, 20))):
        parquet(f"mine/test-{i:05d}-of-00003.parquet", [png(x) for x in X[rows]], Y[rows].tolist())
    check(read("mine"))


@pytest.mark.slow
@needs_full_data
@pytest.mark.parametrize("kind", ["npz", "parquet", "keras-folder"])
def test_the_full_test_set_in_each_format(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    expected = data.fashion_mnist(train=False, download=False)
    x, y = expected.x.numpy(), expected.y.numpy()
    if kind == "npz":
        np.savez_compressed(tmp_path / "it.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    elif kind == "parquet":
        parquet(tmp_path / "test-00000-of-00001.parquet", structs(x), y.tolist())
    else:
        files = {IMAGES: idx(x), LABELS: idx(y.astype(np.uint8))}
        put(tmp_path, files, zipped=True)  # as ~/.keras/datasets/fashion-mnist
    got = read(tmp_path)
    assert torch.equal(got.x, expected.x)
    assert torch.equal(got.y, expected.y)


def test_idx_files_come_before_other_formats_and_root_before_its_folders() -> None:
    npz("mine/it.npz", 255 - X)
    put("mine" / RAW, {IMAGES: idx(X), LABELS: idx(Y)})
    check(read("mine"))


def test_files_beside_the_program_are_not_taken_unasked() -> None:
    put(Path("system"), {IMAGES: idx(X), LABELS: idx(Y)})
    npz("data/other.npz", 255 - X)
    put(Path("data"), {IMAGES: idx(255 - X), LABELS: idx(Y)})
    check(data.fashion_mnist(train=False, download=False))


# What is not Fashion-MNIST


class Opens:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("opened", "w")


FLOATS = "expected uint8 .n, 28, 28. in x_test, got float32 .20, 28, 28."
NPZ: dict[str, tuple[dict[str, Any], str]] = {
    "floats": ({"x": X.astype(np.float32)}, FLOATS),
    "flat": ({"x": X.reshape(20, 784)}, r"in x_test, got uint8 \[20, 784\]"),
    "wide": ({"x": np.zeros((20, 32, 32), np.uint8)}, r"got uint8 \[20, 32, 32\]"),
    "three-channels": ({"x": np.zeros((20, 28, 28, 3), np.uint8)}, r"got uint8 \[20, 28, 28, 3\]"),
    "objects": ({"x": np.array([Opens()] * 20)}, r"in x_test, got object \[20\]"),
    "object-labels": ({"y": np.array([Opens()] * 20)}, r"integers .n. in y_test, got object"),
    "float-labels": ({"y": Y.astype(np.float64)}, r"integers .n. in y_test, got float64 \[20\]"),
    "one-hot": ({"y": np.eye(10, dtype=np.uint8)[Y]}, r"in y_test, got uint8 \[20, 10\]"),
    "large-labels": ({"y": Y.astype(np.int64) + 1}, "labels 0 to 9 in y_test, got 1 to 10"),
    "negative-labels": ({"y": Y.astype(np.int64) - 1}, "labels 0 to 9 in y_test, got -1 to 8"),
    "labels-beyond-a-byte": ({"y": Y.astype(np.int64) + 256}, "got 256 to 265"),
    "too-few": ({"x": X[:19], "y": Y[:19]}, "the images with the MD5 .*, got 19 with the MD5"),
    "fewer-labels": ({"y": Y[:19]}, "the labels with the MD5 .*, got 19 with the MD5"),
    "other-order": ({"x": X[::-1]}, "the images with the MD5 .*, got 20 with the MD5"),
    "none": ({"x": EMPTY[0], "y": EMPTY[1]}, "the images with the MD5 .*, got 0 with"),
}


@pytest.mark.parametrize(("change", "message"), NPZ.values(), ids=NPZ)
def test_npz_with_other_arrays_is_refused(change: dict[str, Any], message: str) -> None:
    npz("mine/it.npz", **change)
    with pytest.raises(ValueError, match=f"^mine/it.npz is damaged, or not .*: .*{message}.*; rem"):
        read("mine")
    assert not Path("opened").exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_npz_is_an_error_and_never_other_numbers(save: Any) -> None:
    whole = npz("mine/it.npz", save=save).read_bytes()
    offsets = [*range(0, len(whole), 997), *range(len(whole) - 200, len(whole), 7)]
    for at in offsets:
        for content in (whole[:at], whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]):
            Path("mine/it.npz").write_bytes(content)
            try:
                got = read("mine")
            except (ValueError, FileNotFoundError) as error:
                assert str(error).startswith(("mine/it.npz is", "fashion_mnist: found no readable"))
            else:
                check(got)  # a byte that stands for nothing, such as a time


def test_an_npz_that_claims_more_than_there_is_takes_no_memory() -> None:
    import zipfile

    header = io.BytesIO()
    form = {"descr": "|u1", "fortran_order": False, "shape": (10**12, 28, 28)}
    np.lib.format.write_array_header_1_0(header, form)
    Path("mine").mkdir()
    with zipfile.ZipFile("mine/it.npz", "w") as archive:
        for name in ("x_test", "y_test"):
            archive.writestr(f"{name}.npy", header.getvalue())
    with pytest.raises(ValueError, match="at most a billion numbers in x_test"):
        read("mine")


PARQUET: dict[str, tuple[Any, Any, dict[str, str], str]] = {
    "jpeg": ([png(x, kind="JPEG") for x in X], Y, {}, "PNG bytes in each row of image"),
    "colours": ([png(x, "RGB") for x in X], Y, {}, r"grey images of 28 × 28, got RGB \(28, 28\)"),
    "size": ([png(x[:14]) for x in X], Y, {}, r"grey images of 28 × 28, got L \(28, 14\)"),
    "cut": ([png(x)[:60] for x in X], Y, {}, "PNG bytes in each row of image, got"),
    "numbers": ([1] * 20, Y, {}, "PNG bytes in each row of image, got int"),
    "nothing": ([None] * 20, Y, {}, "PNG bytes in each row of image, got NoneType"),
    "names": ([png(x) for x in X], Y, {"image": "pixels"}, r"columns image and label, got \['pix"),
    "texts": ([png(x) for x in X], ["a"] * 20, {}, "an integer in each row of label"),
    "absent": ([png(x) for x in X], [None] * 20, {}, "an integer in each row of label"),
    "labels": ([png(x) for x in X], Y + np.int64(300), {}, "labels 0 to 9 in label, got 300 to"),
    "fewer": ([png(x) for x in X[:9]], Y[:9], {}, "the images with the MD5 .*, got 9 with"),
}


@pytest.mark.parametrize(("images", "labels", "names", "message"), PARQUET.values(), ids=PARQUET)
def test_parquet_with_other_contents_is_refused(
    images: Any, labels: Any, names: dict[str, str], message: str
) -> None:
    path = parquet("mine/test-00000-of-00001.parquet", images, list(labels), **names)
    with pytest.raises(ValueError, match=f"^{path} is damaged, or not .*: .*{message}.*; remove"):
        read("mine")


@pytest.mark.parametrize("damage", [lambda c: c[:-9], lambda c: c[:50], lambda c: b"", os.urandom])
def test_damaged_parquet_is_refused(damage: Any) -> None:
    path = parquet("mine/test-00000-of-00001.parquet", structs(X), Y.tolist())
    content = path.read_bytes()
    path.write_bytes(damage(1000 if damage is os.urandom else content))
    with pytest.raises(ValueError, match=f"^{path} is damaged, .*: expected a whole Parquet file"):
        read("mine")


def test_parquet_without_pyarrow_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine").mkdir()
    Path("mine/test-00000-of-00001.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"^mine/test-.*needs pyarrow; `pip install 'fdl.parquet"):
        read("mine")
