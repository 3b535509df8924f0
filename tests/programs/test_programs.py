"""Programs as users write them: every way of running one gives what eager Python gives.

Each other file in this folder is a program. Breadth comes from tracing all of them in every form
and running the graphs without Inductor; Inductor compiles a third of them in each run, in one form
each. The choice changes with every change of the library; `make test-all` compiles all.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributions import Distribution

import fdl
from fdl._torch_compat import RELEASE
from tests.support.asserts import equal_bits
from tests.support.programs import (
    FORMS,
    NAMES,
    Program,
    check_equal,
    forms,
    leave_forward_mode,
    load,
    loop,
    rows,
    stack,
    turn,
)
from tests.support.soak import repeats

pytestmark = pytest.mark.usefixtures("real_loops")
TURN = turn()
IS_OLD = RELEASE < (2, 12)  # torch, with fewer rules for vmap


@pytest.fixture(autouse=True)
def distributions_check_arguments() -> None:
    """As in a new process: the first torch.compile turns it off."""
    Distribution.set_default_validate_args(True)


def cases(names, forms_of, backend=""):
    """A case for each name and form, those with a fault marked."""
    params = []
    for name in names:
        program = load(name)
        for form in forms_of(name, program):
            fault = program.faults.get(form) or program.faults.get(f"{backend}{form}")
            runs = not (fault or "").startswith("crash")
            marks = [pytest.mark.xfail(reason=fault, strict=True, run=runs)] * bool(fault)
            marks += [pytest.mark.slow] * (form in ("grad of scan", "backward", "vmap of scan"))
            params.append(pytest.param(program, form, id=f"{name}-{form}", marks=marks))
    return params


def forms_for_inductor(name: str, program: Program) -> list[str]:
    """One form, another at each turn; or those that hold all others."""
    every = forms(program)
    one = every[(TURN // 3 + NAMES.index(name)) % len(every)]
    return repeats([one], [form for form in every if form.endswith("scan")])


def run(program: Program, form: str) -> None:
    """Run one form, and compare its results with eager Python's, and its route."""
    jitted = []
    is_fast = program.route == "one program"

    def jit(fn, **options):
        jitted.append(fdl.jit(fn, strict=is_fast, **options))
        return jitted[-1]

    actual, expected = FORMS[form](program, jit)
    check_equal(program, actual, expected)
    for report in [report for fn in jitted for report in fn.report()]:
        assert report.route == program.route
        assert bool(report.fallbacks) != is_fast


@pytest.mark.usefixtures("plain_backend")
@(pytest.mark.filterwarnings("ignore:There is a performance drop") if IS_OLD else lambda f: f)
@pytest.mark.parametrize("program, form", cases(NAMES, lambda _, program: forms(program)))
def test_traced(program: Program, form: str) -> None:
    run(program, form)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
@pytest.mark.parametrize(
    "program, form",
    cases(repeats(NAMES[TURN % 3 :: 3], NAMES), forms_for_inductor, backend="inductor: "),
)
def test_compiled(program: Program, form: str) -> None:
    run(program, form)


@pytest.mark.slow
@pytest.mark.skipif(IS_OLD, reason="torch 2.11 has no loops in files")
@pytest.mark.parametrize(
    "name",
    [name for name in repeats(NAMES[TURN % 23 :: 23], NAMES) if load(name).route == "one program"],
)
def test_a_file_has_the_bits_of_jit(name: str, tmp_path: Path) -> None:
    program = load(name)
    state, xs = program.init(), program.xs()

    def run(state: Any, xs: Any) -> Any:
        return fdl.scan(program.step, state, xs)

    fdl.export(run, (state, xs), tmp_path / "program.pt2")
    loaded = fdl.load_program(tmp_path / "program.pt2")
    expected = fdl.tree.flatten_dict(fdl.jit(run)(state, xs))
    for _ in range(2):
        got = fdl.tree.flatten_dict(loaded(state, xs))
        assert got.keys() == expected.keys()
        for path, leaf in expected.items():
            assert got[path] is leaf is None or equal_bits(got[path], leaf), path


@pytest.mark.slow
@pytest.mark.skipif(IS_OLD, reason="Dynamo refused other programs then")
@pytest.mark.parametrize("program, form", cases(NAMES, lambda *_: ["fullgraph"]))
def test_torch_compile_takes_it_whole_or_says_why_not(program: Program, form: str) -> None:
    torch._dynamo.reset()
    state, row = program.init(), next(rows(program.xs()))
    # First without: what torch remembers of a first call (of kl_divergence's table, say) is traced
    # otherwise than what it looks up, and another test may have called it.
    expected = program.step(state, row)
    # As the first torch.compile of a process does; later ones do not.
    Distribution.set_default_validate_args(False)
    compiled = torch.compile(program.step, fullgraph=True, backend="aot_eager")
    if program.fullgraph:
        with pytest.raises(Exception, match=program.fullgraph):
            compiled(state, row)
        leave_forward_mode()
    else:
        check_equal(program, compiled(state, row), expected)


@pytest.mark.parametrize("name", [name for name in NAMES if load(name).vmap])
def test_vmap_is_left_out_only_where_torch_refuses(name: str) -> None:
    program = load(name)
    states = stack([program.init(), program.init()])
    with pytest.raises(Exception, match=program.vmap):
        torch.vmap(program.step, (0, None))(states, next(rows(program.xs())))


@pytest.mark.parametrize("name", NAMES)
def test_a_program_does_something(name: str) -> None:
    program = load(name)
    state, xs = program.init(), program.xs()
    assert 4 <= len(torch.utils._pytree.tree_leaves(xs)[0]) <= 8
    assert not fdl.tree.allclose(loop(program.step, state, xs)[0], state)
