"""Small files of images in the formats of MNIST, its kin and CIFAR, as torchvision reads them."""

import gzip
import hashlib
import pickle
from pathlib import Path

import numpy as np
from torchvision import datasets

KINDS = {
    name: getattr(datasets, name.upper())
    for name in ("mnist", "kmnist", "emnist", "qmnist", "cifar10", "cifar100")
}


def examples(name, n, seed):
    """Draw images as a screen shows them, and labels that have the largest class among them."""
    rng = np.random.default_rng(seed)
    classes = {"emnist": 47, "cifar100": 100}.get(name, 10)
    shape = (3, 32, 32) if name.startswith("cifar") else (28, 28)
    y = rng.integers(0, classes, n)
    y[0] = classes - 1
    return rng.integers(0, 256, (n, *shape), dtype=np.uint8), y


def idx(array):
    """Make an IDX file: 0, 0, the type (8 is uint8, 12 int32), the axes, their lengths, numbers."""
    kind = {"uint8": 8, "int32": 12}[array.dtype.name]
    big = array.astype(array.dtype.newbyteorder(">"))
    lengths = np.array(array.shape, ">u4")
    return bytes([0, 0, kind, array.ndim]) + lengths.tobytes() + big.tobytes()


def write(root, name, patch, n=(30, 20)):
    """Write a training and a test set into `root`; return both, as pairs of arrays.

    Args:
        root: the folder that torchvision takes.
        name: one of KINDS.
        patch: pytest's monkeypatch, which tells torchvision the checksums of these files.
        n: numbers of examples.
    """
    both = {"train": examples(name, n[0], 0), "test": examples(name, n[1], 1)}
    if name.startswith("cifar"):
        _write_cifar(Path(root), name, both, patch)
    else:
        _write_mnist(Path(root), name, both, patch)
    return list(both.values())


def _write_mnist(root, name, both, patch):
    raw = root / name.upper() / "raw"
    raw.mkdir(parents=True)
    checksums = []
    for part, (x, y) in both.items():
        split = {"emnist": f"emnist-balanced-{part}", "qmnist": f"qmnist-{part}"}.get(
            name, "train" if part == "train" else "t10k"
        )
        labels, end = idx(y.astype(np.uint8)), "labels-idx1-ubyte"
        if name == "emnist":
            x = x.transpose(0, 2, 1)
        if name == "qmnist":  # class, series, writer, …
            labels, end = (
                idx((y[:, None] + np.arange(8) * 1000).astype(np.int32)),
                "labels-idx2-int",
            )
        for file, content in ((f"{split}-images-idx3-ubyte", idx(x)), (f"{split}-{end}", labels)):
            if name in ("emnist", "qmnist"):  # as they are after unpacking
                (raw / file).write_bytes(content)
            else:
                packed = gzip.compress(content)
                (raw / f"{file}.gz").write_bytes(packed)
                checksums.append((f"{file}.gz", hashlib.md5(packed).hexdigest()))
    if checksums:
        patch.setattr(KINDS[name], "resources", checksums)


def _write_cifar(root, name, both, patch):
    kind = KINDS[name]
    folder = root / kind.base_folder
    folder.mkdir(parents=True)

    def dump(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        return [file, hashlib.md5((folder / file).read_bytes()).hexdigest()]

    key = "labels" if name == "cifar10" else "fine_labels"
    for part, files in (("train", kind.train_list), ("test", kind.test_list)):
        x, y = both[part]
        cut = np.array_split(np.arange(len(x)), len(files))
        written = [
            dump(file, {"data": x[rows].reshape(len(rows), -1), key: y[rows].tolist()})
            for (file, _), rows in zip(files, cut, strict=True)
        ]
        patch.setattr(kind, f"{part}_list", written)
    file, md5 = dump(kind.meta["filename"], {kind.meta["key"]: ["a", "b"]})
    patch.setattr(kind, "meta", kind.meta | {"filename": file, "md5": md5})
