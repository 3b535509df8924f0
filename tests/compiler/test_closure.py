"""Closed-over tensors are read by name at each call, whatever the path to them."""

import functools
import types
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad

import fdl
from fdl import disable_jit, jit, losses, nn, optim, scan
from fdl._compiler._closure import closed_over_tensors
from tests.support.asserts import assert_equal

pytestmark = pytest.mark.usefixtures("plain_backend", "real_loops")

X = torch.arange(1.0, 4.0)
GLOBAL = torch.ones(3)
SETTINGS = types.SimpleNamespace(w=torch.ones(3), inner={"w": [torch.ones(3)]})
MODULE = types.ModuleType("settings")


class Layer:
    """A class with state in every place where a class can have some."""

    shared: ClassVar[Tensor] = torch.ones(3)
    __slots__ = ("__dict__", "slot")

    def __init__(self) -> None:
        self.w, self.slot = torch.ones(3), torch.ones(3)

    @property
    def doubled(self) -> Tensor:
        return self.w * 2

    def method(self, x: Tensor) -> Tensor:
        return x * self.w

    def __call__(self, x: Tensor) -> Tensor:
        return self.method(x) + GLOBAL

    @classmethod
    def of_class(cls, x: Tensor) -> Tensor:
        return x * cls.shared


@dataclass
class Config:
    w: Tensor


Named = namedtuple("Named", "w b")
Case = tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]  # the function, how to change it
CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    CASES[make.__name__.replace("_", " ")] = make
    return make


@case
def a_local() -> Case:
    w = torch.ones(3)

    def change(new: Tensor) -> None:
        nonlocal w
        w = new

    return lambda x: x * w, change


@case
def a_global() -> Case:
    return lambda x: x * GLOBAL, lambda new: globals().__setitem__("GLOBAL", new)


@case
def a_global_of_a_function_that_is_called() -> Case:
    return lambda x: times_global(x) + 1, lambda new: globals().__setitem__("GLOBAL", new)


def times_global(x: Tensor) -> Tensor:
    return x * GLOBAL


@case
def an_entry_of_a_dict() -> Case:
    params = {"w": torch.ones(3), "b": torch.ones(3)}
    return lambda x: x * params["w"] + params["b"], lambda new: params.update(w=new)


@case
def one_of_two_names_of_a_tensor() -> Case:
    w = torch.ones(3)
    params = {"w": w, "same": w}
    return lambda x: x * params["w"] + params["same"] + w, lambda new: params.update(w=new)


@case
def a_dict_that_is_replaced() -> Case:
    params = {"w": torch.ones(3)}

    def change(new: Tensor) -> None:
        nonlocal params
        params = {"w": new}

    return lambda x: x * params["w"], change


@case
def a_dict_that_grows() -> Case:
    params = {"w": torch.ones(3)}

    def change(new: Tensor) -> None:
        params[f"w{len(params)}"] = new

    return lambda x: x * sum(params.values()), change


@case
def a_list_that_grows_and_shrinks() -> Case:
    params = [torch.ones(3), torch.ones(3)]

    def change(new: Tensor) -> None:
        params[:] = [new] * (5 - len(params))

    return lambda x: x * sum(params), change


@case
def a_tuple_that_is_replaced() -> Case:
    params: tuple[Tensor, ...] = (torch.ones(3),)

    def change(new: Tensor) -> None:
        nonlocal params
        params = (*params, new)

    return lambda x: x * sum(params), change


@case
def a_named_tuple() -> Case:
    params = Named(torch.ones(3), {"b": torch.ones(3)})
    return lambda x: x * params.w + params.b["b"], lambda new: params.b.update(b=new)


@case
def other_containers() -> Case:
    ordered, queue = OrderedDict(w=torch.ones(3)), deque([torch.ones(3)])
    default = defaultdict(lambda: torch.zeros(3), w=torch.ones(3))

    def change(new: Tensor) -> None:
        ordered["w"] = default["w"] = new
        queue[0] = new * 2

    return lambda x: x * ordered["w"] + queue[0] - default["w"] ** 2, change


@case
def an_attribute() -> Case:
    return lambda x: x * SETTINGS.w, lambda new: setattr(SETTINGS, "w", new)


@case
def deep_inside() -> Case:
    return lambda x: x * SETTINGS.inner["w"][0], lambda new: SETTINGS.inner.update(w=[new])


@case
def an_attribute_of_a_module_of_python() -> Case:
    MODULE.w = torch.ones(3)
    return lambda x: x * MODULE.w, lambda new: setattr(MODULE, "w", new)


@case
def a_dataclass() -> Case:
    config = Config(torch.ones(3))
    return lambda x: x * config.w, lambda new: setattr(config, "w", new)


