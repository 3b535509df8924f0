"""Fashion-MNIST: find, download and verify the files.

The public functions are in `fdl.data`, the file formats in `fdl.data._image_formats`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fdl._files import expanded
from fdl.data import _image_formats
from fdl.data._image_formats import Part, Read

Pair = tuple[Tensor, Tensor]  # images uint8 [n, 28, 28] and labels int64 [n]

# MD5 of the unpacked IDX files; other formats are converted to their bytes first. The files come
# from the archives whose MD5s torchvision lists as `FashionMNIST.resources`.
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
_DEBIAN = Path("/etc/debian_version")  # on Ubuntu as well
_TORCHVISION_ROOT = Path("data")
_TORCHVISION_RAW = Path("FashionMNIST", "raw")


def load(root: str | os.PathLike[str] | None, train: bool, download: bool) -> Pair:
    """Read the complete set from the first place that has it; see `fdl.data.fashion_mnist`."""
    home = _TORCHVISION_ROOT if root is None else expanded(root, "fashion_mnist", "root")
    usual = (_TORCHVISION_ROOT / _TORCHVISION_RAW, _SYSTEM_FOLDER)
    read = _image_formats.find(home, train) if root is not None else None
    if read is None and root is not None and (home.is_file() or not download):
        _check_nothing_else(home)
    for place in usual:  # in IDX files only, since the user did not name these places
        read = read or _image_formats.find_idx(place, train)
    failure = None
    if read is None and download:
        failure = _download(home)
        read = _image_formats.find_idx(home, train)
    if read is None:
        searched = ", ".join(str(place) for place in (() if root is None else (home,)) + usual)
        why = f"; downloading it failed: {one_line(failure)}" if failure else ""
        raise FileNotFoundError(
            f"fashion_mnist: found no images in {searched}{why}\n"
            f"{_how_to_install()}, or pass the folder that contains it as root"
        ) from failure
    return _verified(read, train, _FULL, f"remove it; {_how_to_install('--reinstall ')}")


def load_sample(train: bool) -> Pair:
    """Read the sample in this package; see `fdl.data.fashion_mnist_sample`."""
    advice = "install fdl again to get it back"
    read = _image_formats.find_idx(_SAMPLE_FOLDER, train)
    if read is None:
        names = " and ".join(f"{name}.gz" for name in _image_formats.idx_names(train))
        raise FileNotFoundError(
            f"fashion_mnist_sample: expected {names} in {_SAMPLE_FOLDER}, got no such files; "
            f"{advice}"
        )
    return _verified(read, train, _SAMPLE, advice)


def _verified(read: Read, train: bool, digests: Mapping[str, str], advice: str) -> Pair:
    """Read images and labels, and compare the MD5 of their IDX form, whatever format they have."""
    try:
        images, labels = read()
        for name, part in zip(_image_formats.idx_names(train), (images, labels), strict=True):
            _compare(part, digests[name])
    except ValueError as error:
        raise ValueError(f"{error}; {advice}") from error
    # Copied, since arrays read from bytes are read-only.
    return torch.from_numpy(images[1].copy()), torch.from_numpy(labels[1].astype(np.int64))


def _compare(part: Part, md5: str) -> None:
    path, array = part
    header = np.array([0x0800 + array.ndim, *array.shape], ">u4").tobytes()
    got = hashlib.md5(header + array.tobytes(), usedforsecurity=False).hexdigest()
    if got != md5:
        what = "images" if array.ndim == 3 else "labels"
        raise _image_formats.wrong(
            path, f"the {what} with the MD5 {md5}", f"{len(array)} with the MD5 {got}"
        )


def _check_nothing_else(root: Path) -> None:
    """Raise if `root` contains only other files, which suggests a mistake."""
    if root.is_dir():
        names = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
    else:
        names = [root.name] if root.exists() else []
    if names:
        shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if names[10:] else "")
        raise FileNotFoundError(
            f"fashion_mnist: found no readable images in {root}: {shown}\n"
            f"readable are\n{_image_formats.ACCEPTED}"
        )


def _how_to_install(option: str = "") -> str:
    """Return the command that installs the files on this system."""
    if _DEBIAN.exists():
        sudo = "" if os.geteuid() == 0 else "sudo "
        return f"`{sudo}apt install {option}dataset-fashion-mnist` provides it"
    return "`torchvision.datasets.FashionMNIST('data', download=True)` provides it"


def _download(root: Path) -> Exception | None:
    """Let torchvision download all files into `root`; return the error if that fails."""
    from torchvision.datasets import FashionMNIST

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # prints a line for each address it tries
            FashionMNIST(root, download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        return error
    return None


def one_line(error: Exception) -> str:
    """Return the reason that torchvision gives for the last address it tried.

    >>> one_line(OSError("<urlopen error timed out>"))
    'timed out'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    return last.removeprefix("<urlopen error ").removesuffix(">") if "urlopen" in last else last
