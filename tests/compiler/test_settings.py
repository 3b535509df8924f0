"""Programs depend on torch's settings: each combination has its own."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fdl import jit, scan, transforms, tree
from fdl._compiler._settings import SETTINGS, current_settings, use_settings


@contextmanager
def changed(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def attribute(holder: Any, name: str, value: Any) -> Any:
    return changed(lambda: getattr(holder, name), lambda new: setattr(holder, name, new), value)


@contextmanager
def deterministic(warn_only: bool = False) -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def bfloat16() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def float64() -> Any:
    return changed(torch.get_default_dtype, torch.set_default_dtype, torch.float64)


# How to change each of the settings; `only` those that stand in a group are changed with others.
CHANGES: dict[str, Callable[[], Any]] = {
    "default device": lambda: torch.device("meta"),
    "autocast": bfloat16,
    "default dtype": float64,
    "gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "threads": lambda: changed(torch.get_num_threads, torch.set_num_threads, 2),
    "deterministic algorithms": deterministic,
    "warnings only": lambda: deterministic(warn_only=True),
    "float32 products on CUDA": lambda: attribute(
        torch.backends.cuda.matmul, "fp32_precision", "tf32"
    ),
    "float32 convolutions on CUDA": lambda: attribute(
        torch.backends.cudnn.conv, "fp32_precision", "ieee"
    ),
    "float32 products by oneDNN": lambda: attribute(
        torch.backends.mkldnn.matmul, "fp32_precision", "bf16"
    ),
    "oneDNN": lambda: changed(torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled, False),
    "cuDNN": lambda: torch.backends.cudnn.flags(enabled=False),
    "deterministic cuDNN": lambda: torch.backends.cudnn.flags(deterministic=True),
    "attention by math": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    "flash attention": lambda: sdpa_kernel(SDPBackend.MATH),
    "memory-efficient attention": lambda: sdpa_kernel(SDPBackend.MATH),
    "attention by cuDNN": lambda: sdpa_kernel(SDPBackend.MATH),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_is_seen_by_a_function_that_reads_it(name: str, plain_backend: None) -> None:
    before = SETTINGS[name]()

    def fn(x: Tensor) -> Tensor:
        return x + (0.0 if SETTINGS[name]() == before else 1.0)

    jitted, x = jit(fn), torch.zeros(2)
    for other in (False, True, False, True):
        with CHANGES[name]() if other else nullcontext():
            assert jitted(x).tolist() == [float(other)] * 2
    assert len(jitted.report()) == 2
    assert f"{name}: " in jitted.report()[1].why
    assert current_settings()[list(SETTINGS).index(name)] == before


def both() -> Any:
    stack = ExitStack()
    stack.enter_context(bfloat16())
    stack.enter_context(float64())
    return stack


STATES: dict[str, Callable[[], Any]] = {
    "plain": nullcontext,
    "bfloat16": bfloat16,
    "float16": lambda: torch.autocast("cpu", torch.float16),
    "float64": float64,
    "meta": lambda: torch.device("meta"),
    "both": both,
}
W, X = torch.linspace(-1, 1, 12).view(4, 3), torch.linspace(0, 2, 80).view(20, 4)


def made(w: Tensor, x: Tensor) -> dict[str, Tensor]:
    """What the settings change: a product, a literal, a division of integers."""
    return {"product": x @ w, "ones": torch.ones(2), "half": x.long() / 2}


def derived(w: Tensor, x: Tensor) -> Any:
    return grad(lambda w: (made(w, x)["product"].float() ** 2).sum())(w), made(w, x)


WAYS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "itself": made,
    "scan": lambda w, x: scan(lambda c, row: (c * 0.5, made(c, row)), w, x),
    "grad": derived,
    "vmap": lambda w, x: vmap(lambda row: made(w, row)["product"])(x),
    "inside": lambda w, x: (made(w, x), inside(w, x)),
    "switched off": lambda w, x: (made(w, x), without(w, x)),
    "in place": lambda w, x: torch.zeros(20, 3, device="cpu").add_(1).mul_(made(w, x)["product"]),
    "checkpoint": lambda w, x: transforms.checkpoint(made)(w, x),
}


def inside(w: Tensor, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return made(w, x)


def without(w: Tensor, x: Tensor) -> Any:
    with torch.autocast("cpu", enabled=False):
        return made(w, x)


def assert_same(got: Any, expected: Any, rough: bool = False) -> None:
    for x, y in zip(tree.leaves(got), tree.leaves(expected), strict=True):
        assert (x.dtype, x.shape, x.device) == (y.dtype, y.shape, y.device)
        if not x.is_meta:
            tolerance = 2e-2 if rough or x.dtype in (torch.bfloat16, torch.float16) else 1e-6
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("real_loops")
@pytest.mark.parametrize("state", [name for name in STATES if name != "plain"])
@pytest.mark.parametrize("way", WAYS)
def test_states_in_any_order_equal_eager(
    way: str, state: str, plain_backend: None, count_programs
) -> None:
    before = current_settings()
    for order in ("plain", state, "plain", state), (state, "plain", state):
        jitted, graphs = jit(WAYS[way]), count_programs()
        for now in order:
            with STATES[now]():
                assert_same(jitted(W, X), WAYS[way](W, X))
        assert graphs.count == 2
    assert current_settings() == before


def test_states_in_any_order_compiled() -> None:
    """By Inductor, whose cache on disk ignores some of them."""
    functions = {name: WAYS[name] for name in ("itself", "scan", "grad", "inside", "switched off")}

    def everything(w: Tensor, x: Tensor) -> Any:
        return {name: fn(w, x) for name, fn in functions.items()}

    for order in ("plain", "bfloat16", "float64", "plain"), ("bfloat16", "plain"):
        jitted = jit(everything, strict=True)
        for now in order:
            with STATES[now]():
                assert_same(jitted(W, X), everything(W, X), rough=now == "bfloat16")


@pytest.mark.parametrize("state", ["plain", "bfloat16", "float64", "both"])
@pytest.mark.parametrize("way", ["jit", "checkpoint", "jit of checkpoint"])
def test_a_backward_pass_outside_computes_as_the_forward_pass_inside(
    way: str, state: str, plain_backend: None
) -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        return ((x @ w).sin().sum() * torch.tensor(1 / 3)).float()

    f = {"jit": jit(loss), "checkpoint": transforms.checkpoint(loss)}
    f["jit of checkpoint"] = jit(f["checkpoint"])
    for forward, backward in ((state, "plain"), ("plain", state)):
        w = W.clone().requires_grad_()
        with STATES[forward]():
            values = loss(w, X), f[way](w, X)
        with STATES[backward]():
            expected, got = (torch.autograd.grad(value, w)[0] for value in values)
        close = {"rtol": 0.0, "atol": 0.0 if way == "checkpoint" else 1e-5}
        torch.testing.assert_close(values[1], values[0], **close)
        torch.testing.assert_close(got, expected, **close)


def test_the_cache_of_autocast_takes_nothing_from_a_trace_or_a_recomputation(
    plain_backend: None,
) -> None:
    w = W.clone().requires_grad_()
    with bfloat16():
        with torch.no_grad():
            jit(lambda x: x @ w)(X)
        transforms.checkpoint(lambda w: (X @ w).float().sum())(w).backward()
        first, w.grad = w.grad, None
        (X @ w).float().sum().backward()
    assert first is not None and torch.equal(first, w.grad)


def test_grad_mode_is_that_of_the_call(plain_backend: None) -> None:
    """Autograd turns it off in the forward pass, and when `backward()` runs that again."""
    jitted = jit(lambda w: (w * (2 if torch.is_grad_enabled() else 3)).sum())
    w = W.clone().requires_grad_()
    for _ in range(2):
        value = jitted(w)
        assert torch.equal(value, (W * 2).sum())
        assert torch.autograd.grad(value, w)[0].eq(2).all()
        with torch.no_grad():
            assert torch.equal(jitted(w), (W * 3).sum())


def test_use_settings_restores_earlier_settings_and_then_the_current_ones() -> None:
    states = {}
    for name, state in STATES.items():
        with state():
            states[name] = current_settings()
    for now in STATES:
        with STATES[now]():
            for name, state in states.items():
                with use_settings(state):
                    assert current_settings()[:3] == state[:3]
                    with STATES[name]():
                        expected = made(W, X) if name != "meta" else None
                if expected is not None:
                    with use_settings(state):
                        assert_same(made(W, X), expected)
                assert current_settings() == states[now]


class Counting(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **kwargs or {})


def test_modes_that_watch_operations_see_them(plain_backend: None) -> None:
    """Before and after a program is compiled, which they could not look into."""
    jitted = jit(lambda x: x @ x.T)
    for _ in range(2):
        with FlopCounterMode(display=False) as flops:
            jitted(X)
        assert flops.get_total_flops() == 2 * 20 * 20 * 4
        with Counting() as counting:
            jitted(X)
        assert counting.calls >= 2
        assert_same(jitted(X), X @ X.T)
    assert len(jitted.report()) == 1
