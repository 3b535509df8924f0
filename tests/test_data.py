"""`fdl.data` against torchvision's reader and transform, on real files, whole and broken."""

import gzip
import hashlib
import warnings
from functools import partial
from http.client import IncompleteRead
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.datasets import FashionMNIST
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.transforms.functional import to_pil_image, to_tensor

from fdl import _fashion_mnist, data, random

SYSTEM = Path("/usr/share/datasets/fashion-mnist")
RAW = Path("FashionMNIST", "raw")
IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
SAMPLE = Path(data.__file__).parent / "fashion_mnist_sample"
SPLITS = pytest.mark.parametrize("train", [True, False], ids=["train", "test"])

# Traced whole, but not compiled to code: keys compile slowly, and their own tests do it.
TRACED = {"fullgraph": True, "backend": "aot_eager"}

needs_full_data = pytest.mark.skipif(
    not all((SYSTEM / f"{name}.gz").is_file() for name in _fashion_mnist._FULL),
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
    monkeypatch.setattr(_fashion_mnist, "_FULL", digests)
    return files


@pytest.fixture(autouse=True)
def isolated(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """An empty working directory, no system folder, no network; lists where a download went."""
    calls: list[str] = []

    def no_network(self: FashionMNIST) -> None:
        calls.append(str(self.root))
        raise RuntimeError("Error downloading: no network")

    monkeypatch.setattr(FashionMNIST, "download", no_network)
    monkeypatch.chdir(tmp_path)
    if "small" in request.fixturenames:
        monkeypatch.setattr(_fashion_mnist, "_SYSTEM_FOLDER", tmp_path / "system")
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


# ---------------------------------------------------------------------------------- the files


@needs_full_data
@SPLITS
def test_full_set_equals_torchvision(train: bool, tmp_path: Path) -> None:
    raw = tmp_path / RAW
    raw.mkdir(parents=True)
    for name in _fashion_mnist._FULL:  # torchvision looks for all four, unpacked
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
    assert official.keys() == _fashion_mnist._FULL.keys()
    for name, digest in _fashion_mnist._FULL.items():
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
@pytest.mark.parametrize("folder", ["mine", f"mine/{RAW}", f"data/{RAW}", "system"])
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
        with pytest.raises(ValueError, match=rf"^{folder}/t10k-images-idx3-ubyte is damaged"):
            read_test("mine")


def test_arrays_can_be_written_to_without_warning(small: dict[str, bytes]) -> None:
    put(Path("mine"), small)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x, _ = read_test("mine")
        x.zero_()
    assert same(read_test("mine"), small)


def test_absent_file_names_itself_the_places_and_the_way_to_get_it(
    small: dict[str, bytes], isolated: list[str], tmp_path: Path
) -> None:
    put(Path("mine"), {IMAGES: small[IMAGES]})
    with pytest.raises(FileNotFoundError, match="expected t10k-labels-idx1-ubyte or t10k") as info:
        read_test("mine")
    text = str(info.value)
    for folder in ("mine", f"mine/{RAW}", f"data/{RAW}", tmp_path / "system"):
        assert f"\n  {folder}\n" in text
    assert "`apt install dataset-fashion-mnist`" in text
    assert "FashionMNIST('mine', download=True)" in text
    assert "downloading" not in text
    assert isolated == []


@pytest.mark.parametrize("error", [PermissionError, TimeoutError, IncompleteRead])
def test_any_failure_of_a_download_is_reported(
    error: type[Exception], small: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(self: FashionMNIST) -> None:
        raise error(b"what went wrong")

    monkeypatch.setattr(FashionMNIST, "download", download)
    with pytest.raises(FileNotFoundError, match=r"(?s)got it in none:.*downloading it failed: "):
        read_test(download=True)


@pytest.mark.parametrize(("root", "goes_to"), [(None, "data"), ("mine", "mine")])
def test_absent_offline_says_that_downloading_failed(
    root: str | None, goes_to: str, small: dict[str, bytes], isolated: list[str]
) -> None:
    with pytest.raises(FileNotFoundError, match="failed: Error downloading: no network") as info:
        read_test(root, download=True)
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
    "flipped byte": (flip, "expected the MD5 [0-9a-f]{32}, got [0-9a-f]{32};"),
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
    with pytest.raises(ValueError, match=rf"^{name} is damaged: .*{message} .*apt install"):
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
    message = rf"^{path} is damaged: expected a whole gzip file, got \d+ bytes \(.+\); remove it"
    with pytest.raises(ValueError, match=message):
        read_test("mine")


# --------------------------------------------------------------------------------- the sample


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
    monkeypatch.setattr(_fashion_mnist, "_SAMPLE_FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected .*/t10k-images.*install fdl again"):
        data.fashion_mnist_sample(train=False)
    for path in SAMPLE.glob("*.gz"):
        (tmp_path / path.name).write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"t10k-images.* is damaged: .*; install fdl again"):
        data.fashion_mnist_sample(train=False)


# ---------------------------------------------------------------------------- made-up examples


def test_synthetic_linear_is_the_stated_model() -> None:
    w, b, noise = torch.tensor([2.0, -3.4, 0.5], dtype=torch.float64), 4.2, 0.3
    x, y = data.synthetic_linear(random.key(1), w, b, 20_000, noise)
    assert (x.shape, y.shape) == ((20_000, 3), (20_000, 1))
    assert x.dtype == y.dtype == torch.float64
    error = (y - torch.nn.functional.linear(x, w[None], torch.tensor([b]).double())) / noise
    columns = torch.cat([x, error], 1)  # independent and N(0, 1), all four
    assert columns.mean(0).abs().max() < 0.03  # 4 standard errors
    torch.testing.assert_close(columns.T.cov(), torch.eye(4).double(), atol=0.05, rtol=0)
    assert 0.67 < (error.abs() < 1).double().mean() < 0.70
    ones = torch.ones(len(x), 1).double()
    found = torch.linalg.lstsq(torch.cat([x, ones], 1), y).solution[:, 0]
    torch.testing.assert_close(found, torch.tensor([2.0, -3.4, 0.5, b]).double(), atol=0.01, rtol=0)


def test_synthetic_linear_repeats_with_its_key_alone() -> None:
    draw = partial(data.synthetic_linear, w=[1.0, 2.0], b=torch.tensor(0.5), n=10, noise=0.1)
    first, again, other = draw(random.key(0)), draw(random.key(0)), draw(random.key(1))
    assert first.x.dtype == first.y.dtype == torch.float32
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.y, again.y)
    assert not torch.equal(first.x, other.x)
    assert not torch.equal(first.y, other.y)


def test_synthetic_linear_draws_noise_apart_from_features() -> None:
    x, y = data.synthetic_linear(random.key(2), [0.0], 0.0, 10_000, 1.0)
    assert torch.cat([x, y], 1).T.corrcoef()[0, 1].abs() < 0.04  # 4 standard errors


def test_synthetic_linear_keeps_the_dtype_of_w_whatever_b_is() -> None:
    w, b = torch.ones(2), torch.tensor([4.0], dtype=torch.float64)
    x, y = data.synthetic_linear(random.key(0), w, b, 5, 0.0)
    assert (x.dtype, y.dtype, y.shape) == (torch.float32, torch.float32, (5, 1))
    torch.testing.assert_close(y, x.sum(1, keepdim=True) + 4)


def test_synthetic_linear_under_vmap_and_compile() -> None:
    draw = partial(data.synthetic_linear, b=1.0, n=30, noise=0.1)
    keys, weights = random.split(random.key(0), 3), torch.arange(6.0).reshape(3, 2)
    together = torch.vmap(draw)(keys, weights)
    compiled = torch.compile(torch.vmap(draw), **TRACED)(keys, weights)
    for i in range(3):
        alone = draw(keys[i], weights[i])
        for field in (0, 1):
            torch.testing.assert_close(together[field][i], alone[field], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(compiled[field][i], alone[field], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"n": 0}, ValueError, "synthetic_linear: n must be at least 1, got 0"),
        ({"n": 2.0}, TypeError, "synthetic_linear: n must be an int, got 2.0"),
        ({"noise": -1.0}, ValueError, "noise must be finite and at least 0, got -1.0"),
        ({"noise": float("nan")}, ValueError, "noise must be finite and at least 0, got nan"),
        ({"w": torch.ones(2, 1)}, ValueError, r"w must have shape \[in\], got \[2, 1\]"),
        ({"b": torch.ones(5)}, ValueError, r"b must be one number, got \[5\]"),
        ({"w": 3.0}, ValueError, r"w must have shape \[in\], got \[\]"),
    ],
)
def test_synthetic_linear_refuses(change, kind, message) -> None:
    with pytest.raises(kind, match=message):
        data.synthetic_linear(
            random.key(0), **{"w": [1.0], "b": 0.0, "n": 5, "noise": 0.0} | change
        )


