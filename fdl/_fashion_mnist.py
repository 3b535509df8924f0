"""The files of Fashion-MNIST: where they are, how to get them, and reading them with verification.

The public functions are in `fdl.data`.
"""

import gzip
import hashlib
import math
import zlib
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # images uint8 [n, 28, 28] and labels int64 [n]

# MD5 of the unpacked files, so that a recompressed copy passes too. They belong to the archives
# whose own MD5s torchvision lists as `FashionMNIST.resources`.
_FULL = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
_SAMPLE = {
    "train-images-idx3-ubyte": "cae7193a8e3dd75966f4b1f38d78ca94",
    "train-labels-idx1-ubyte": "1641b7f3205a263b146be7f1df295e66",
    "t10k-images-idx3-ubyte": "c5442ce2f064c32bf3ec2983a505322f",
    "t10k-labels-idx1-ubyte": "a00963b89d54a5ab6dc42b2b2c57c0e7",
}
_SAMPLE_FOLDER = Path(__file__).parent / "fashion_mnist_sample"
_SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_TORCHVISION_ROOT = Path("data")
_TORCHVISION_RAW = Path("FashionMNIST", "raw")


def load(root: str | Path | None, train: bool, download: bool) -> Pair:
    """Read the whole set from the first folder that has it; see `fdl.data.fashion_mnist`."""
    home = _TORCHVISION_ROOT if root is None else Path(root).expanduser()
    own = () if root is None else (home, home / _TORCHVISION_RAW)
    folders = (*own, _TORCHVISION_ROOT / _TORCHVISION_RAW, _SYSTEM_FOLDER)
    names = _file_names(train)
    failure = None
    if download and any(_find(name, folders) is None for name in names):
        failure = _download(home)
    advice = (
        "`apt install dataset-fashion-mnist` (with --reinstall if it is damaged) provides it, and "
        f"so does `torchvision.datasets.FashionMNIST({str(home)!r}, download=True)`"
    )
    paths = []
    for name in names:
        path = _find(name, folders)
        if path is None:
            searched = "".join(f"\n  {folder}" for folder in folders)
            reason = f"\ndownloading it failed: {failure}" if failure else ""
            raise FileNotFoundError(
                f"fashion_mnist: expected {name} or {name}.gz in one of these folders, got it in "
                f"none:{searched}{reason}\n{advice}; or pass the folder that holds it as root"
            ) from failure
        paths.append(path)
    return _read(paths, _FULL, f"remove it and get it anew: {advice}")


def load_sample(train: bool) -> Pair:
    """Read the sample in this package; see `fdl.data.fashion_mnist_sample`."""
    advice = "install fdl again to get it back"
    paths = [_SAMPLE_FOLDER / f"{name}.gz" for name in _file_names(train)]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"fashion_mnist_sample: expected {path}, got no such file; {advice}"
            )
    return _read(paths, _SAMPLE, advice)


def _file_names(train: bool) -> tuple[str, str]:
    split = "train" if train else "t10k"
    return f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte"


def _find(name: str, folders: Sequence[Path]) -> Path | None:
    candidates = (folder / file for folder in folders for file in (name, f"{name}.gz"))
    return next((path for path in candidates if path.is_file()), None)


def _download(root: Path) -> Exception | None:
    """Let torchvision download all files into `root`; returns why that failed, if it did."""
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(root, download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        return error
    return None


def _read(paths: Sequence[Path], digests: Mapping[str, str], advice: str) -> Pair:
    images, labels = (_read_idx(p, digests[p.name.removesuffix(".gz")], advice) for p in paths)
    return (images, labels.to(torch.int64))


def _read_idx(path: Path, md5: str, advice: str) -> Tensor:
    """Read a file of bytes in the IDX format: a magic number, the sizes, the bytes."""

    def damaged(expected: str, got: str) -> ValueError:
        return ValueError(f"{path} is damaged: expected {expected}, got {got}; {advice}")

    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise damaged("a whole gzip file", f"{len(content)} bytes ({error})") from error
    ndim = 3 if "idx3" in path.name else 1
    start = 4 * (1 + ndim)
    if len(content) < start:
        raise damaged(f"a header of {start} bytes", f"only {len(content)} bytes")
    magic, *shape = np.frombuffer(content, ">u4", count=1 + ndim).tolist()
    if magic != 0x0800 + ndim:  # 08: unsigned bytes; then the number of dimensions
        raise damaged(f"the magic number {0x0800 + ndim:#010x}", f"{magic:#010x}")
    if len(content) != start + math.prod(shape):
        raise damaged(f"{start + math.prod(shape)} bytes for shape {shape}", f"{len(content)}")
    got = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if got != md5:
        raise damaged(f"the MD5 {md5}", got)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())
