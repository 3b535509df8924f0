"""`fdl.data` against torchvision's reader and transform, on real files, whole and broken."""

import gzip
import hashlib
import os
import warnings
from http.client import IncompleteRead
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import FashionMNIST
from torchvision.datasets.mnist import read_image_file, read_label_file

from fdl import data
from fdl.data import _fashion_mnist_download, _image_formats

SYSTEM = Path("/usr/share/datasets/fashion-mnist")
RAW = Path("FashionMNIST", "raw")
IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
SAMPLE = Path(data.__file__).parent / "fashion_mnist_sample"
SPLITS = pytest.mark.parametrize("train", [True, False], ids=["train", "test"])

needs_full_data = pytest.mark.skipif(
    not all((SYSTEM / f"{name}.gz").is_file() for name in _fashion_mnist_download._FULL),
    reason=f"needs the full Fashion-MNIST in {SYSTEM} (apt install dataset-fashion-mnist)",
)


def idx(array: np.ndarray) -> bytes:
    """The bytes of an IDX file, written here independently of the reader under test."""
    header = bytes([0, 0, 8, array.ndim])
    return header + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Twenty made-up images and labels that stand for the test files, digests included."""
    generator = np.random.default_rng(0)
    files = {
        IMAGES: idx(generator.integers(0, 256, (20, 28, 28), dtype=np.uint8)),
        LABELS: idx(generator.integers(0, 10, 20, dtype=np.uint8)),
    }
    digests = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(_fashion_mnist_download, "_FULL", digests)
    return files


@pytest.fixture(autouse=True)
def isolated(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """An empty working directory, no system folder, no network; lists where a download went."""
    calls: list[str] = []

    def no_network(self: FashionMNIST) -> None:
        calls.append(str(self.root))
        reason = "<urlopen error Temporary failure in name resolution>"
        print(f"Downloading http://one/{IMAGES}.gz")
        print(f"Failed to download (trying next):\n{reason}")
        hosts = "".join(f"Tried http://{host}/, got:\n{reason}\n" for host in ("one", "two"))
        raise RuntimeError(f"Error downloading {IMAGES}.gz:\n{hosts}")

    monkeypatch.setattr(FashionMNIST, "download", no_network)
    monkeypatch.chdir(tmp_path)
    if "small" in request.fixturenames:
        monkeypatch.setattr(_fashion_mnist_download, "_SYSTEM_FOLDER", tmp_path / "system")
    return calls


def put(folder: Path, files: dict[str, bytes], *, zipped: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(content) if zipped else content)


def read_test(root: str | Path | None = None, *, download: bool = False) -> data.Dataset:
    return data.fashion_mnist(root, train=False, download=download)


def same(got: data.Dataset, files: dict[str, bytes]) -> bool:
    return (
        got.x.numpy().tobytes() == files[IMAGES][16:]
        and got.y.to(torch.uint8).numpy().tobytes() == files[LABELS][8:]
    )


# The files


@pytest.mark.slow
@pytest.mark.curriculum("D1")
@needs_full_data
@SPLITS
def test_full_set_equals_torchvision(train: bool, tmp_path: Path) -> None:
    raw = tmp_path / RAW
    raw.mkdir(parents=True)
    for name in _fashion_mnist_download._FULL:  # torchvision looks for all four, unpacked
        (raw / name).write_bytes(gzip.decompress((SYSTEM / f"{name}.gz").read_bytes()))
    theirs = FashionMNIST(tmp_path, train=train)
    for ours in (data.fashion_mnist(train=train), data.fashion_mnist(tmp_path, train=train)):
        assert ours.x.shape == (60_000 if train else 10_000, 28, 28)
        assert ours.x.dtype == torch.uint8
        assert ours.y.dtype == torch.int64
        assert torch.equal(ours.x, theirs.data)
        assert torch.equal(ours.y, theirs.targets)


@needs_full_data
def test_recorded_digests_are_those_of_the_official_archives() -> None:
    # Debian's archives are the official ones without file name and time. With these put back into
    # the gzip header they have the MD5 that torchvision lists, so what is inside is official.
    times = {"t10k": 1504176627, "train": 1504176606}
    official = {name.removesuffix(".gz"): md5 for name, md5 in FashionMNIST.resources}
    assert official.keys() == _fashion_mnist_download._FULL.keys()
    for name, digest in _fashion_mnist_download._FULL.items():
        archive = (SYSTEM / f"{name}.gz").read_bytes()
        assert hashlib.md5(gzip.decompress(archive)).hexdigest() == digest
        if archive[3] == 0:  # this header has no name
            time = times[name.partition("-")[0]].to_bytes(4, "little")
            header = b"\x1f\x8b\x08\x08" + time + archive[8:10] + name.encode() + b"\0"
            archive = header + archive[10:]
        assert hashlib.md5(archive).hexdigest() == official[name]


def test_labels_are_torchvisions_in_lower_case() -> None:
    assert [name.lower() for name in FashionMNIST.classes] == list(data.LABELS)


@pytest.mark.parametrize("zipped", [False, True], ids=["unpacked", "gz"])
@pytest.mark.parametrize("folder", ["mine", f"mine/{RAW}", "mine/raw", f"data/{RAW}", "system"])
def test_every_place_is_searched(folder: str, zipped: bool, small: dict[str, bytes]) -> None:
    put(Path(folder), small, zipped=zipped)
    assert same(read_test("mine"), small)
    assert same(read_test(Path("mine")), small)


def test_root_comes_before_the_other_places(small: dict[str, bytes]) -> None:
    broken = {name: content[:-1] for name, content in small.items()}
    folders = [Path("mine"), "mine" / RAW, "data" / RAW, Path("system")]
    put(folders[-1], broken)
    for folder in reversed(folders[:-1]):
        put(folder, small)  # found before everything that is broken
        assert same(read_test("mine"), small)
        put(folder, broken)
        with pytest.raises(ValueError, match=rf"^{folder}/t10k-images-idx3-ubyte is dam"):
            read_test("mine")


def test_arrays_can_be_written_to_without_warning(small: dict[str, bytes]) -> None:
    put(Path("mine"), small)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x, _ = read_test("mine")
        x.zero_()
    assert same(read_test("mine"), small)


@pytest.mark.parametrize(
    ("debian", "user", "command"),
    [
        ("/", 0, "apt install dataset-fashion-mnist"),
        ("/", 1000, "sudo apt install dataset-fashion-mnist"),
        ("/absent", 0, "torchvision.datasets.FashionMNIST('data', download=True)"),
    ],
)
def test_absent_images_name_the_places_and_the_way_to_get_them(
    debian: str,
    user: int,
    command: str,
    small: dict[str, bytes],
    isolated: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_fashion_mnist_download, "_DEBIAN", Path(debian))
    monkeypatch.setattr(os, "geteuid", lambda: user)
    with pytest.raises(FileNotFoundError) as info:
        read_test("mine")
    found, way = str(info.value).splitlines()
    assert found == f"fashion_mnist: found no images in mine, data/{RAW}, {tmp_path / 'system'}"
    assert way == (f"`{command}` provides it, or pass the folder that contains it as root")
    assert isolated == []


def test_a_root_with_other_things_is_an_error_that_lists_them_and_what_can_be_read(
    small: dict[str, bytes], tmp_path: Path
) -> None:
    put(Path("system"), small)  # what was not asked for does not replace it
    put(Path("mine"), {"photo.jpg": b"", LABELS: small[LABELS], ".hidden": b""})
    np.savez("mine/mine.npz", x=np.zeros(3), y=np.zeros(3))
    with pytest.raises(FileNotFoundError) as info:
        read_test("mine")
    found, what, *accepted = str(info.value).splitlines()
    assert found == (
        "fashion_mnist: found no readable images in mine: mine.npz, photo.jpg, " + LABELS
    )
    assert what == "readable are"
    assert "\n".join(accepted) == _image_formats.ACCEPTED
    for name in ("t10k-labels-idx1-ubyte", ".npz", "train-*.parquet", "FashionMNIST/raw"):
        assert name in _image_formats.ACCEPTED
    with pytest.raises(FileNotFoundError, match=r"in mine/photo.jpg: photo.jpg\n"):
        read_test("mine/photo.jpg", download=True)
    for i in range(20):
        Path("mine", f"{i}.jpg").touch()
    with pytest.raises(FileNotFoundError, match=r"\.jpg and 13 more\n"):
        read_test("mine")


@pytest.mark.parametrize("error", [PermissionError, TimeoutError, IncompleteRead])
def test_any_failure_of_a_download_is_reported(
    error: type[Exception], small: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(self: FashionMNIST) -> None:
        raise error(b"what went wrong")

    monkeypatch.setattr(FashionMNIST, "download", download)
    with pytest.raises(FileNotFoundError, match=r"system; downloading it failed: \S"):
        read_test(download=True)


@pytest.mark.parametrize(("root", "goes_to"), [(None, "data"), ("mine", "mine")])
def test_absent_offline_says_that_downloading_failed(
    root: str | None,
    goes_to: str,
    small: dict[str, bytes],
    isolated: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(FileNotFoundError, match="it failed: Temporary failure in name") as info:
        read_test(root, download=True)
    assert len(str(info.value).splitlines()) == 2
    assert capfd.readouterr() == ("", "")
    assert isinstance(info.value.__cause__, RuntimeError)
    assert isolated == [goes_to]


def test_download_is_read_and_not_repeated(
    small: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def download(self: FashionMNIST) -> None:
        calls.append(str(self.root))
        # torchvision reads the training files at once, so they have to be there
        train = {name.replace("t10k", "train"): content for name, content in small.items()}
        put(Path(self.raw_folder), small | train)

    monkeypatch.setattr(FashionMNIST, "download", download)
    for _ in range(2):
        assert same(read_test("mine", download=True), small)
    assert calls == ["mine"]


def flip(content: bytes) -> bytes:
    return content[:500] + bytes([content[500] ^ 1]) + content[501:]


BROKEN = {
    "flipped byte": (
        flip,
        "expected the images with the MD5 [0-9a-f]{32}, got 20 with the MD5 [0-9a-f]{32};",
    ),
    "truncated": (lambda c: c[:-7], "expected 15696 bytes for shape .20, 28, 28., got 15689;"),
    "too long": (lambda c: c + b"\0", "expected 15696 bytes for shape .20, 28, 28., got 15697;"),
    "magic": (lambda c: b"\0\0\x0d" + c[3:], "magic number 0x00000803, got 0x00000d03;"),
    "dimensions": (lambda c: b"\0\0\x08\x01" + c[4:], "number 0x00000803, got 0x00000801;"),
    "header only begun": (lambda c: c[:9], "a header of 16 bytes, got only 9 bytes;"),
    "empty": (lambda c: b"", "a header of 16 bytes, got only 0 bytes;"),
}


@pytest.mark.parametrize("zipped", [False, True], ids=["unpacked", "gz"])
@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_damaged_content(damage, message, zipped, small, isolated) -> None:
    put(Path("mine"), small | {IMAGES: damage(small[IMAGES])}, zipped=zipped)
    put(Path("system"), small)  # a good copy elsewhere must not hide the damage
    name = f"mine/{IMAGES}" + (".gz" if zipped else "")
    with pytest.raises(
        ValueError, match=rf"^{name} is damaged, or not .*: .*{message} remove it; .*provides it"
    ):
        read_test("mine", download=True)
    assert isolated == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c[:-100],
        lambda c: c[:6],
        flip,
        lambda c: c[:10] + b"\xff" + c[11:],  # a kind of block that deflate does not have
        lambda c: b"no gzip at all",
    ],
    ids=["cut", "header cut", "flipped byte", "not deflate", "not gzip"],
)
def test_damaged_archive(damage, small) -> None:
    put(Path("mine"), small, zipped=True)
    path = Path("mine", f"{IMAGES}.gz")
    path.write_bytes(damage(path.read_bytes()))
    message = (
        rf"^{path} is damaged, .*: expected a whole gzip file, got \d+ bytes \(.+\); remove it"
    )
    with pytest.raises(ValueError, match=message):
        read_test("mine")


# The sample


@SPLITS
def test_sample_is_stratified_and_equals_torchvisions_reading(train: bool, tmp_path: Path) -> None:
    x, y = data.fashion_mnist_sample(train=train)
    assert (x.dtype, y.dtype) == (torch.uint8, torch.int64)
    assert x.shape == (6_000 if train else 1_000, 28, 28)
    assert y.bincount().tolist() == [600 if train else 100] * 10
    split = "train" if train else "t10k"
    for kind, ours, read in (
        ("images-idx3", x, read_image_file),
        ("labels-idx1", y, read_label_file),
    ):
        path = tmp_path / kind
        path.write_bytes(gzip.decompress((SAMPLE / f"{split}-{kind}-ubyte.gz").read_bytes()))
        assert torch.equal(ours, read(str(path)))


@needs_full_data
@SPLITS
def test_sample_is_rebuilt_from_the_full_set_by_its_rule(train: bool) -> None:
    x, y = (part.numpy() for part in data.fashion_mnist(train=train, download=False))
    k = 600 if train else 100
    seen = [0] * 10
    rows = []
    for row, label in enumerate(y):  # the first k of each class, in the order of the file
        seen[label] += 1
        if seen[label] <= k:
            rows.append(row)
    split = "train" if train else "t10k"
    for kind, part in (("images-idx3", x), ("labels-idx1", y.astype(np.uint8))):
        archive = (SAMPLE / f"{split}-{kind}-ubyte.gz").read_bytes()
        assert gzip.decompress(archive) == idx(part[rows])
        assert archive[3:8] == bytes(5)  # neither name nor time: made again, it is the same file


def test_sample_is_small_and_licensed() -> None:
    assert sum(path.stat().st_size for path in SAMPLE.iterdir()) < 4_000_000
    licence = (SAMPLE / "LICENSE").read_text()
    assert "MIT License" in licence
    assert "Copyright (c) 2017 Zalando SE, https://tech.zalando.com" in licence


def test_broken_sample_says_to_install_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_fashion_mnist_download, "_SAMPLE_FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected t10k-images.*install fdl again"):
        data.fashion_mnist_sample(train=False)
    for path in SAMPLE.glob("*.gz"):
        (tmp_path / path.name).write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"t10k-images.* is damaged, .*; install fdl again"):
        data.fashion_mnist_sample(train=False)
