"""`backward()` through a jitted function, and `torch.func` around one, equal the function alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from fdl import jit, random, scan, tree
from tests.support.asserts import close, draw


def leaf(*shape: int, seed: int = 1) -> Tensor:
    return draw(seed, *shape).requires_grad_()


def rolled(w: Tensor, xs: Tensor) -> Tensor:
    """A scan whose carry, rows and closed-over tensor all need gradients."""
    last, ys = scan(lambda c, x: ((c * w + x).sin(), c * x), w, xs)
    return (last * ys.sum(0)).sum()


@pytest.mark.slow
def test_first_and_second_derivatives_are_those_of_finite_differences(plain_backend: None) -> None:
    jitted = jit(rolled, strict=True)
    args = (leaf(3), leaf(4, 3, seed=2))
    assert gradcheck(jitted, args)
    assert gradgradcheck(jitted, args)


def test_compiled_derivatives_are_those_of_finite_differences() -> None:
    jitted = jit(lambda w, x: (w * x).sin().sum(), strict=True)
    assert gradcheck(jitted, (leaf(3), leaf(3, seed=2)))
    assert [r.route for r in jitted.report()] == ["one program", "one program"]


def test_derivatives_of_complex_functions(plain_backend: None) -> None:
    z = torch.complex(draw(1, 3), draw(2, 3)).requires_grad_()
    assert gradcheck(jit(lambda z: (z * z.conj() * (1 + 2j), (z**2).imag)), (z,))


def outputs(params: dict[str, Tensor], x: Tensor) -> dict[str, Any]:
    return {
        "loss": (params["w"] * x).sin().sum(),
        "count": x.long(),
        "positive": params["w"] > 0,
        "free": torch.ones(2),
        "same": params["w"],
        "x": x,
    }


def test_each_argument_gets_its_gradient_each_result_its_kind(plain_backend: None) -> None:
    params = {"w": leaf(3), "unused": leaf(2)}
    x = draw(2, 3)
    got = jit(outputs)(params, x)
    for name, value in outputs(params, x).items():
        assert torch.equal(got[name], value)
        # A result that depends on no argument gets zeros as its gradient, where autograd has None.
        assert got[name].requires_grad == value.is_floating_point()
    total = got["loss"] + 2 * got["same"].sum() + got["free"].sum()
    w, unused = torch.autograd.grad(total, [params["w"], params["unused"]])
    close(w, (params["w"] * x).cos() * x + 2)
    assert torch.equal(unused, torch.zeros(2, dtype=torch.float64))
    got["same"].detach().add_(1)  # no result shares memory with an argument
    assert torch.equal(params["w"], draw(1, 3))


REGIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": lambda w: (w.detach() * w).sum(),
    "scan": lambda w: scan(lambda c, x: (c + x.detach() * w * x, ()), w, torch.stack([w, w]))[0],
    "straight through": lambda w: w + (w.round() - w).detach(),
}


def without_grad(w: Tensor) -> Tensor:
    with torch.no_grad():
        scale = w * 3
    return (w * scale).sum()


@pytest.mark.parametrize("f", [*REGIONS.values(), without_grad], ids=[*REGIONS, "no_grad"])
def test_what_is_cut_off_stays_cut_off(f: Callable[[Tensor], Tensor], plain_backend: None) -> None:
    w = leaf(3)
    (got,) = torch.autograd.grad(jit(f)(w).sum(), w)
    (expected,) = torch.autograd.grad(f(w).sum(), w)
    close(got, expected)
    assert expected.abs().min() > 1e-3


def test_results_are_arguments_of_others(plain_backend: None) -> None:
    """Part of a larger computation, with hooks, expanded inputs, and several backward passes."""
    inner = jit(lambda w, x: (w * x).sin())
    w, x = leaf(), draw(2, 4)
    y = inner(w.expand(4) * 2, x)
    z = inner(y, y.detach()).sum()
    (got,) = torch.autograd.grad(z, w, retain_graph=True)
    (again,) = torch.autograd.grad(z, w)
    y = (w * 2 * x).sin()
    (expected,) = torch.autograd.grad((y * y.detach()).sin().sum(), w)
    close(got, expected)
    assert torch.equal(got, again)


def test_random_draws_are_the_same_backwards(plain_backend: None) -> None:
    def f(w: Tensor, key: Tensor) -> Tensor:
        return (w * random.bernoulli(key, 0.5, (50,))).sum()

    w, key = torch.ones(50, requires_grad=True), random.key(0)
    jit(f)(w, key).backward()
    assert torch.equal(w.grad, random.bernoulli(key, 0.5, (50,)).float())


def test_training_by_torch_optim_compiles_forward_and_backward_once(
    plain_backend: None, count_programs
) -> None:
    model, twin = torch.nn.Linear(3, 1).double(), torch.nn.Linear(3, 1).double()
    twin.load_state_dict(model.state_dict())

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, x).square().mean()

    jitted, graphs, x = jit(loss), count_programs(), draw(1, 5, 3)
    for one, f in ((model, jitted), (twin, loss)):
        opt = torch.optim.SGD(one.parameters(), 0.1)
        for _ in range(4):
            opt.zero_grad()
            f(dict(one.named_parameters()), x).backward()
            opt.step()
    assert graphs.count == 2
    assert [r.why for r in jitted.report()] == ["the first call", "backward: the first call"]
    close(dict(model.named_parameters()), dict(twin.named_parameters()))


def test_no_gradient_is_asked_for_where_none_is_wanted(plain_backend: None) -> None:
    """For arguments that do not require grad, and under no_grad."""
    jitted = jit(lambda w, x: (w * x).sum())
    w, x = leaf(3), draw(2, 3)
    with torch.no_grad():
        assert not jitted(w, x).requires_grad
    jitted(w, x).backward()
    assert x.grad is None
    why = ["the first call", "gradients: True, was False", "backward: the first call"]
    assert [r.why for r in jitted.report()] == why


def test_what_cannot_be_differentiated_raises(plain_backend: None) -> None:
    with pytest.raises(ValueError, match="nothing can be donated where an argument requires grad"):
        jit(lambda w: w * 2, donate_argnums=0)(leaf(3))
    w = leaf(3)
    y = jit(lambda w: (w * w).sum())(w)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize(
    "transform",
    [grad, jacrev, jacfwd, hessian, lambda f: lambda w: vmap(grad(f))(torch.stack([w, 2 * w]))],
    ids=["grad", "jacrev", "jacfwd", "hessian", "vmap of grad"],
)
def test_torch_func_around_a_jitted_function(
    transform: Callable[..., Any], plain_backend: None
) -> None:
    w, f = draw(1, 3), lambda w: rolled(w, XS)
    close(transform(jit(f))(w), transform(f)(w))
    close(jit(transform(jit(f)))(w), transform(f)(w))


def test_forward_mode_around_a_jitted_function(plain_backend: None) -> None:
    w, f = draw(1, 3), lambda w: rolled(w, XS)
    expected = jvp(f, (w,), (w,))
    close(jvp(jit(f), (w,), (w,)), expected)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(jit(f)(forward_ad.make_dual(w, w)))
        close((got.primal, got.tangent), expected)


XS = draw(5, 4, 3)


def test_a_population_of_backwards(plain_backend: None) -> None:
    w = leaf(2, 3)
    vmap(jit(lambda w: rolled(w, XS)))(w).sum().backward()
    expected = tree.stack([grad(rolled)(row, XS) for row in w.detach()])
    close(w.grad, expected)
