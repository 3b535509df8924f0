"""Each way between one program and eager is taken if those before it fail, and computes the same.

Oracle: the function run eagerly. Mostly with a stand-in for Inductor, which runs the graph and can
be told to refuse; a few with Inductor itself.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from fdl import jit, scan, tree
from fdl._compiler import _inductor, _pieces
from fdl._compiler._graph import LOOP, aten, copy_graph
from tests.support.asserts import assert_equal, unchanged

Refuses = Callable[[GraphModule, bool], str]  # the error, or "" to compile


def nodes(module: GraphModule) -> list[Any]:
    """List the operations of a graph and of the bodies of its loops."""
    graphs = [m for m in module.modules() if isinstance(m, GraphModule)]
    return [node for m in graphs for node in m.graph.nodes if node.op == "call_function"]


def targets(module: GraphModule) -> list[Any]:
    return [node.target for node in nodes(module)]


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[Refuses], list[GraphModule]]:
    """Let a function say what the compiler refuses; returns the list of what it compiled."""

    def refuse(refuses: Refuses) -> list[GraphModule]:
        compiled: list[GraphModule] = []

        def lower(graph: GraphModule, _: Any, inputs: Any, cpp_wrapper: bool = True) -> Any:
            error = refuses(graph, cpp_wrapper)
            if error:
                graph.graph.erase_node(graph.graph.output_node())  # a failure may leave this
                raise NotImplementedError(error)
            compiled.append(graph)
            strides = [
                node.meta["val"].stride() for node in graph.graph.find_nodes(op="placeholder")
            ]

            def run(leaves: list[Tensor]) -> Any:
                assert [leaf.stride() for leaf in leaves] == strides
                return graph(*leaves)

            return run

        monkeypatch.setattr(
            _inductor, "lower", lambda graph, *rest: lower(copy_graph(graph), *rest)
        )
        monkeypatch.setattr(_inductor, "HAS_CPP_WRAPPER", True)
        return compiled

    return refuse


def training(state: dict[str, Tensor], xs: Tensor, rate: Tensor) -> Any:
    """A function with loops in a loop, results of several kinds, and results that are arguments."""

    def body(c: Tensor, x: Tensor) -> Any:
        inner, ys = scan(lambda d, z: (torch.sin(d) + z, d.cos()), c, x)
        return inner * rate, {"c": c, "ys": ys, "top": c.sort().values}

    start = torch.sin(state["w"]).softmax(0)
    w, ys = scan(body, start, xs)
    new = {"w": w + state["b"], "b": state["b"], "view": w[1:], "again": w}
    return new, ys, xs.mT, (xs.max(1).indices, xs > 0)


def arguments() -> Any:
    state = {"w": torch.linspace(0, 1, 3), "b": torch.ones(3)}
    args = state, torch.arange(24.0).view(4, 2, 3) / 24, torch.tensor(0.5)
    return tree.cast(args, torch.float64)


def refuses_loops(graph: GraphModule, _: bool) -> str:
    return "no loops\nhere" * (LOOP in targets(graph))


def refuses_sin(graph: GraphModule, _: bool) -> str:
    return "no sine\n  target: aten.sin.default\n  args[0]: x" * (
        aten.sin.default in targets(graph)
    )


def refuses_sin_silently(graph: GraphModule, _: bool) -> str:
    return "something is wrong" * (aten.sin.default in targets(graph))


REFUSALS: dict[str, tuple[Refuses, str, str]] = {
    "the C++ wrapper": (
        lambda _, cpp_wrapper: "x.cpp:3:1: error: redeclaration of 'buf3'\n  3 | x" * cpp_wrapper,
        "one program",
        r"\(error: redeclaration of 'buf3'\); its kernels are called from Python",
    ),
    "unrolled loops": (
        lambda graph, _: "too long" * (targets(graph).count(aten.cos.default) > 1),
        "one program",
        r"\(NotImplementedError: too long\); no loop is unrolled",
    ),
    "loops": (
        refuses_loops,
        "compiled loop bodies",
        r"\(NotImplementedError: no loops\); the body of each loop is compiled",
    ),
    "an operation": (
        refuses_sin,
        "compiled pieces",
        r"\(no sine, in aten.sin.default\); it is compiled in pieces around .*aten.sin.default",
    ),
    "an operation, without saying so": (
        refuses_sin_silently,
        "compiled pieces",
        r"\(NotImplementedError: something is wrong\); it is compiled in pieces around .*aten.sin",
    ),
    "loops and an operation": (
        lambda graph, _: refuses_loops(graph, _) or refuses_sin_silently(graph, _),
        "compiled pieces",
        r"\(NotImplementedError: no loops\); it is compiled in pieces around aten.sin.*, a loop",
    ),
    "everything": (lambda *_: "no", "eager", r"\(NotImplementedError: no\); it runs eagerly"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSALS)
def test_the_next_way_computes_the_same(what: str, compiler: Any) -> None:
    refuses, route, match = REFUSALS[what]
    compiler(refuses)
    jitted = jit(training, donate_argnums=0)
    state, xs, rate = arguments()
    expected_state = tree.map(torch.clone, state)
    with pytest.warns(UserWarning, match=match) as caught:
        results = jitted(state, xs, rate)
    for i in range(3):
        expected = training(expected_state, xs + i, rate + i)
        assert_equal(results, expected)
        memory = [x.untyped_storage()._cdata for x in tree.leaves((results, xs, rate))]
        assert len(set(memory)) == len(memory)
        with pytest.raises(RuntimeError, match="donated"):
            state["w"] + 1
        state, expected_state = ({k: r[0][k] for k in "wb"} for r in (results, expected))
        results = jitted(state, xs + i + 1, rate + i + 1)  # other values are not constants
    (report,) = jitted.report()
    assert report.route == route
    assert [str(w.message).split(": ", 2)[2] for w in caught] == list(report.fallbacks)
    assert "\n" not in report.fallbacks[0] and len(report.fallbacks[0]) < 400


@pytest.mark.parametrize("what", REFUSALS)
def test_strict_raises_at_the_first_refusal(what: str, compiler: Any) -> None:
    refuses, _, match = REFUSALS[what]
    compiler(refuses)
    jitted, args = jit(training, donate_argnums=0, strict=True), arguments()
    with unchanged(*args), pytest.raises(RuntimeError, match=r"jit\(strict=True\): .*" + match):
        jitted(*args)
    assert jitted.report() == ()


def test_nothing_is_said_if_nothing_is_refused(compiler: Any) -> None:
    compiled = compiler(lambda *_: "")
    jitted = jit(training, strict=True)
    assert_equal(jitted(*arguments()), training(*arguments()))
    assert len(compiled) == 1


# --------------------------------------------------------------------------------- what is compiled


def chain(x: Tensor, n: int) -> Tensor:
    for i in range(n):
        x = torch.sin(x) if i == n // 3 else torch.tanh(x) + i
    return x


@pytest.mark.parametrize("refuses", [refuses_sin, refuses_sin_silently], ids=["named", "searched"])
@pytest.mark.parametrize("n", [3, 4, 50])
def test_only_what_is_refused_runs_by_itself(refuses: Refuses, n: int, compiler: Any) -> None:
    compiled, x = compiler(refuses), torch.linspace(-1, 1, 5)
    jitted = jit(lambda x: chain(x, n))
    with pytest.warns(UserWarning, match=r"in pieces around aten.sin.default, which is slower"):
        assert_equal(jitted(x), chain(x, n))
    operations = [target for piece in compiled for target in targets(piece)]
    assert operations.count(aten.tanh.default) == operations.count(aten.add.Tensor) == n - 1
    # Named, it is cut out; otherwise each half costs one more cut.
    assert len(compiled) <= (2 if refuses is refuses_sin else 2 + n.bit_length())


def test_a_loop_that_compiles_stays_a_loop(compiler: Any, real_loops: None) -> None:
    """Where an operation before it, and another loop, do not."""

    def fn(x: Tensor, xs: Tensor) -> Any:
        c, y = scan(lambda c, x: (torch.tanh(c) + x, c), torch.sin(x), xs)
        return scan(lambda c, x: (torch.sin(c) + x, c.cos()), c, xs), y

    compiled, args = compiler(refuses_sin), (torch.ones(3), torch.arange(12.0).view(4, 3))
    with pytest.warns(UserWarning, match=r"aten.sin.default, a loop, which runs in Python"):
        assert_equal(jit(fn)(*args), fn(*args))
    whole = [piece for piece in compiled if LOOP in targets(piece)]
    assert len(whole) == 1 and aten.tanh.default in targets(whole[0])
    assert any(aten.cos.default in targets(piece) for piece in compiled)


def test_results_with_several_parts_are_not_torn_apart(compiler: Any) -> None:
    def fn(x: Tensor) -> Any:
        values, indices = x.sort(1)
        low, high = torch.sin(values).split(2, 1)
        return low.cumsum(1), high, indices, x.max(0).indices + indices[0]

    compiler(refuses_sin_silently)
    x = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 3.0, 2.0]])
    with pytest.warns(UserWarning, match="in pieces around aten.sin.default"):
        assert_equal(jit(fn)(x), fn(x))


def test_a_compiler_that_always_fails_is_not_asked_for_ever(
    compiler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[GraphModule] = []
    compiler(lambda graph, _: asked.append(graph) or "no")
    x = torch.linspace(-1, 1, 5)
    with pytest.warns(UserWarning, match="it runs eagerly"):
        assert_equal(jit(lambda x: chain(x, 200))(x), chain(x, 200))
    assert len(asked) <= _pieces.MAX_FAILURES + 4


def test_another_layout_than_expected_is_copied(compiler: Any) -> None:
    """A refused operation may return other strides than its fake implementation says."""

    @torch.library.custom_op("fdltest::transposed", mutates_args=())
    def transposed(x: Tensor) -> Tensor:
        return (x * 2).t().contiguous().t()

    @transposed.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    compiler(
        lambda graph, _: (
            "no\n target: fdltest.transposed.default" * ("fdltest" in str(targets(graph)))
        )
    )
    x = torch.arange(6.0).view(2, 3)
    with pytest.warns(UserWarning, match="in pieces around fdltest.transposed.default"):
        assert_equal(jit(lambda x: transposed(x).cos() + 1)(x), (x * 2).cos() + 1)


# ------------------------------------------------------------------------------------ with Inductor


@pytest.fixture
def fresh_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Inductor's cache may have what an earlier test compiled."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def refused_by_inductor() -> Iterator[Any]:
    """An operation without a lowering, which says so."""
    from torch._inductor.lowering import lowerings, register_lowering

    @torch.library.custom_op("fdltest::refused", mutates_args=())
    def refused(x: Tensor) -> Tensor:
        return x * 2

    @refused.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    op = torch.ops.fdltest.refused.default

    @register_lowering(op, type_promotion_kind=None)
    def lower(_: Any) -> Any:
        raise ValueError("this is refused\nfor a long reason")

    yield refused
    del lowerings[op]


@pytest.mark.slow
def test_inductor_names_the_operation(refused_by_inductor: Any, fresh_cache: Path) -> None:
    def fn(w: Tensor, xs: Tensor) -> Any:
        def body(c: Tensor, x: Tensor) -> Any:
            return torch.tanh(refused_by_inductor(c) @ w * 0.1) + x, c.sum()

        return scan(body, torch.sin(w), xs), torch.cos(w) @ w

    args = torch.linspace(-1, 1, 9).view(3, 3), torch.arange(33.0).view(11, 3) / 33
    match = (
        r"refused it \(ValueError: this is refused, in fdltest.refused.default\); it is compiled"
    )
    jitted = jit(fn)
    with pytest.warns(UserWarning, match=match):
        assert_equal(jitted(*args), fn(*args))
    (report,) = jitted.report()
    assert report.route == "compiled pieces" and report.kernels > 2
    (log,) = re.findall(r"full log: (.*)\)", report.fallbacks[0])
    text = Path(log).read_text()
    assert fresh_cache in Path(log).parents
    for part in (
        "for a long reason", torch.__version__, "torch.ops.fdltest.refused.default",
        "torch.ops.higher_order.scan", "Traceback", "---- one program", "f32[3, 3]",
    ):  # fmt: skip
        assert part in text
    assert "0.75" not in text  # no values of arguments


@pytest.mark.slow
@pytest.mark.skipif(not _inductor.HAS_CPP_WRAPPER, reason="this release has no C++ wrapper")
def test_an_error_of_the_cpp_compiler_is_shown(
    monkeypatch: pytest.MonkeyPatch, fresh_cache: Path
) -> None:
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    written = CppWrapperCpu.generate_return

    def generate_return(self: Any, refs: Any) -> None:
        self.wrapper_call.writeline("int buffer; int buffer;")
        written(self, refs)

    monkeypatch.setattr(CppWrapperCpu, "generate_return", generate_return)
    jitted, x = jit(lambda x: torch.tanh(x) @ x), torch.linspace(-1, 1, 9).view(3, 3)
    match = r"\(error: redeclaration of .int buffer.\); its kernels are called from Python"
    with pytest.warns(UserWarning, match=match):
        assert_equal(jitted(x), torch.tanh(x) @ x)
    assert jitted.report()[0].route == "one program"
