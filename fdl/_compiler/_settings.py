"""Settings of torch that the values of a function depend on, besides its arguments.

`jit` compiles a program for each combination of them; `checkpoint` and `backward()` run a function
again under the settings of its first run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from typing import Any, cast

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

Settings = tuple[Any, ...]  # one value for each of SETTINGS

_C: Any = torch._C
_precision = _C._get_fp32_precision_getter  # the older getters raise if both APIs were used
DEVICES = ("cpu", "cuda", "xpu", "mps")  # devices with autocast


def default_device() -> torch.device | None:
    """Return the device of `with torch.device(...)` and `torch.setdefault_device`."""
    if not _C._len_torch_function_stack():
        return None
    contexts = [mode.device for mode in _function_modes() if isinstance(mode, DeviceContext)]
    return contexts[-1] if contexts and contexts[-1].type != "cpu" else None


def _autocast() -> tuple[tuple[bool, torch.dtype], ...]:
    """Return for each device whether autocast is on, and its dtype, which `fn` may use too."""
    if not _C._is_any_autocast_enabled():
        return (False, torch.get_autocast_dtype("cpu")), (False, torch.get_autocast_dtype("cuda"))
    return tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in DEVICES)


# `use_settings` restores the first three; the fourth is `has_grad`.
SETTINGS: dict[str, Callable[[], Any]] = {
    "default device": default_device,
    "autocast": _autocast,
    "default dtype": torch.get_default_dtype,
    "gradients": torch.is_grad_enabled,
    "inference mode": torch.is_inference_mode_enabled,
    "threads": torch.get_num_threads,
    "deterministic algorithms": _C._get_deterministic_algorithms,
    "warnings only": _C._get_deterministic_algorithms_warn_only,
    "float32 products on CUDA": lambda: _precision("cuda", "matmul"),
    "float32 convolutions on CUDA": lambda: _precision("cuda", "conv"),
    "float32 products by oneDNN": lambda: _precision("mkldnn", "matmul"),
    "oneDNN": _C._get_mkldnn_enabled,
    "cuDNN": _C._get_cudnn_enabled,
    "deterministic cuDNN": _C._get_cudnn_deterministic,
    "attention by math": _C._get_math_sdp_enabled,
    "flash attention": _C._get_flash_sdp_enabled,
    "memory-efficient attention": _C._get_mem_efficient_sdp_enabled,
    "attention by cuDNN": _C._get_cudnn_sdp_enabled,
}
_READERS = tuple(SETTINGS.values())


def current_settings() -> Settings:
    """Return the values of all settings; equal settings compute equal values.

    >>> before = current_settings()
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     current_settings() == before
    False
    >>> current_settings() == before
    True
    """
    return tuple([read() for read in _READERS])


def changes(new: Settings, old: Settings) -> list[str]:
    """List the settings that differ.

    >>> before = current_settings()
    >>> with torch.no_grad():
    ...     changes(current_settings(), before)
    ['gradients: False, was True']
    """
    rows = zip(SETTINGS, new, old, strict=True)
    return [f"{name}: {now}, was {before}" for name, now, before in rows if now != before]


@contextmanager
def use_settings(settings: Settings) -> Iterator[None]:
    """Restore the autocast, default dtype and default device of earlier settings.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     settings = current_settings()
    >>> with use_settings(settings):
    ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    torch.bfloat16
    """
    device, autocast, dtype, *_ = now = current_settings()
    if settings[:3] == now[:3]:
        yield
        return
    with ExitStack() as stack:
        if settings[0] != device:
            stack.enter_context(torch.device(settings[0] or "cpu"))
        for kind, old, new in zip_longest(DEVICES, settings[1], autocast):
            if old != new and (old or new[0]):
                on, cast_to = old or (False, None)
                stack.enter_context(torch.autocast(kind, enabled=on, dtype=cast_to))
        if settings[2] != dtype:
            torch.set_default_dtype(settings[2])
            stack.callback(torch.set_default_dtype, dtype)
        yield


def has_grad(settings: Settings) -> bool:
    """Check whether grad mode is on.

    >>> has_grad(current_settings())
    True
    """
    return cast(bool, settings[3])


def is_plain(settings: Settings) -> bool:
    """Check that neither autocast nor a default device changes what operations do."""
    device, autocast, *_ = settings
    return device is None and not any(on for on, _ in autocast)


@contextmanager
def as_written() -> Iterator[None]:
    """Run operations as they are written: without autocast or a default device."""
    with _C._DisableAutocast(), torch.device("cpu"):
        yield


def has_active_mode() -> bool:
    """Check for an active mode that intercepts every operation, such as FlopCounterMode.

    >>> from torch.utils.flop_counter import FlopCounterMode
    >>> with FlopCounterMode(display=False):
    ...     has_active_mode()
    True
    >>> has_active_mode()
    False
    """
    if _C._len_torch_dispatch_stack():
        return True
    if not _C._len_torch_function_stack():
        return False
    return any(not isinstance(mode, DeviceContext) for mode in _function_modes())


def _function_modes() -> list[TorchFunctionMode]:
    return [_C._get_function_stack_at(i) for i in range(_C._len_torch_function_stack())]