@case
def a_bound_method() -> Case:
    layer = Layer()
    return layer.method, lambda new: setattr(layer, "w", new)


@case
def an_object_that_is_called() -> Case:
    layer = Layer()
    return functools.partial(layer), lambda new: setattr(layer, "w", new)


@case
def a_slot() -> Case:
    layer = Layer()
    return lambda x: x * layer.slot, lambda new: setattr(layer, "slot", new)


@case
def a_property() -> Case:
    layer = Layer()
    return lambda x: x * layer.doubled, lambda new: setattr(layer, "w", new)


@case
def a_class_attribute() -> Case:
    return Layer.of_class, lambda new: setattr(Layer, "shared", new)


@case
def an_object_that_is_replaced() -> Case:
    layer = Layer()

    def change(new: Tensor) -> None:
        nonlocal layer
        layer = Layer()
        layer.w = new

    return lambda x: layer(x), change


@case
def a_partial() -> Case:
    params = {"w": torch.ones(3)}
    return functools.partial(lambda p, x, b: x * p["w"] + b["w"], params, b=params), (
        lambda new: params.update(w=new)
    )


@case
def a_default_argument() -> Case:
    def f(x: Tensor, w: Tensor = GLOBAL, *, b: Tensor = GLOBAL) -> Tensor:
        return x * w + b

    def change(new: Tensor) -> None:
        f.__defaults__, f.__kwdefaults__ = (new,), {"b": new * 2}

    return f, change


@case
def an_attribute_of_a_function() -> Case:
    def f(x: Tensor) -> Tensor:
        return x * SETTINGS.function.w

    SETTINGS.function = f
    f.w = torch.ones(3)
    return f, lambda new: setattr(f, "w", new)


