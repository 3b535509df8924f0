"""Names of programs in the cache: another program never has the same, an equal one always has."""

import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fdl
from fdl import jit, scan
from fdl._compiler import _cache_key, _inductor
from fdl._compiler._settings import current_settings
from fdl._compiler._signature import flatten
from fdl._compiler._trace import trace
from fdl._torch_compat import RELEASE
from tests.support.asserts import equal_bits

ROOT = Path(__file__).parents[2]
X = torch.tensor([-0.0, 1.0, -2.5])


def name(fn: Callable[..., Any], *args: Any, donated: tuple[int, ...] = ()) -> str | None:
    """The name that the program of a function would have."""
    leaves, spec = flatten((args or (X,), {}))
    return _cache_key.name(trace(fn, leaves, spec).graph, donated, current_settings())


def neighbour(x: float) -> float:
    return math.nextafter(x, math.inf)


# ------------------------------------------------------------------------------- numbers in it

NUMBERS = [0, 0.0, -0.0, 1, 1.0, True, False, -1, 1e-3, neighbour(1e-3), 1e300, 5e-324]
NUMBERS += [math.inf, -math.inf, math.nan, 2**53, 2**53 + 1, 1j]
FORMS: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "added": lambda c: lambda x: x + c,
    "a tensor": lambda c: lambda x: torch.tensor(c) * x,
    "filled": lambda c: lambda x: (torch.full((3,), c), x),
    "in a loop": lambda c: lambda x: scan(lambda a, b: (a * c + b, b), x[0], x),
    "in a branch": lambda c: lambda x: fdl.cond(x[0] > 0, lambda x: x * c, lambda x: x - c, x),
}


def same(a: Any, b: Any) -> bool:
    """The same number of Python: of one type, with the same sign, or both NaN."""
    return type(a) is type(b) and repr(a) == repr(b)


@pytest.mark.parametrize("form", FORMS)
def test_numbers_that_differ_have_programs_of_their_own(form: str) -> None:
    real = form in ("in a loop", "in a branch")  # of which a complex carry would be no carry
    numbers = [c for c in NUMBERS if not (real and isinstance(c, complex))]
    names = [name(FORMS[form](c)) for c in numbers]
    again = [name(FORMS[form](c)) for c in numbers]
    assert None not in names and names == again
    for (a, first), (b, second) in itertools.combinations(zip(numbers, names, strict=True), 2):
        # A number that is rounded while the function is traced is another one no more.
        rounded = form == "a tensor" and equal_bits(torch.tensor(a), torch.tensor(b))
        assert (first == second) == rounded, (a, b)


FLOATS = st.floats(width=64) | st.integers(-(2**62), 2**62) | st.booleans()


@settings(max_examples=60, deadline=None)
@given(FLOATS, FLOATS, st.sampled_from(["added", "filled"]))
def test_names_are_equal_just_if_the_numbers_are(a: Any, b: Any, form: str) -> None:
    assert (name(FORMS[form](a)) == name(FORMS[form](b))) == same(a, b)


@pytest.mark.slow
@pytest.mark.skipif(RELEASE < (2, 12), reason="programs need Python there")
def test_of_numbers_that_look_alike_each_gets_its_own_result(
    program_cache: Path,
) -> None:
    """With a cache: twice, so that every program is taken from it."""
    for cached in (False, True):
        for c in (0.0, -0.0, 1, True):
            x = X.double()
            fn = jit(lambda x, c=c: (x * c, x + c, torch.full((2,), c)))
            result = fn(x)
            for got, wanted in zip(result, (x * c, x + c, torch.full((2,), c)), strict=True):
                assert equal_bits(got, wanted), c
            assert fn.report()[0].cached == cached, c


# ----------------------------------------------------------------- what else belongs to a program


def edited(text: str) -> Callable[..., Any]:
    """A function that closes over a helper with this source, as a user edits it."""
    space: dict[str, Any] = {"torch": torch}
    exec(f"def helper(x):\n    return {text}", space)
    return lambda x: space["helper"](x) + 1


def closing_over(value: Tensor) -> Callable[..., Any]:
    return lambda x: x * value.sum()


PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "reduction": tuple(
        lambda x, r=r: torch.nn.functional.mse_loss(x, x * 2, reduction=r) for r in ("mean", "sum")
    ),
    "mode": tuple(
        lambda x, m=m: torch.nn.functional.interpolate(x[None, None], size=5, mode=m)
        for m in ("nearest", "linear")
    ),
    "dtype": tuple(lambda x, d=d: x.to(d) for d in (torch.float64, torch.bfloat16)),
    "a number by keyword": tuple(lambda x, a=a: torch.add(x, x, alpha=a) for a in (2, 3)),
    "a word by keyword": tuple(
        lambda x, m=m: torch.div(x, 2, rounding_mode=m) for m in ("floor", "trunc")
    ),
    "an edited helper": (edited("x.sin()"), edited("x.cos()")),
    "the order of two arguments": (lambda x: x.sum() - x, lambda x: x - x.sum()),
    "a closed-over shape": (closing_over(torch.ones(2)), closing_over(torch.ones(3))),
    "a closed-over dtype": (closing_over(torch.ones(2)), closing_over(torch.ones(2).half())),
    "closed-over strides": (
        closing_over(torch.ones(2, 3)),
        closing_over(torch.ones(3, 2).T),
    ),
    "results in another order": (lambda x: (x + 1, x + 2), lambda x: (x + 2, x + 1)),
    "steps": (
        lambda x: scan(lambda a, b: (a + b, a), x[0], x.repeat(20)),
        lambda x: scan(lambda a, b: (a + b, a), x[0], x.repeat(21)),
    ),
    "branches": (
        lambda x: fdl.cond(x[0] > 0, torch.sin, torch.cos, x),
        lambda x: fdl.cond(x[0] > 0, torch.cos, torch.sin, x),
    ),
}


@pytest.mark.parametrize("first, second", PAIRS.values(), ids=PAIRS)
def test_functions_that_differ_have_programs_of_their_own(
    first: Callable[..., Any], second: Callable[..., Any]
) -> None:
    assert name(first) == name(first) != name(second) == name(second)
    assert name(first) is not None and name(second) is not None


def test_arguments_that_differ_have_programs_of_their_own() -> None:
    x = torch.ones(4, 4)
    kinds = [x, x.T.contiguous()[:, :3], x[:3], x.double(), x.T[:3], torch.ones(1), torch.ones(())]
    kinds += [torch.ones(16), torch.ones(2, 8), x.bool(), x.int()]
    names = [name(lambda x: x * 2, each) for each in kinds]
    names += [name(lambda x: x * 2, x, donated=(0,)), name(lambda x, _: x * 2, x, x)]
    assert None not in names and len(set(names)) == len(names)


@pytest.mark.slow
@pytest.mark.skipif(RELEASE < (2, 12), reason="programs need Python there")
def test_a_cached_program_reads_what_a_function_closes_over_now(
    program_cache: Path,
) -> None:
    """Values are no part of a program: another value, another tensor, a table of numbers."""

    def results(value: Tensor, numbers: list[float]) -> tuple[Any, bool]:
        fn = jit(lambda x: (x * value, x + torch.tensor(numbers)))
        found = fn(X)
        assert equal_bits(found[0], X * value) and equal_bits(found[1], X + torch.tensor(numbers))
        return found, fn.report()[0].cached

    assert not results(torch.tensor([1.0, 2.0, 3.0]), [1.0, 2.0, 3.0])[1]
    assert results(torch.tensor([-0.0, math.nan, 3.0]), [0.0, -0.0, math.inf])[1]
    value = torch.tensor(2.0)
    fn = jit(lambda x: x * value)
    assert equal_bits(fn(X), X * 2)
    value = torch.tensor(5.0)
    again = jit(lambda x: x * value)
    assert equal_bits(again(X), X * 5) and equal_bits(fn(X), X * 5)
    assert again.report()[0].cached


# ------------------------------------------------------------------------- torch and the machine


def setting(context: Callable[[], Any]) -> str | None:
    with context():
        return name(torch.sin)


def test_settings_of_torch_belong_to_a_program() -> None:
    plain = name(torch.sin)
    names = [plain, setting(torch.no_grad)]
    names.append(setting(lambda: torch.autocast("cpu", torch.bfloat16)))
    names.append(setting(lambda: torch.autocast("cpu", torch.float16)))
    torch._C._set_mkldnn_enabled(False)
    names.append(name(torch.sin))
    torch._C._set_mkldnn_enabled(True)
    torch.set_num_threads(3)
    names.append(name(torch.sin))
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    names.append(name(torch.sin))
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float64)
    names.append(name(torch.sin))
    torch.set_default_dtype(torch.float32)
    assert None not in names and len(set(names)) == len(names)
    assert name(torch.sin) == plain


