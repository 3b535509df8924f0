"""Parameter trees on disk: one safetensors file, no pickle, never half-written."""

import os
import secrets
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from fdl import tree
from fdl.tree import Tree

__all__ = ["load", "save"]

FORMAT = "1"


def save(path: str | os.PathLike[str], params: Tree) -> None:
    """Write nested dicts of tensors, dotted paths as names, for any safetensors reader.

    The file appears whole or not at all: a temporary file is written, flushed and renamed. A dict
    without tensors leaves no trace in it.

    Args:
        path: the file; an old one is replaced.
        params: nested dicts of tensors.

    Raises:
        TypeError: a container other than a dict, or a leaf that is not a tensor.
        OSError: the folder cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/w.safetensors", {"fc": {"weight": torch.ones(2)}})
    ...     load(f"{folder}/w.safetensors")
    {'fc': {'weight': tensor([1., 1.])}}
    """
    _check_dicts(params, "")
    # Contiguous copies: two leaves may share memory, and the format stores bytes in order.
    flat = {
        name: leaf.detach().cpu().clone().contiguous()
        for name, leaf in tree.flatten_dict(params).items()
    }
    content = to_bytes(flat, metadata={"format": "pt", "fdl": FORMAT})
    target = Path(path)
    # Opened like any file, so that it gets the usual permissions (those of tempfile are private).
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # so that the new name survives a power cut as well
    finally:
        os.close(folder)


def _check_dicts(node: Tree, path: str) -> None:
    if isinstance(node, dict):
        for name, child in node.items():
            _check_dicts(child, f"{path}.{name}" if path else name)
    elif not isinstance(node, Tensor):
        raise TypeError(
            f"save: expected nested dicts of tensors, got {type(node).__name__} at {path!r}"
        )


def load(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Tree:
    """Read nested dicts of tensors that `save`, or another safetensors writer, wrote.

    Args:
        path: the file.
        device: where the tensors go.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or written by a later version of the format.

    >>> load("absent.safetensors")
    Traceback (most recent call last):
    FileNotFoundError: load: no such file: absent.safetensors
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"load: no such file: {path}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            found = (file.metadata() or {}).get("fdl", FORMAT)
            if found != FORMAT:
                raise ValueError(f"load: {path} has format {found}, this fdl reads {FORMAT}")
            return tree.unflatten_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"load: cannot read {path}: {error}") from error
