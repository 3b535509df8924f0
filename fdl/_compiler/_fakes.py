"""Fake tensors, which have a shape and a dtype but no values."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import _BypassDispatchCache


def fake_mode() -> FakeTensorMode:
    """Make the mode that computes shapes, without the one cached result that is not as computed."""
    mode: Any = FakeTensorMode(allow_non_fake_inputs=True, static_shapes=True)
    validate = mode._validate_cache_key

    def validate_cache_key(func: Any, args: Any, kwargs: Any) -> None:
        # From the cache it has a storage of another size, which a nested jvp refuses.
        if func is torch.ops.aten._new_zeros_with_same_feature_meta.default:
            raise _BypassDispatchCache("its storage is as large as that of its argument")
        validate(func, args, kwargs)

    # No subclass: torch looks up its rules for loops by the exact type of the mode.
    mode._validate_cache_key = validate_cache_key
    return cast(FakeTensorMode, mode)


def fake_like(mode: FakeTensorMode, leaf: Tensor) -> FakeTensor:
    """Make a fake tensor like a real one, with memory of its own.

    Whether arguments share memory does not matter, since none is written to.
    """
    with mode:
        fake = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
    return cast(FakeTensor, fake)


def make_symbols(mode: FakeTensorMode) -> None:
    """Give a mode an environment of symbols, for which torch imports much: few traces need one."""
    if mode.shape_env is None:
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        mode.shape_env = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