@pytest.mark.parametrize("variable", ["CXX", "CPATH", "TORCHINDUCTOR_FREEZING"])
def test_variables_of_the_compiler_belong_to_it(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(variable, raising=False)
    plain = name(torch.sin)
    names = {plain}
    for value in ("1", "clang++"):
        monkeypatch.setenv(variable, value)
        names.add(name(torch.sin))
    assert len(names) == 3
    monkeypatch.delenv(variable)
    assert name(torch.sin) == plain


def test_the_place_of_torchs_own_cache_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = name(torch.sin)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    assert name(torch.sin) == plain


def test_what_a_user_sets_of_inductor_belongs_to_it() -> None:
    from torch._inductor import config

    plain = name(torch.sin)
    with config.patch({"cpp.simdlen": 256}):
        patched = name(torch.sin)
    with config.patch(max_fusion_size=3):
        fused = name(torch.sin)
    with config.patch(force_disable_caches=True):
        assert name(torch.sin) == plain
    assert len({plain, patched, fused}) == 3 and name(torch.sin) == plain
    with config.patch(post_grad_custom_post_pass=lambda graph: None):  # a function: who knows
        assert name(torch.sin) is None


MACHINE: dict[str, Callable[[pytest.MonkeyPatch], Any]] = {
    "torch": lambda m: m.setattr(torch, "__version__", "9.9"),
    "torch's sources": lambda m: m.setattr(torch.version, "git_version", "0123"),
    "another installation": lambda m: m.setattr(torch, "__file__", "/elsewhere/torch/__init__.py"),
    "Python": lambda m: m.setattr(sys, "version", "3.99"),
    "sources of fdl": lambda m: m.setattr(_cache_key, "sources", lambda: "others"),
    "vectors": lambda m: m.setattr(_cache_key, "get_cpu_capability", lambda: "DEFAULT"),
    "processor": lambda m: m.setattr(
        Path, "read_text", lambda path: "processor: 0\nmodel name: other\nflags: fpu avx2\n"
    ),
    "flags of the processor": lambda m: m.setattr(
        Path, "read_text", lambda path, read=Path.read_text: read(path).replace(" sse2", "")
    ),
    "system": lambda m: m.setattr("platform.libc_ver", lambda: ("glibc", "9.99")),
}


@pytest.mark.parametrize("change", MACHINE.values(), ids=MACHINE)
def test_the_machine_belongs_to_it(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = name(torch.sin)
    assert plain is not None
    with monkeypatch.context() as patched:
        change(patched)
        _cache_key._machine.cache_clear()
        other = name(torch.sin)
    _cache_key._machine.cache_clear()
    assert other not in (None, plain) and name(torch.sin) == plain


def test_the_sources_of_fdl_are_those_of_the_compiler() -> None:
    """All of them: a file that is added belongs to it too."""
    folder = Path(_inductor.__file__).parent
    files = [path for path in folder.rglob("*") if path.suffix in (".py", ".h")]
    files = [path for path in files if path.parent.name != "dispatch"]  # has a name of its own
    texts = b"".join(path.read_bytes() for path in sorted(files))
    assert _inductor.sources() == hashlib.sha256(texts).hexdigest()


# ----------------------------------------------------------------------------- what has no name


def test_what_another_process_could_not_run_has_no_name() -> None:
    @torch.library.custom_op("tests_cache_key::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)

    def prints(x: Tensor) -> Tensor:
        fdl.debug.print("{}", x.sum())
        return x

    assert name(twice) is None
    assert name(lambda x: scan(lambda c, z: (twice(c), z), x[0], x)) is None
    assert name(prints) is None
    assert name(lambda x: scan(lambda c, z: (prints(c), z), x[0], x)) is None


# -------------------------------------------------------------------------- equal things built anew

ANEW = """
import json, torch
from torch.func import grad, vmap
import fdl
from tests.compiler.test_cache_key import FORMS, NUMBERS, PAIRS, name
from tests.support.programs import NAMES, load

names = {f"{f} {c!r}": name(FORMS[f](c)) for f in ("added", "a tensor", "filled") for c in NUMBERS}
names |= {f"{key} {i}": name(fn) for key, pair in PAIRS.items() for i, fn in enumerate(pair)}
for key in NAMES[::6]:
    program = load(key)
    if program.faults:
        continue
    names[key] = name(lambda s, xs: fdl.scan(program.step, s, xs), program.init(), program.xs())
model = fdl.nn.sequential(
    fdl.nn.linear(6, 8), fdl.nn.batch_norm(8), fdl.nn.relu, fdl.nn.dropout(0.5), fdl.nn.linear(8, 3)
)
opt = fdl.optim.adamw(1e-3)
state = fdl.TrainState.create(model, opt, key=fdl.random.key(0))
step = fdl.train_step(fdl.supervised(model, fdl.losses.cross_entropy), opt)
batch = fdl.data.Batch(torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64))
names["step"] = name(step, state, batch)
print(json.dumps(names))
"""


@pytest.mark.slow
def test_equal_functions_have_equal_names_in_all_processes() -> None:
    def start(seed: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", ANEW],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
        )

    processes = [start("1"), start("2")]
    first, second = (json.loads(p.communicate(timeout=600)[0]) for p in processes)
    assert len(first) > 50
    assert {key for key in first if first[key] != second[key]} == set()
    unnamed = {key for key, value in first.items() if value is None}
    assert unnamed == set()
