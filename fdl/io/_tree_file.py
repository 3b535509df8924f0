"""Save and load trees as safetensors files: without pickle, written atomically, safe to open.

A file stores the whole tree: structure, tensors to the bit, numbers and strings, and which tensors
are identical. It begins with the SHA-256 of its header, which has one of each tensor; everything
read is verified, and gets memory of its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdl._files import atomic_write, expanded
from fdl.io._compare import describe_paths, differences, narrow_slots, without_containers
from fdl.io._json import as_texts, check, dumps
from fdl.io._reader import File, open_tree_file
from fdl.io._safetensors import FORMAT, NAMES, write_tensors
from fdl.io._schema import describe, later_fields, leaf_value, walk
from fdl.tree import Tree, flatten_dict, unflatten_dict


def save(
    path: str | os.PathLike[str], tree: Tree, *, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a tree to a safetensors file, atomically.

    Any safetensors reader finds the tensors under their dotted paths. Leaves that are one tensor,
    or the same view of one memory, are stored once, under the first path, and are one tensor again
    after `load`. Devices, strides and `requires_grad` are not stored.

    Args:
        path: the file; an old one is replaced, and its permissions are kept. A symbolic link is
            followed.
        tree: nested dicts, lists, tuples and NamedTuples of tensors, None, bool, int, float, str;
            other mappings that torch's pytree knows, such as a TensorDict, are loaded with `like`.
        metadata: further data, which `inspect` returns: dicts and lists of JSON values, NaN and the
            infinities included.

    Raises:
        TypeError: the tree or the metadata has anything else, or tensors that the format does not
            support (each is listed with its path).
        ValueError: a dict key is empty or has an empty part between dots, two places have one path
            (`{"a.b": …, "a": {"b": …}}`), or the nesting is too deep.
        OSError: the file or its folder cannot be written, or `path` is not a regular file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/it.safetensors", {"fc": [torch.ones(2), None], "rate": 0.1})
    ...     load(f"{folder}/it.safetensors")
    {'fc': [tensor([1., 1.]), None], 'rate': 0.1}
    """
    target = expanded(path, "save", content=tree)
    structure, tensors = describe(tree, "save")
    check_storable(tensors, "save")
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(f"save: metadata must be a dict, got {type(metadata).__name__}")
    extra = dict(metadata or {})
    check(extra, "metadata", "save")
    extra, places = as_texts(extra)
    first: dict[Any, str] = {}
    names = {at: first.setdefault(_identity(leaf), at) for at, leaf in tensors.items()}
    meta = {
        "format": "pt",
        "fdl": FORMAT,
        "fdl.tree": _json(structure),
        "fdl.ties": _json({at: name for at, name in names.items() if at != name}),
        "fdl.metadata": _json(extra),
        **({"fdl.floats": _json(places)} if places else {}),
    }
    stored = {name: tensors[name] for name in first.values()}
    atomic_write(target, lambda file: write_tensors(file, stored, meta))


def _json(value: Any) -> str:
    return dumps(value, separators=(",", ":"))


def check_storable(tensors: Mapping[str, Tensor], caller: str) -> None:
    """Raise if the format does not support some tensors.

    Args:
        tensors: the tensors by path.
        caller: first words of the error message.

    Raises:
        TypeError: there are such tensors (each is listed with its path).
    """
    lines = []
    for path, leaf in tensors.items():
        if type(leaf) not in (Tensor, torch.nn.Parameter):
            lines.append(f"{path}: a {type(leaf).__name__}; make it a plain tensor")
        elif leaf.layout != torch.strided:
            lines.append(f"{path}: layout {leaf.layout}; make it dense")
        elif leaf.dtype not in NAMES:
            lines.append(f"{path}: {leaf.dtype}, not in the format; use view_as_real or cast")
        elif leaf.device.type == "meta":
            lines.append(f"{path}: on the device meta, which holds no values")
        elif leaf.dtype == torch.float4_e2m1fn_x2 and leaf.ndim == 0:
            lines.append(f"{path}: a pair of numbers without an axis; add an axis")
        elif path == "__metadata__":
            lines.append(f"{path}: the format reserves this name; rename the leaf")
    if lines:
        raise TypeError(f"{caller}: these tensors cannot be stored:\n  " + "\n  ".join(lines))


def _identity(leaf: Tensor) -> Any:
    """Return a value that is equal for leaves with the same view of the same memory."""
    if leaf.numel() == 0:
        return id(leaf)
    # A lazy conjugate or negative reads the same memory differently.
    view = (leaf.dtype, leaf.shape, leaf.stride(), leaf.device, leaf.is_conj(), leaf.is_neg())
    return leaf.data_ptr(), *view


