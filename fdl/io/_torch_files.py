"""Read and write files of `torch.save` as nested parameters, without running code from a file.

`torch.load` runs with `weights_only=True`, which still inflates compressed records and calls
constructors with sizes from the file. So the names in the pickles and the directory of the archive
are checked first.
"""

from __future__ import annotations

import mmap
import os
import pickletools
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fdl._files import atomic_write, expanded
from fdl.tree import Tree, flatten_dict, unflatten_dict
from fdl.tree._paths import join

_ALLOWED = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter)"
    r"|torch(\.storage)? \w*Storage"
    r"|torch\.nn\.parameter Parameter"
    r"|torch (Size|float\w*|bfloat16|u?int\d+|complex\d+|bool)"
)
_NAMING = {"GLOBAL", "INST"}  # opcodes whose argument is a name
_REFUSED = {"STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX"}  # never written by torch


def load_torch(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Tree:
    """Read a file of `torch.save`: a `state_dict` becomes nested parameters, bit by bit.

    Dotted names in dicts become nested dicts; lists, tuples, numbers and strings stay. So do dicts
    with integer keys, as in the `state_dict` of `torch.optim`: from a file
    `{"model": …, "optimizer": …, "epoch": 3}` the optimizer's part can be passed to
    `load_state_dict`, and `optim.from_torch` continues from there. The parameters of a
    `DataParallel` are under "module", those of a compiled module under "_orig_mod".

    Both formats of `torch.save` are read, with `weights_only=True`; code in a file is never run.

    Args:
        path: the file.
        device: device of the tensors.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, compressed, or names anything but tensors and containers.
        TypeError: a key is not a str or int, or a leaf has another type (with its path).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save(torch.nn.Linear(2, 1).state_dict(), f"{folder}/it.pt")
    ...     load_torch(f"{folder}/it.pt").keys()
    dict_keys(['weight', 'bias'])
    """
    path = expanded(path, "load_torch")
    where = f"load_torch: cannot read {path}"
    try:
        with open(path, "rb") as file:
            start = file.read(9)
            if not start:
                raise ValueError("it is empty")
            if start[8:] == b"{":
                raise ValueError("it is a safetensors file, for io.load")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                if start.startswith(b"PK\x03\x04"):
                    _check_archive(file, len(content))
                else:
                    for _ in range(5):  # magic number, version, system, the object, storages
                        _check_pickle(content)
        loaded = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"load_torch: no such file: {path}") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{where}: {error or type(error).__name__}") from error
    return _nested(loaded, "")


def _check_archive(file: Any, size: int) -> None:
    """Raise unless the records of an archive are uncompressed and unique."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("its records are compressed, which torch.save does not do")
        if sum(record.file_size for record in records) > size:
            raise ValueError(f"its records claim more than the {size:,} bytes of the file")
        names = [record.filename for record in records]
        if len(set(names)) != len(names):
            raise ValueError("a record occurs twice")
        pickles = [name for name in names if name.split("/")[-1].endswith(".pkl")]
        if not pickles:
            raise ValueError("it is an archive, but not one of torch.save")
        for name in pickles:
            with archive.open(name) as record:
                _check_pickle(record.read())


def _check_pickle(content: Any) -> None:
    """Raise unless a pickle only names what tensors are made of; it is parsed, never run."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in _REFUSED:
            raise ValueError(f"its pickle has {opcode.name}, which torch.save does not write")
        name = str(argument)
        if opcode.name in _NAMING and not _ALLOWED.fullmatch(name):
            raise ValueError(
                f"its pickle names {name.replace(' ', '.')[:200]!r}, "
                "but only tensors in dicts, lists and tuples are read; if you trust the file, save "
                "the part you need again: "
                "torch.save(torch.load(path, weights_only=False)['model'], other)"
            )


def _nested(node: Any, path: str) -> Tree:
    if isinstance(node, Tensor):
        return node.detach()
    if node is None or type(node) in (bool, int, float, str):
        return node
    if isinstance(node, dict):
        _check_keys(node, path)
        children = {name: _nested(x, join(path, name)) for name, x in node.items()}
        if any(type(name) is int for name in node):
            return children  # the state of an optimizer, by parameter number
        try:
            return unflatten_dict(children)
        except ValueError as error:
            raise ValueError(f"load_torch: at {path!r}: {error}") from error
    if type(node) in (list, tuple, torch.Size):
        kind = list if type(node) is list else tuple
        return kind(_nested(x, join(path, i)) for i, x in enumerate(node))
    raise TypeError(
        f"load_torch: expected a dict, list, tuple, tensor, None, bool, int, float or str, "
        f"got {type(node).__name__} at {path!r}"
    )


def _check_keys(node: dict[Any, Any], path: str) -> None:
    for name in node:
        if type(name) is not int and not (isinstance(name, str) and all(name.split("."))):
            kind = ValueError if isinstance(name, str) else TypeError
            raise kind(
                f"load_torch: a key at {path!r} must be a str with dots between names, or an int, "
                f"got {name!r}"
            )


def save_torch(path: str | os.PathLike[str], params: Tree) -> None:
    """Write nested parameters as a `state_dict`, for `torch.load` and `load_state_dict`.

    The file is written atomically. Dicts without tensors are not stored.

    Args:
        path: the file; an old one is replaced.
        params: nested dicts of tensors, a tensor, or a list or tuple of these.

    Raises:
        TypeError: the tree has anything else (each is listed with its path); `save` stores it.
        ValueError: a dict key is empty or has an empty part between dots, or two leaves have one
            path.
        OSError: the folder cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_torch(f"{folder}/it.pt", {"fc": {"weight": torch.ones(2)}})
    ...     torch.load(f"{folder}/it.pt")
    {'fc.weight': tensor([1., 1.])}
    """
    target = expanded(path, "save_torch", content=params)
    lines = list(_unsupported(params, "", below_dict=False))
    if lines:
        raise TypeError(
            "save_torch: expected nested dicts of tensors, a tensor, or a list or tuple of these, "
            "got:\n  " + "\n  ".join(lines)
        )
    memo: dict[int, Tensor] = {}
    content = _flat(params, memo)
    atomic_write(target, lambda file: torch.save(content, file))


def _unsupported(node: Tree, path: str, below_dict: bool) -> Iterator[str]:
    """Yield the leaves that a `state_dict` does not support, a line each."""
    if type(node) in (list, tuple) and not below_dict:
        for i, child in enumerate(node):
            yield from _unsupported(child, join(path, i), below_dict)
    elif isinstance(node, dict):
        for name, child in node.items():
            yield from _unsupported(child, join(path, str(name)), True)
    elif not isinstance(node, Tensor):
        yield f"{path}: {type(node).__name__}"


def _flat(node: Tree, memo: dict[int, Tensor]) -> Any:
    if isinstance(node, dict):
        return {name: _flat(leaf, memo) for name, leaf in flatten_dict(node).items()}
    if not isinstance(node, Tensor):
        return type(node)(_flat(child, memo) for child in node)
    if id(node) not in memo:
        leaf = node.detach().cpu().resolve_conj().resolve_neg()
        # torch.save would write the whole storage of a view.
        is_view = leaf.untyped_storage().nbytes() != leaf.nbytes
        memo[id(node)] = leaf.clone() if is_view else leaf
    return memo[id(node)]
