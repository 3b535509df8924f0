"""Checks of trees for other packages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from fdl._checks import conversion, describe
from fdl.tree._paths import Tree, dotted


def check_tensors(leaves: Sequence[Any], whole: Tree, what: str) -> None:
    """Raise unless all `leaves` of `whole` are tensors; `what` names them in the error."""
    if all(isinstance(leaf, Tensor) for leaf in leaves):
        return
    pairs, _ = pytree.tree_flatten_with_path(whole)
    lines = [f"{dotted(p)}: {_shown(leaf)}" for p, leaf in pairs if not isinstance(leaf, Tensor)]
    raise TypeError(
        f"{what} must be a tensor; wrap numbers in torch.tensor, arrays in fdl.interop.from_numpy, "
        "close over constants. Not tensors:\n  " + "\n  ".join(lines)
    )


def _shown(leaf: Any) -> str:
    """Describe what is not a tensor; of what may be large no values."""
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        return f"{leaf.dtype}{list(leaf.shape)} of {type(leaf).__module__.partition('.')[0]}"
    if how := conversion(leaf):
        return f"{describe(leaf)}; {how}"
    text = repr(leaf)
    return text if len(text) < 80 else f"{text[:80]}…"
