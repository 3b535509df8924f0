"""What a file of `export` says about its program: trees, versions and processor, as JSON.

The file is torch's package of a compiled program, and the description the entry "fdl" of the
metadata in it.
"""

from __future__ import annotations

import io
import json
import platform
import re
import stat
import sys
import zipfile
from collections import namedtuple
from collections.abc import Hashable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdl._compiler._signature import flatten
from fdl._kinds import KINDS, NAMES
from fdl._torch_compat import RELEASE
from fdl._version import __version__
from fdl.io._json import dumps
from fdl.io._schema import Node, as_container, describe, rebuild, walk
from fdl.tree import Tree
from fdl.tree._paths import join
from fdl.tree._summary import dtype_name

FORMAT = 1
ENTRY = "fdl"  # of torch's metadata
FOLDER = "/data/aotinductor/model/"  # of the program, in torch's package
# Features of a processor that compilers use unasked, as Linux names them.
FEATURES = re.compile(r"s?sse|avx|fma|f16c|bmi|abm|popcnt|movbe|cx16|xop|tbm|gfni|amx")


class Leaf(NamedTuple):
    """A tensor among the arguments or results."""

    path: str
    dtype: str
    shape: list[int]
    strides: list[int]

    def describe(self) -> str:
        return f"{self.dtype}{self.shape}"


class About(NamedTuple):
    """The description of a program."""

    format: int
    fdl: str  # the versions that wrote it
    torch: str
    system: str
    machine: str
    features: list[str]  # of the processor
    threads: int
    arguments: Node  # of `fdl/io/_schema.py`: a dict from the name of each argument to its tree
    results: Node
    argument_leaves: list[Leaf]  # in the order in which the program takes them
    result_leaves: list[Leaf]


def about(arguments: dict[str, Tree], results: Tree) -> About:
    """Describe a program that is compiled here.

    Raises:
        TypeError: a container has a type that files do not support, or a key is not a string.
        ValueError: a key is empty, or two places have one path.
    """
    nodes, leaves = [], []
    for tree, what in ((arguments, "the arguments"), (results, "the results")):
        node, tensors = describe_arguments(tree, f"export: {what}")
        nodes.append(node)
        leaves.append([_leaf(path, x) for path, x in tensors.items()])
    versions = FORMAT, __version__, str(torch.__version__)
    return About(*versions, *_machine(), torch.get_num_threads(), *nodes, *leaves)


def describe_arguments(tree: Tree, where: str) -> tuple[Node, dict[str, Tensor]]:
    """Describe a tree as `describe` does, of containers that a program can make again.

    Raises:
        TypeError: it has a mapping other than dict and OrderedDict, too.
    """
    node, tensors = describe(tree, where)
    for path, inner in walk(node):
        container = as_container(inner, path)
        if container and container[0] == "mapping":
            raise TypeError(
                f"{where}: expected a dict, list, tuple, NamedTuple or tensor, got {inner[1]} at "
                f"{path!r}; make it a dict"
            )
    return node, tensors


def _leaf(path: str, x: Tensor) -> Leaf:
    return Leaf(path, dtype_name(x.dtype), list(x.shape), list(x.stride()))


def as_json(program: About) -> str:
    """Write a description as JSON."""
    return dumps(program._asdict())


