"""Checks of trees that other packages share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from fdl.tree._paths import Tree, dotted


def check_tensors(leaves: Sequence[Any], whole: Tree, what: str) -> None:
    """Raise unless every one of `leaves`, those of `whole`, is a tensor; `what` names the whole."""
    if all(isinstance(leaf, Tensor) for leaf in leaves):
        return
    pairs, _ = pytree.tree_flatten_with_path(whole)
    found = [f"{dotted(p)}: {_shown(leaf)}" for p, leaf in pairs if not isinstance(leaf, Tensor)]
    raise TypeError(
        f"{what} must be a tensor; wrap numbers in torch.tensor, arrays in fdl.interop.from_numpy, "
        "close over what is constant. Not tensors:\n  " + "\n  ".join(found)
    )


def _shown(leaf: Any) -> str:
    """Write what is no tensor; of an array its form, since its values may be many."""
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        return f"{leaf.dtype}{list(leaf.shape)} of {type(leaf).__module__.partition('.')[0]}"
    text = repr(leaf)
    return text if len(text) < 80 else f"{text[:80]}…"