# --------------------------------------------------------------------------------- the batches


def check_covers(indices: data.Indices, n: int, batch_size: int) -> None:
    index, mask = indices
    assert (index.dtype, mask.dtype) == (torch.int64, torch.bool)
    assert index.shape == mask.shape == ((n + batch_size - 1) // batch_size, batch_size)
    assert sorted(index[mask].tolist()) == list(range(n))
    assert mask.flatten().tolist() == [True] * n + [False] * (mask.numel() - n)
    assert not index[~mask].any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.integers(1, 320))
def test_epoch_takes_every_example_once(seed: int, n: int, batch_size: int) -> None:
    key = random.key(seed)
    padded = data.epoch_indices(key, n, batch_size)
    check_covers(padded, n, batch_size)
    check_covers(data.sequential_indices(n, batch_size), n, batch_size)
    if batch_size <= n:
        index, mask = data.epoch_indices(key, n, batch_size, drop_last=True)
        steps = n // batch_size
        assert index.shape == (steps, batch_size)
        assert mask.shape == (steps, batch_size)
        assert mask.all()
        assert torch.equal(index, padded.index[:steps])


def test_sequential_indices_keep_the_order() -> None:
    index, mask = data.sequential_indices(7, 3, device="cpu")
    assert index.tolist() == [[0, 1, 2], [3, 4, 5], [6, 0, 0]]
    assert mask.tolist() == [[True] * 3, [True] * 3, [True, False, False]]