@case
def another_function_of_the_same_code() -> Case:
    def factory(w: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: x * w

    f = factory(torch.ones(3))

    def change(new: Tensor) -> None:
        nonlocal f
        f = factory(new)

    return lambda x: f(x), change


@case
def another_function() -> Case:
    first, second = torch.ones(3), torch.ones(3)
    functions = [lambda x: x * first, lambda x: x + second]

    def change(new: Tensor) -> None:
        nonlocal second
        second = new
        functions.reverse()

    return lambda x: functions[0](x), change


@case
def a_jitted_function_inside() -> Case:
    params = {"w": torch.ones(3)}
    inner = jit(lambda x: x * params["w"])
    return lambda x: inner(x) + 1, lambda new: params.update(w=new)


def test_a_jitted_function_is_followed_to_its_original_and_not_into_its_programs() -> None:
    params = {"w": torch.ones(3)}
    inner = jit(lambda x: x * params["w"])
    inner(torch.ones(3))
    assert [name for name, _ in closed_over_tensors(lambda x: inner(x))] == ["inner.params.w"]


@case
def a_module_with_assigned_parameters() -> Case:
    module = torch.nn.Linear(3, 3).requires_grad_(False)

    def change(new: Tensor) -> None:
        state = {"weight": new.expand(3, 3).clone(), "bias": new.clone()}
        module.load_state_dict(state, assign=True)

    return lambda x: module(x), change


@case
def a_module_with_another_layer() -> Case:
    module = torch.nn.Sequential(torch.nn.Linear(3, 3)).requires_grad_(False)

    def change(new: Tensor) -> None:
        module[0] = torch.nn.Linear(3, 3).requires_grad_(False)
        module[0].weight.copy_(new.expand(3, 3))

    return lambda x: module(x), change


@case
def buffers_of_a_functional_call() -> Case:
    module = torch.nn.BatchNorm1d(3).eval()
    params = {name: leaf.detach() for name, leaf in module.named_parameters()}
    return lambda x: functional_call(module, params, (x[None],)), (
        lambda new: setattr(module, "running_mean", new)
    )


@case
def a_gradient() -> Case:
    w = torch.ones(3)
    w.grad = torch.ones(3)
    return lambda x: x * w.grad, lambda new: setattr(w, "grad", new)


@case
def inside_a_scan_and_a_gradient() -> Case:
    params = {"w": torch.ones(3)}

    def f(x: Tensor) -> Any:
        inner = grad(lambda z: (z**2 * params["w"]).sum())
        return scan(lambda c, row: (c + row * params["w"], inner(row)), x, torch.stack([x] * 5))

    return f, lambda new: params.update(w=new)


@case
def a_training_step() -> Case:
    data = {"x": torch.ones(4, 3), "y": torch.ones(4, 1)}
    model, opt = nn.sequential(nn.linear(3, 1)), optim.sgd(0.1)
    step = fdl.train_step(fdl.supervised(model, losses.mse), opt)
    state = fdl.TrainState.create(model, opt, key=fdl.random.key(0))
    return lambda x: step(state, (data["x"] * x, data["y"])), (
        lambda new: data.update(x=new.expand(4, 3))
    )


@pytest.mark.parametrize("name", CASES)
def test_names_mean_at_each_call_what_they_mean_eagerly(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for holder, attr in [(Layer, "shared"), (SETTINGS, "w")]:
        monkeypatch.setattr(holder, attr, torch.ones(3))
    monkeypatch.setitem(globals(), "GLOBAL", torch.ones(3))
    fn, change = CASES[name]()
    jitted = jit(fn)
    for i in range(4):
        got = jitted(X)
        with disable_jit():
            assert fdl.tree.diff(fn(X), got, rtol=1e-6) == []
        change(torch.linspace(2, 3, 3) + i)
    assert all("which no name leads to" not in text for text in jitted.report()[0].closed_over)


def test_another_tensor_of_the_same_signature_is_read_by_the_same_program() -> None:
    params = {"w": torch.ones(3), "deep": [torch.ones(3)]}
    jitted = jit(lambda x: x * params["w"] + params["deep"][0])
    for i in range(4):
        params["w"], params["deep"] = torch.full((3,), float(i)), [torch.ones(3) * i]
        assert jitted(X).tolist() == (X * i + i).tolist()
    (report,) = jitted.report()
    assert set(report.closed_over) == {"params.w", "params.deep.0"}


def test_alternating_signatures_are_not_traced_again() -> None:
    small, large = torch.ones(3), torch.ones(2, 3)
    w = small
    jitted = jit(lambda x: x * w)
    for _ in range(3):
        w = small
        assert jitted(X).shape == (3,)
        w = large
        assert jitted(X).shape == (2, 3)
    assert [r.why for r in jitted.report()] == [
        "the first call",
        "the closed-over tensors have another signature",
    ]


def test_a_name_that_is_gone_raises_as_it_does_eagerly() -> None:
    params = {"w": torch.ones(3)}
    jitted = jit(lambda x: x * params["w"])
    jitted(X)
    del params["w"]
    with pytest.raises(KeyError, match="w"):
        jitted(X)
    params["w"] = torch.zeros(3)
    assert jitted(X).tolist() == [0.0, 0.0, 0.0]


def test_globals_of_code_without_a_file_are_read() -> None:
    """As with `python -c`, in notebooks and on the pages of the documentation."""
    for file in ("<string>", "<stdin>", "<ipython-input-1>", "/tmp/ipykernel_1/1.py"):
        names: dict[str, Any] = {"w": torch.ones(3)}
        exec(compile("def f(x): return x * w", file, "exec"), names)
        jitted = jit(names["f"])
        for factor in (1.0, 2.0):
            names["w"] = torch.full((3,), factor)
            assert torch.equal(jitted(X), X * factor)


def test_the_report_lists_tensors_without_a_name() -> None:
    hidden = iter([torch.ones(3), torch.ones(3)])
    jitted = jit(lambda x: x * next(hidden))
    jitted(X)
    (report,) = jitted.report()
    assert report.closed_over == ("float32[3], without a name: fixed at the first call",)


def test_python_numbers_are_decided_once_per_program() -> None:
    """As with `jax.jit`: use a tensor for what changes."""
    factor = 2.0
    jitted = jit(lambda x: x * factor)
    jitted(X)
    factor = 3.0
    assert torch.equal(jitted(X), X * 2)


def test_gradients_follow_a_new_tensor() -> None:
    w = torch.ones(3)
    jitted, x = jit(lambda x: (x**2 * w).sum()), X.clone().requires_grad_()
    for i in range(3):
        w = torch.full((3,), float(i))
        (got,) = torch.autograd.grad(jitted(x), x)
        assert torch.equal(got, 2 * i * X)
    assert len(jitted.report()) == 2  # forwards and backwards


@pytest.mark.slow
def test_closed_over_conjugates_and_negatives_are_read_as_such() -> None:
    """torch computes them lazily; memory holds other values, perhaps with other strides."""
    z = torch.complex(torch.ones(3), torch.arange(3.0))
    box = {"negative": z.conj().imag, "conjugate": z.conj()}
    y = torch.arange(3.0)

    def body(c: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return c + box["negative"] * x, (c * box["conjugate"]).abs()

    functions: list[Callable[..., Any]] = [
        lambda y: y + box["negative"],
        lambda y: y * box["conjugate"],
        lambda y: fdl.scan(body, y, y),
        torch.func.grad(lambda y: (y * box["negative"]).sum()),
    ]
    jitted = [fdl.jit(fn) for fn in functions]
    for _ in range(3):
        assert_equal([fn(y) for fn in jitted], [fn(y) for fn in functions])
    box |= {"negative": torch.ones(3), "conjugate": z.clone()}  # and then plain ones
    assert_equal([fn(y) for fn in jitted], [fn(y) for fn in functions])