def _machine() -> tuple[str, str, list[str]]:
    """Return the system, the machine, and the features of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((x for x in lines if x.startswith(("flags", "Features"))), "").partition(":")[2]
    is_arm = platform.machine() in ("aarch64", "arm64")
    features = sorted(x for x in flags.split() if is_arm or FEATURES.match(x))
    return sys.platform, platform.machine(), features


def read(path: Path, where: str) -> tuple[About, dict[str, bytes]]:
    """Read and verify a file.

    Args:
        path: the file.
        where: first words of error messages.

    Returns:
        The description, and the files of the program by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a file of `export`, or damaged.
    """
    if not path.exists():
        raise FileNotFoundError(f"{where}: no such file; write it with fdl.export")
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{where}: it is not a file")
    content = path.read_bytes()
    if content[8:9] == b"{":
        raise ValueError(f"{where}: it is a safetensors file, for fdl.io.load")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            files = {  # each is read whole, and its checksum compared
                name.rpartition("/")[2]: archive.read(name)
                for name in archive.namelist()
                if FOLDER in name
            }
        metadata = [json.loads(x) for name, x in files.items() if name.endswith("_metadata.json")]
    except Exception as error:  # of many types, since `zipfile` trusts the numbers in a file
        raise ValueError(
            f"{where}: it is damaged, or not a file of fdl.export ({error}); export it again"
        ) from None
    text = metadata[0].get(ENTRY) if metadata else None
    if text is None:
        raise ValueError(f"{where}: it is not a file of fdl.export, but another package of torch's")
    return _parse(text, where), files


def _parse(text: str, where: str) -> About:
    try:
        fields = json.loads(text)
        if fields["format"] != FORMAT:
            raise ValueError(
                f"{where}: fdl {fields['fdl']} wrote it in format {fields['format']}, but fdl "
                f"{__version__} reads format {FORMAT}; export it again with this version"
            )
        for name in ("argument_leaves", "result_leaves"):
            fields[name] = [Leaf(*leaf) for leaf in fields[name]]
        return About(**fields)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{where}: its description is malformed ({error})") from None


def check_here(program: About, where: str) -> None:
    """Raise unless a program runs with this release of torch, on this processor.

    Raises:
        RuntimeError: it does not.
    """
    again = "export the function again here"
    if tuple(int(x) for x in program.torch.split(".")[:2]) != RELEASE:
        raise RuntimeError(
            f"{where}: it is for torch {program.torch}, and this is torch {torch.__version__}; "
            f"{again}, or install that release"
        )
    system, machine, features = _machine()
    if (program.system, program.machine) != (system, machine):
        raise RuntimeError(
            f"{where}: it is for {program.system} on {program.machine}, and this is {system} on "
            f"{machine}; {again}"
        )
    missing = [feature for feature in program.features if feature not in features]
    if missing:
        raise RuntimeError(
            f"{where}: it is for a processor with {', '.join(missing)}, which this one lacks; "
            f"{again}, or on a processor like this one"
        )


def kinds(*nodes: Node) -> dict[str, type]:
    """Return the NamedTuples of some structures: fdl's own, or others of the same fields."""
    containers = {}
    for node in nodes:
        for path, inner in walk(node):
            container = as_container(inner, path)
            if container and container[0] not in ("dict", "list", "tuple", "OrderedDict"):
                containers[container[0]] = tuple(container[1])
    return {
        name: known
        if (known := KINDS.get(name)) and known._fields == fields  # type: ignore[attr-defined]
        else _namedtuple(name.rpartition(".")[2], fields)
        for name, fields in containers.items()
    }


@lru_cache
def _namedtuple(name: str, fields: tuple[str, ...]) -> type:
    return namedtuple(name, fields)


def structure(node: Node, known: dict[str, type], first: bool = False) -> Hashable:
    """Return the structure of a tree, as `flatten` does.

    Args:
        node: the tree.
        known: NamedTuples by name.
        first: the tree is a dict of arguments: return the structure of the tuple of its values.
    """
    tree = rebuild(node, lambda _: 0, "", known)  # type: ignore[arg-type,return-value]
    return flatten(tuple(tree.values()) if first else tree)[1]


def by_name(spec: Any) -> Hashable:
    """Replace the NamedTuples in a structure: fdl's by their names, others by their fields."""
    if type(spec) is not tuple or len(spec) < 2:
        return spec  # type: ignore[no-any-return]
    kind, keys, *children = spec
    fields = getattr(kind, "_fields", None)
    return NAMES.get(kind, fields) if fields else kind, keys, *map(by_name, children)


def differences(program: About, args: Sequence[Tree], where: str) -> list[str]:
    """List where arguments have another structure, shape, dtype or device than expected.

    Raises:
        TypeError: a container has a type that files do not support, or a key is not a string.
        ValueError: a key is empty, or two places have one path.
    """
    tree = dict(zip(program.arguments, args, strict=True))
    node, tensors = describe_arguments(tree, where)
    expected = {leaf.path: leaf.describe() for leaf in program.argument_leaves}
    got = {path: _form(leaf) for path, leaf in tensors.items()}
    return _compare("", program.arguments, node, expected, got)


def _form(leaf: Tensor) -> str:
    kind = "" if type(leaf) in (Tensor, torch.nn.Parameter) else f", a {type(leaf).__name__}"
    device = "" if leaf.device.type == "cpu" else f" on {leaf.device}"
    layout = "" if leaf.layout is torch.strided else f", {leaf.layout}"
    return f"{dtype_name(leaf.dtype)}{list(leaf.shape)}{device}{kind}{layout}"


def _compare(
    path: str, old: Node, new: Node, expected: dict[str, str], got: dict[str, str]
) -> list[str]:
    texts = [_text(path, old, expected), _text(path, new, got)]
    if texts[0] != texts[1]:
        return [f"{path}: expected {texts[0]}, got {texts[1]}"]
    (_, before), (_, now) = as_container(old, path) or ("", {}), as_container(new, path) or ("", {})
    lines = []
    for name in {**before, **now}:
        below = join(path, name)
        if name not in now:
            lines.append(f"{below}: missing (expected {_text(below, before[name], expected)})")
        elif name not in before:
            lines.append(f"{below}: unexpected (got {_text(below, now[name], got)})")
        else:
            lines += _compare(below, before[name], now[name], expected, got)
    return lines


def _text(path: str, node: Node, tensors: dict[str, str]) -> str:
    if node == ["tensor"]:
        return tensors[path]
    container = as_container(node, path)
    if container is None:
        return "None" if node is None else f"the {type(node).__name__} {node!r}"
    kind, children = container
    if kind not in KINDS and "." in kind:
        return f"a NamedTuple ({', '.join(children)})"
    return f"a {kind}"
