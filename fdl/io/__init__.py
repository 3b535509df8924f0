"""Save and load trees: safetensors files with structure, and files of torch.save."""

from __future__ import annotations

from fdl.io._inspect import TreeInfo, inspect
from fdl.io._torch_files import load_torch, save_torch
from fdl.io._tree_file import load, load_matching, save

__all__ = [
    "TreeInfo",
    "inspect",
    "load",
    "load_matching",
    "load_torch",
    "save",
    "save_torch",
]
