"""Names of entries in the cache of programs: a hash of everything that a program depends on."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Hashable, Sequence
from functools import cache
from hashlib import sha256
from operator import attrgetter, getitem
from pathlib import Path
from typing import Any, cast

import torch
from torch._ops import OpOverload
from torch.backends.cpu import get_cpu_capability
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fdl._compiler._cache import ENTRY
from fdl._compiler._callbacks import CALLBACK
from fdl._compiler._deferred import StandIn
from fdl._compiler._digest import numbers
from fdl._compiler._graph import COND, LOOP, NAMESPACES, WHILE, Verbatim
from fdl._compiler._inductor import sources
from fdl._compiler._signature import signature

COMPILER_VARIABLES = ("CXX", "CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH")
NOT_THESE = ("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR")


def name(graph: GraphModule, donated: Sequence[int], settings: Hashable) -> str | None:
    """Return the name for a program, or None if it cannot be used by another process.

    Args:
        graph: the traced function.
        donated: indices of the arguments whose memory results are written to.
        settings: of torch.
    """
    text = _text(graph)
    parts = repr((text, tuple(donated), settings, _compiler_settings(), _machine()))
    if text is None or " at 0x" in parts:  # objects of this process
        return None
    return sha256(parts.encode()).hexdigest() + ENTRY


def _text(module: GraphModule) -> str | None:
    """Write a graph, or return None if it does more than to compute values."""
    names: dict[Node, str] = {}
    lines: list[str] = []
    for i, node in enumerate(module.graph.nodes):
        names[node] = f"%{i}"
        line = _line(module, node, names)
        if line is None:
            return None
        lines.append(line)
    return "\n".join(lines)


def _line(module: GraphModule, node: Node, names: dict[Node, str]) -> str | None:
    if node.op == "placeholder":
        return repr(signature([node.meta["val"]]))
    if node.op == "get_attr":
        return _attribute(attrgetter(cast(str, node.target))(module))
    if node.op == "call_function" and not _is_known(node):
        return None
    arguments = map_arg((node.args, node.kwargs), lambda z: Verbatim(names[z]))
    return f"{node.target} {arguments!r}"


def _is_known(node: Node) -> bool:
    """Check for an operation of torch or fdl that runs no function of this process."""
    if isinstance(node.target, OpOverload):
        return node.target.namespace in NAMESPACES and node.target != CALLBACK
    return node.target in (getitem, LOOP, COND, WHILE)


def _attribute(value: Any) -> str | None:
    """Describe the body of a loop, or a tensor that the function has made of numbers."""
    if isinstance(value, GraphModule):
        text = _text(value)
        return text and repr(text)  # on one line, or it might be taken for lines around it
    description = numbers(value)
    return None if description is None else repr(description)


def _compiler_settings() -> tuple[Any, ...]:
    """Return what users have set of Inductor, and of the C++ compiler."""
    variables = sorted(
        (key, value)
        for key, value in os.environ.items()
        if key in COMPILER_VARIABLES or ("TORCHINDUCTOR" in key and key.strip("_") not in NOT_THESE)
    )
    config: Any = sys.modules.get("torch._inductor.config")
    if config is None or isinstance(config, StandIn):
        return tuple(variables), ()
    names = sorted(key for key in config._config if _is_set(config, key))
    return tuple(variables), tuple((key, getattr(config, key)) for key in names)


def _is_set(config: Any, key: str) -> bool:
    """Check for a value that is not torch's own; those of caches change no program."""
    if config._is_default(key) or "cache" in key:
        return False
    return bool(getattr(config, key) != config._config[key].default)


@cache
def _machine() -> tuple[Any, ...]:
    """Return the releases that a program was compiled by, and the processor that it is for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    processor = sorted(
        {line for line in lines if line.startswith(("model name", "flags"))} or lines
    )
    torch_release = torch.__version__, torch.version.git_version, torch.__file__
    system = sys.version, sys.platform, platform.machine(), platform.libc_ver()
    return torch_release, system, processor, get_cpu_capability(), sources()