def load(
    path: str | os.PathLike[str],
    *,
    like: Tree = None,
    device: torch.device | str | None = None,
) -> Tree:
    """Read a tree written by `save` or by another safetensors writer.

    Without `like` the structure comes from the file; a file of another writer gives nested dicts.
    Every byte read is verified by SHA-256. The tensors own their memory: changing them does not
    change the file, nor the other way round.

    Args:
        path: the file.
        like: a tree with the expected structure, shapes and dtypes; its tensors may be on the
            device `meta`. Of Python leaves only the type counts. NamedTuples match by their fields,
            mappings of other libraries match dicts, and keys with dots nested ones.
        device: where the tensors go; by default to the devices of those in `like`, else to the CPU.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, has a later format, does not match `like` (each difference
            is listed with its path), or holds a NamedTuple or a mapping unknown to fdl and there is
            no `like`.

    >>> load("absent.safetensors")
    Traceback (most recent call last):
    FileNotFoundError: load: no such file: absent.safetensors
    """
    with open_tree_file(path, "load") as file:
        if like is None:
            return file.subtree(file.structure, "", device)
        match = _match(file, like, "load")
        if match.differences:
            raise ValueError(
                f"load: {os.fspath(path)} does not match `like` "
                "(load_matching loads the leaves that do):\n  " + "\n  ".join(match.differences)
            )
        return _read(file, match, like, device)


def load_matching(
    path: str | os.PathLike[str], like: Tree, *, device: torch.device | str | None = None
) -> tuple[Tree, list[str]]:
    """Read the leaves of a file that match `like`, and keep the leaves of `like` elsewhere.

    Args:
        path: the file.
        like: a tree with the structure of the result and the leaves to keep.
        device: where the tensors read go; by default to the devices of those in `like`.

    Returns:
        The tree, and the differences between the file and `like`, a line each; `[]` if none.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or has a later format.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/it.safetensors", {"w": torch.ones(2), "b": torch.ones(2)})
    ...     load_matching(f"{folder}/it.safetensors", {"w": torch.zeros(2), "b": torch.zeros(3)})
    ({'w': tensor([1., 1.]), 'b': tensor([0., 0., 0.])}, ['b: expected float32[3], got float32[2]'])
    """
    with open_tree_file(path, "load_matching") as file:
        match = _match(file, like, "load_matching")
        return _read(file, match, like, device), match.differences


class _Match(NamedTuple):
    """The comparison of a file with `like`."""

    differences: list[str]
    tensors: set[str]  # paths of tensors to read
    values: dict[str, Any]  # Python leaves, by path
    defaults: dict[str, Tensor]  # fields that files of earlier versions lack, by path
    narrow: list[str]  # paths of tensors that the file has in 16 bits and `like` in 32


def _match(file: File, like: Tree, caller: str) -> _Match:
    structure, expected = describe(like, f"{caller}: like")
    wanted = describe_paths(structure, expected)
    got = describe_paths(file.structure, file.tensors())
    defaults = {at: new for at, new in later_fields(structure).items() if at not in got}
    wanted = {at: text for at, text in wanted.items() if at not in defaults}
    if not file.has_structure:
        wanted, got = without_containers(wanted), without_containers(got)
    narrow = narrow_slots(structure, wanted, got)
    got |= {at: wanted[at] for at in narrow}
    equal = {at for at in flatten_dict(like) if at in wanted and wanted[at] == got.get(at)}
    values = {
        at: leaf_value(node)
        for at, node in walk(file.structure)
        if at in equal and at not in expected
    }
    tensors = equal & expected.keys()
    return _Match(differences(wanted, got), tensors, values, defaults, narrow)


def _read(file: File, match: _Match, like: Tree, device: torch.device | str | None) -> Tree:
    leaves = flatten_dict(like)
    new = match.tensors | match.defaults.keys()
    target = {at: device or _device(leaves[at]) or "cpu" for at in new}
    read = file.read({at: target[at] for at in leaves if at in match.tensors})
    defaults = {at: default.to(target[at]) for at, default in match.defaults.items()}
    widened = {at: read[at].float() for at in match.narrow}
    return unflatten_dict(leaves | match.values | defaults | read | widened, like=like)


def _device(leaf: Tensor) -> torch.device | None:
    return None if leaf.device.type == "meta" else leaf.device