def test_epoch_depends_on_its_key_alone() -> None:
    key = random.key(3)
    epochs = [data.epoch_indices(random.fold_in(key, e), 1000, 100).index for e in (0, 1, 0)]
    assert torch.equal(epochs[0], epochs[2])
    assert (epochs[0] == epochs[1]).float().mean() < 0.05
    in_order = data.sequential_indices(1000, 100).index
    assert (epochs[0] == in_order).float().mean() < 0.05
    assert torch.equal(epochs[0].flatten(), random.permutation(random.fold_in(key, 0), 1000))


@pytest.mark.parametrize("name", ["n", "batch_size"])
@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (0, ValueError, "{} must be at least 1, got 0"),
        (-3, ValueError, "{} must be at least 1, got -3"),
        (2.5, TypeError, "{} must be an int, got 2.5"),
    ],
)
def test_indices_refuse_bad_counts(name, value, kind, message) -> None:
    counts = {"n": 10, "batch_size": 2} | {name: value}
    with pytest.raises(kind, match="epoch_indices: " + message.format(name)):
        data.epoch_indices(random.key(0), **counts)
    with pytest.raises(kind, match="sequential_indices: " + message.format(name)):
        data.sequential_indices(**counts)


def test_dropping_the_only_batch_is_refused() -> None:
    assert data.epoch_indices(random.key(0), 5, 5, drop_last=True).index.shape == (1, 5)
    with pytest.raises(
        ValueError, match="batch_size must be at most n=5 with drop_last=True, got 6"
    ):
        data.epoch_indices(random.key(0), 5, 6, drop_last=True)


def test_epoch_indices_under_vmap_and_compile() -> None:
    keys = random.split(random.key(0), 3)
    for drop_last in (False, True):
        epoch = partial(data.epoch_indices, n=50, batch_size=8, drop_last=drop_last)
        one_by_one = [epoch(key) for key in keys]
        together = torch.vmap(epoch)(keys)
        compiled = torch.compile(epoch, **TRACED)(keys[1])
        assert isinstance(compiled, data.Indices)
        for field in (0, 1):
            assert torch.equal(together[field], torch.stack([one[field] for one in one_by_one]))
            assert torch.equal(compiled[field], one_by_one[1][field])


def rows(indices: data.Indices) -> list[data.Indices]:
    return [data.Indices(*row) for row in zip(*indices, strict=True)]


@pytest.fixture(scope="module")
def sample() -> data.Dataset:
    return data.fashion_mnist_sample(train=False)


