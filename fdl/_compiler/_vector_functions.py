"""Functions whose vector code in Inductor is wrong for small numbers, on the CPU.

Its absolute error is 1e-7 there: erf(1e-8) is 0, and so is atanh(1e-8).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch

from fdl._compiler._patches import patching

# For |x| < 0.927 (source: see error_function of blocks/functions.h).
ERF = """[&]() {
    using V = std::decay_t<decltype(X)>;
    const V square = X * X;
    V series = V(-5.96761703e-4f) * square + V(4.99119423e-3f);
    series = series * square + V(-2.67681349e-2f);
    series = series * square + V(1.12819925e-1f);
    series = series * square + V(-3.76125336e-1f);
    series = series * square + V(1.28379166e-1f);
    return V::blendv(X.erf(), series * X + X, X.abs() < V(0.927734375f));
}()"""
# atanh |x| = log(1 + 2 |x| / (1 − |x|)) / 2
ATANH = """[&]() {
    using V = std::decay_t<decltype(X)>;
    const V size = X.abs();
    return (V(0.5) * ((size + size) / (V(1) - size)).log1p()).copysign(X);
}()"""


def _erf(original: Any) -> staticmethod[[Any], str]:
    def erf(x: Any) -> str:
        text: str = original.__func__(x)
        return text if x.dtype == torch.float64 else ERF.replace("X", str(x))

    return staticmethod(erf)


def _atanh(_: Any) -> staticmethod[[Any], str]:
    return staticmethod(lambda x: ATANH.replace("X", str(x)))


@cache
def _patched() -> Any:
    from torch._inductor.codegen.cpp import CppVecOverrides

    return patching((CppVecOverrides, "erf", _erf), (CppVecOverrides, "atanh", _atanh))


def accurate_functions() -> AbstractContextManager[None]:
    """Let Inductor write code that is right to a few units in the last place."""
    patched: AbstractContextManager[None] = _patched()()
    return patched
