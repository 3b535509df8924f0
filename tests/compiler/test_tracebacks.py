"""An error of a jitted function shows the user's lines and nothing of torch and fdl."""

import logging
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from fdl import disable_jit, jit, scan
from fdl._compiler import _inductor

pytestmark = pytest.mark.usefixtures("plain_backend", "real_loops")

X, ROWS = torch.ones(3, 4), torch.zeros(20, 3, 4)


def product(x: Tensor) -> Tensor:
    return x @ torch.ones(7, 2)


def item(x: Tensor) -> Tensor:
    return x * x.sum().item()


def number(x: Tensor) -> Tensor:
    return x * float(x.sum())


def branch(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def assertion(x: Tensor) -> Tensor:
    assert x.sum() > 0
    return x


def formatted(x: Tensor) -> Tensor:
    return x * len(f"{x.sum():.3f}")


def none(x: Tensor) -> Tensor:
    return x + None  # type: ignore[operator]


def mine(x: Tensor) -> Tensor:
    raise KeyError("mine")


WAYS: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Any]]] = {
    "jit": lambda fn: fn,
    "scan": lambda fn: lambda x: scan(lambda c, row: (fn(c).sum() + row, ()), x, ROWS),
    "grad": lambda fn: grad(lambda x: fn(x).sum()),
    "vmap": lambda fn: lambda x: vmap(fn)(x[None]),
    "grad in a scan": lambda fn: (
        lambda x: scan(lambda c, row: (c - grad(lambda c: fn(c).sum())(c), ()), x, ROWS)
    ),
    "scan in grad": lambda fn: grad(
        lambda x: scan(lambda c, row: (fn(c).sum() + row, ()), x, ROWS)[0].sum()
    ),
}
# By the function: the type and the text of its error, or of the one that eager torch raises.
ERRORS: dict[Callable[[Tensor], Tensor], tuple[type[Exception], str]] = {
    product: (RuntimeError, r"\[3, 4\] X \[7, 2\]|\[1, 3, 4\]|cannot be multiplied"),
    item: (RuntimeError, r"asks for the value .* at test_tracebacks\.py:\d+: return x \* x\.sum"),
    number: (RuntimeError, r"asks for the value .* at test_tracebacks\.py:\d+: return x \* float"),
    branch: (RuntimeError, r"asks for the value .*: return x if x\.sum\(\) > 0|data-dependent"),
    assertion: (RuntimeError, r"asks for the value .*: assert x\.sum\(\) > 0|data-dependent"),
    formatted: (RuntimeError, r"asks for the value .*: return x \* len\(f"),
    none: (TypeError, "unsupported operand .* 'Tensor' and 'NoneType'"),
    mine: (KeyError, "mine"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fn", ERRORS)
def test_the_last_frame_is_the_users_line_and_all_frames_are(
    fn: Callable[[Tensor], Tensor],
    way: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    error_type, text = ERRORS[fn]
    if way == "vmap" and fn in (item, number, formatted):
        text += "|vmap"
    with pytest.raises(error_type, match=text) as info:
        jit(WAYS[way](fn))(X)
    assert info.type is error_type
    frames = traceback.extract_tb(info.value.__traceback__)
    assert {frame.filename for frame in frames} == {__file__}
    assert frames[-1].name == fn.__name__
    lines = "".join(traceback.format_exception(info.value)).splitlines()
    assert len(lines) < 40
    assert any(f"{fn.__name__}" in line for line in lines)
    (note,) = (note for note in info.value.__notes__ if "FDL_TRACEBACK=full" in note)
    where = f"test_tracebacks.py:{frames[-1].lineno}: {frames[-1].line}"
    assert where in str(info.value) or note.startswith(f"at {where}")
    # torch would log a traceback before the error.
    assert not [r for r in caplog.records if r.levelno > logging.INFO]
    assert "failed while" not in capfd.readouterr().err


def test_all_frames_are_kept_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDL_TRACEBACK", "full")
    with pytest.raises(RuntimeError) as info:
        jit(product)(X)
    frames = traceback.extract_tb(info.value.__traceback__)
    assert len(frames) > 20 and not hasattr(info.value, "__notes__")


def test_an_error_of_fdl_itself_keeps_its_frames() -> None:
    with pytest.raises(TypeError, match="every leaf of an argument") as info:
        jit(lambda x: x)(3.0)
    assert len(traceback.extract_tb(info.value.__traceback__)) > 2


def test_a_cause_is_shortened_too() -> None:
    def fn(x: Tensor) -> Tensor:
        try:
            return product(x)
        except RuntimeError as error:
            raise ValueError("no product") from error

    with pytest.raises(ValueError, match="no product") as info:
        jit(fn)(X)
    cause = info.value.__cause__
    assert isinstance(cause, RuntimeError)
    assert [f.name for f in traceback.extract_tb(cause.__traceback__)] == ["fn", "product"]


def test_torch_still_logs_outside_of_a_trace(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    with caplog.at_level(logging.ERROR, logger.name):
        logger.addHandler(caplog.handler)
        try:
            logger.error("failed while attempting to run meta for %s", "mm")
        finally:
            logger.removeHandler(caplog.handler)
    assert "failed while attempting" in caplog.text


# ------------------------------------------------------------------------------------------ prints


def shown(x: Tensor) -> Tensor:
    print("sum:", x.sum())
    return x * 2


@pytest.mark.parametrize("way", WAYS)
def test_a_print_of_a_traced_tensor_warns_at_its_line(
    way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match=r"printed while tracing.*fdl\.debug\.print") as record:
        jit(WAYS[way](shown))(X)
    assert {w.filename for w in record} == {__file__}
    assert {w.lineno for w in record} == {shown.__code__.co_firstlineno + 1}
    assert capsys.readouterr().out.count("sum:") >= 1


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: (print(x.shape, x.dtype), x)[1],
        lambda x: (print("no tensor"), x)[1],
        lambda x: (print(X), x)[1],
    ],
    ids=["shape", "text", "a tensor that has values"],
)
def test_other_prints_do_not(fn: Callable[[Tensor], Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jit(fn)(X)


def test_eager_prints_are_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(), disable_jit():
        warnings.simplefilter("error")
        jit(shown)(X)
    assert capsys.readouterr().out == "sum: tensor(12.)\n"


def test_only_the_message_about_cuda_is_dropped() -> None:
    logger, records = logging.getLogger("torch.utils.cpp_extension"), []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    _inductor.silence_log.cache_clear()  # another test may have set up torch's logs anew
    _inductor.silence_log()
    try:
        logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local")
        logger.warning("another")
    finally:
        logger.removeHandler(handler)
    messages = [record.msg for record in records]  # other threads may write some too
    assert "another" in messages and not any("No CUDA" in message for message in messages)
