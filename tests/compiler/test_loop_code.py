"""The C++ code of loops: what it allocates, and which memory it uses again."""

import pytest
import torch
from torch._inductor.utils import fresh_cache, run_and_get_code

from fdl import jit, random, scan
from fdl._compiler._inductor import HAS_CPP_WRAPPER
from tests.support.programs import FORMS, check_equal, load


@pytest.mark.slow
@pytest.mark.skipif(not HAS_CPP_WRAPPER, reason="loops have no C++ code there")
def test_values_within_a_kernel_are_not_allocated() -> None:
    def walk(x: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        def step(x: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, tuple[()]]:
            inner = lambda x, key: (x + random.normal(key, x.shape), ())  # noqa: E731
            return scan(inner, x, random.split(key, 7))[0], ()

        return scan(step, x, random.split(key, 5))[0]

    x, key = torch.zeros(5000), random.key(0)
    with fresh_cache():
        result, codes = run_and_get_code(jit(walk, strict=True), x, key)
    torch.testing.assert_close(result, walk(x, key))
    (code,) = (code for code in codes if "while (1)" in code)
    outer = code[code.index("while (1)") :]
    inner = outer[outer.index("while (1)", 1) :]
    # A draw alone has twenty rounds. Stored are: the keys and the counters, flags, and the carry.
    assert inner.count("empty_strided") < 10 and outer.count("empty_strided") < 20


@pytest.mark.slow
def test_memory_that_a_loop_writes_is_not_used_for_other_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Inductor freed it too early: all gradients of this program were wrong."""
    monkeypatch.setenv("FDL_CACHE", "0")
    program = load("char_gru")
    with fresh_cache():
        check_equal(program, *FORMS["grad of scan"](program, jit))