def test_gather_equals_to_tensor(sample: data.Dataset) -> None:
    row = rows(data.epoch_indices(random.key(0), 1000, 64))[-1]
    batch = data.gather(sample, row)
    assert isinstance(batch, data.Batch)
    theirs = torch.stack([to_tensor(to_pil_image(sample.x[i])) for i in row.index])
    assert theirs.shape == (64, 1, 28, 28)
    assert batch.x.dtype == torch.float32
    assert torch.equal(batch.x, theirs)
    assert torch.equal(batch.y, sample.y[row.index])
    assert torch.equal(batch.mask, row.mask)
    assert batch.x.max() == 1
    # images with channels: the same, but the channel axis is there already
    colour = data.gather((sample.x.reshape(500, 2, 28, 28), sample.y[:500]), (row.index // 2, ()))
    assert torch.equal(colour.x[:, 0], (sample.x[row.index // 2 * 2] / 255))
    assert colour.mask == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16])
def test_gather_leaves_what_is_no_image_alone(dtype: torch.dtype) -> None:
    x = torch.arange(40).reshape(10, 4).to(dtype)
    row = data.Indices(torch.tensor([3, 9, 3]), torch.tensor([True, True, False]))
    for features in (x, x.reshape(10, 2, 2), x.to(torch.uint8)):
        batch = data.gather((features, x[:, :1]), row)
        assert batch.x.dtype == features.dtype
        assert torch.equal(batch.x, features[[3, 9, 3]])
        assert torch.equal(batch.y, x[[3, 9, 3], :1])


@pytest.mark.parametrize("indices", [data.sequential_indices(1000, 96), None])
def test_masked_means_over_an_epoch_are_exact(indices, sample: data.Dataset) -> None:
    indices = data.epoch_indices(random.key(5), 1000, 96) if indices is None else indices
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows(indices):
        batch = data.gather(sample, row)
        total += (batch.x.double().mean((1, 2, 3)) * batch.mask).sum()
        count += batch.mask.sum()
    assert count == 1000
    torch.testing.assert_close(total / count, (sample.x.double() / 255).mean(), rtol=1e-6, atol=0)


def test_gather_compiled_equals_eager(sample: data.Dataset) -> None:
    step = torch.compile(data.gather, fullgraph=True)
    for row in rows(data.epoch_indices(random.key(1), 1000, 300)):
        for ours, eager in zip(step(sample, row), data.gather(sample, row), strict=True):
            assert torch.equal(ours, eager)


def test_gather_under_vmap(sample: data.Dataset) -> None:
    indices = data.epoch_indices(random.key(2), 1000, 30)
    members = torch.vmap(data.gather, in_dims=(None, 0))
    population = members(sample, indices)
    compiled = torch.compile(members, fullgraph=True)(sample, indices)
    assert all(torch.equal(*pair) for pair in zip(compiled, population, strict=True))
    assert population.x.shape == (34, 30, 1, 28, 28)
    folds = data.Dataset(sample.x.reshape(4, 250, 28, 28), sample.y.reshape(4, 250))
    row = rows(data.sequential_indices(250, 30))[-1]
    each = torch.vmap(data.gather, in_dims=(0, None))(folds, row)
    for i, one in enumerate(rows(indices)):
        assert torch.equal(population.x[i], data.gather(sample, one).x)
    for i in range(4):
        alone = data.gather((folds.x[i], folds.y[i]), row)
        assert torch.equal(each.x[i], alone.x)
        assert torch.equal(each.y[i], alone.y)


def test_gather_stays_on_the_device(sample: data.Dataset) -> None:
    there = data.Dataset(*(part.to("meta") for part in sample))
    row = rows(data.sequential_indices(1000, 30, device="meta"))[0]
    batch = data.gather(there, row)
    assert {part.device.type for part in batch} == {"meta"}


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"index": torch.tensor([0.0])}, TypeError, "index must be int64, got torch.float32"),
        ({"index": torch.tensor([True])}, TypeError, "index must be int64, got torch.bool"),
        ({"y": torch.zeros(3)}, ValueError, "got 2 in x and 3 in y"),
        (
            {"index": torch.tensor([0], device="meta")},
            ValueError,
            "x on cpu, y on cpu, index on meta; move",
        ),
    ],
)
def test_gather_refuses(change, kind, message) -> None:
    given = {"x": torch.zeros(2, 1), "y": torch.zeros(2), "index": torch.tensor([1])} | change
    with pytest.raises(kind, match=f"gather: .*{message}"):
        data.gather((given["x"], given["y"]), (given["index"], ()))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda(sample: data.Dataset) -> None:
    there = data.Dataset(*(part.cuda() for part in sample))
    indices = data.epoch_indices(random.key(0).cuda(), 1000, 300)
    assert torch.equal(indices.index.cpu(), data.epoch_indices(random.key(0), 1000, 300).index)
    for row in rows(indices):
        batch = data.gather(there, row)
        assert {part.device.type for part in batch} == {"cuda"}
        on_cpu = data.gather(sample, data.Indices(row.index.cpu(), row.mask.cpu()))
        assert torch.equal(batch.x.cpu(), on_cpu.x)
