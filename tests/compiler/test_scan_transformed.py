"""`scan` under `grad`, `vmap` and `jvp` in `jit` equals the Python loop, and stays a loop."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.functional_tensor import FunctorchFunctionalizeAPI
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx import GraphModule

import fdl
from fdl import jit, random, scan, tree
from fdl._compiler import _unknown_ops
from fdl._compiler._closed_body import HOOKS
from fdl._compiler._graph import LOOP
from fdl._compiler._signature import flatten
from fdl._compiler._trace import trace
from fdl.transforms import checkpoint, stop_gradient
from tests.support.soak import repeats

STEPS = 13  # prime: no steps are unrolled
torch.manual_seed(0)
W = 0.5 * torch.randn(3, 3, dtype=torch.float64)
XS = torch.randn(STEPS, 3, dtype=torch.float64)
C = torch.randn(3, dtype=torch.float64)
G = torch.randn(3, dtype=torch.float64)
LABELS = torch.arange(STEPS) % 3
ROWS = torch.randn(STEPS, 6, 3, dtype=torch.float64)
KEYS = random.split(random.key(0), STEPS)


class Rounded(torch.autograd.Function):
    """A straight-through estimator whose derivative is 2, to tell it from any other."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.round(x * 4) / 4

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


class Scaled(torch.autograd.Function):
    """Takes a number, and has a result without a derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return x * scale, x.argmax()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.scale = inputs[1]
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor, None]:
        return g * ctx.scale * ctx.saved_tensors[0], None


# Bodies `(w, carry, x) -> (carry, y)`, which close over `w`.


def tanh(w: Tensor, c: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    c = torch.tanh(w @ c + x)
    return c, (c * c).sum()


def grad_inside(w: Tensor, c: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    def energy(c: Tensor, scale: Tensor) -> Tensor:
        return (torch.tanh(w @ c + x) ** 2).sum() * scale

    return c - 0.1 * grad(energy)(c, w[0, 0]), energy(c, w[1, 1])


def vmap_grad_inside(w: Tensor, c: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    def error(c: Tensor, row: Tensor, y: Tensor) -> Tensor:
        return (row @ c - y) ** 2

    grads = vmap(grad(error), in_dims=(None, 0, 0))(c, w, x)
    return c - 0.05 * (grads / (1 + grads.norm(dim=1, keepdim=True))).sum(0), None


def jvp_inside(w: Tensor, c: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    value, slope = jvp(lambda c: torch.tanh(w @ c + x), (c,), (x,))
    return value + 0.1 * slope, slope


def vjp_inside(w: Tensor, c: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    y, pull_back = vjp(lambda w: torch.tanh(w @ c + x), w)
    return c - 0.1 * pull_back(y)[0] @ c, None


def hessian_inside(w: Tensor, c: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    return c - 0.1 * hessian(lambda c: (torch.tanh(w @ c + x) ** 2).sum())(c) @ c, None


def scan_inside(w: Tensor, c: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    def body(c: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(w @ c + x * i), c.sum()

    return scan(body, c, torch.linspace(0, 1, STEPS, dtype=torch.float64))


def scan_in_grad_inside(w: Tensor, c: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    def last(z: Tensor) -> Tensor:
        h, _ = scan(lambda h, i: (torch.tanh(w @ h + z * i), None), c, XS[:, 0])
        return h.sum()

    return c - 0.1 * grad(last)(c), None


def in_place(w: Tensor, c: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    h = (w @ c).clone()
    h.add_(x)
    h[1] = h[0] * 2
    return torch.tanh(h), None


def under_no_grad(w: Tensor, c: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    with torch.no_grad():
        scale = (w @ c).abs().sum() + 1
    return torch.tanh(w @ c + x) / scale, c.detach() * c + stop_gradient(c)


def straight_through(w: Tensor, c: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    return torch.tanh(Rounded.apply(w @ c) + x), None


def two_results(w: Tensor, c: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    y, i = Scaled.apply(w @ c, 3.0)
    return torch.tanh(y + x * i), i


def checkpointed(w: Tensor, c: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    return checkpoint(lambda w, c, x: torch.tanh(w @ c + x))(w, c, x), None


def closed_over_results(w: Tensor, c: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    return w[0], (w, C, w[1] * x)


def many_operations(w: Tensor, c: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    a = torch.einsum("ij,j->i", w, c).sort().values
    spectrum = torch.fft.rfft(a).abs().sum()
    solved = torch.linalg.solve(w + 5 * torch.eye(3, dtype=w.dtype), a)
    root = torch.linalg.cholesky(w @ w.T + torch.eye(3, dtype=w.dtype)).sum()
    c = torch.tanh(a + 0.1 * a.topk(2).values.sum() + 0.1 * spectrum + solved + x + 0.01 * root)
    return c, a.cumsum(0).logcumsumexp(0)


def in_place_inside(w: Tensor, c: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    return scan(lambda s, _: (s.mul(x).mul_(2.0).sin(), None), w @ c, length=STEPS)[0], None


def strided_writes(w: Tensor, c: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    square = c[:, None] * x
    square.fill_diagonal_(2.0)
    h = w @ square.sin().sum(0)
    torch.as_strided(h, (2,), (1,), 1).mul_(2.0)
    return torch.tanh(h), None


def slice_writes(w: Tensor, c: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    h = w @ c
    h = h * 1.0
    h[1:] = x[:2]
    return torch.tanh(h), None


def previous_row(w: Tensor, c: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    return x, w @ c


def normalised(w: Tensor, c: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    return F.layer_norm(w @ c * x, (3,), w[0], w[1]), None


def scan_in_a_checkpoint(w: Tensor, c: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    def run(w: Tensor, c: Tensor) -> Tensor:
        return scan(lambda d, u: (torch.tanh(w @ d + u), None), c, XS)[0]

    return checkpoint(run)(w, c) * x, None


def bags(w: Tensor, c: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    return torch.tanh(c + F.embedding_bag(torch.tensor([[0, 2], [1, 1]]), w).sum(0)), None


def draws(w: Tensor, c: Tensor, x: Tensor) -> tuple[Tensor, Any]:
    keep = random.bernoulli(KEYS[0], 0.7, (3,))
    return torch.tanh(w @ c) * keep + x, None


BODIES: list[Callable[..., Any]] = [
    tanh, grad_inside, vmap_grad_inside, jvp_inside, vjp_inside, hessian_inside, scan_inside,
    scan_in_grad_inside, in_place, under_no_grad, straight_through, two_results, checkpointed,
    closed_over_results, many_operations, draws, in_place_inside, strided_writes, bags,
    slice_writes, previous_row, normalised, scan_in_a_checkpoint,
]  # fmt: skip
WITHOUT_FORWARD_MODE = (straight_through, two_results)  # they have no jvp


def total(body: Callable[..., Any], w: Tensor, c: Tensor, xs: Tensor) -> Tensor:
    carry, ys = scan(lambda c, x: body(w, c, x), c, xs)
    smooth = [y for y in tree.leaves(ys) if isinstance(y, Tensor) and y.is_floating_point()]
    return carry.sum() + sum(y.cos().sum() for y in smooth)


TWO = torch.stack([W, 0.7 * W])
FORMS: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
    "grad": lambda f: grad(f, argnums=(0, 1, 2))(W, C, XS),
    "vmap": lambda f: vmap(f, in_dims=(0, None, None))(TWO, C, XS),
    "vmap over xs": lambda f: vmap(f, in_dims=(None, None, 1))(
        W, C, torch.stack([XS, XS.cos()], 1)
    ),
    "jvp": lambda f: jvp(f, (W, C, XS), (W.cos(), C.cos(), XS.cos())),
    "vmap of grad": lambda f: vmap(grad(f, argnums=(0, 1)), in_dims=(0, None, None))(TWO, C, XS),
    "grad of vmap": lambda f: grad(
        lambda w, c: vmap(f, in_dims=(0, None, None))(w, c, XS).sum(), argnums=(0, 1)
    )(TWO, C),
    "jvp of grad": lambda f: jvp(lambda w: grad(f)(w, C, XS), (W,), (W.cos(),)),
    "grad of grad": lambda f: grad(lambda w: (grad(f, argnums=1)(w, C, XS) ** 2).sum())(W),
    "jacrev of jvp": lambda f: jacrev(lambda w: jvp(lambda c: f(w, c, XS), (C,), (G,))[1])(W),
}


def close(actual: Any, expected: Any) -> None:
    pairs = zip(tree.leaves(actual), tree.leaves(expected), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def cases() -> list[tuple[Callable[..., Any], str]]:
    """Pair each form with the plain body, and each body with two forms in turn, or with all."""
    forms = list(FORMS)
    count = repeats(2, len(forms))
    pairs = [(tanh, form) for form in forms]
    for i, body in enumerate(BODIES[1:]):
        pairs += [(body, forms[(count * i + j) % len(forms)]) for j in range(count)]
    return pairs


@pytest.mark.usefixtures("plain_backend")
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of eager torch
@pytest.mark.parametrize(("body", "form"), cases())
def test_equals_the_python_loop(body: Callable[..., Any], form: str) -> None:
    if (body in WITHOUT_FORWARD_MODE and "jvp" in form) or (body is bags and " of " in form):
        pytest.skip("torch has no such derivative of the function")
    f = jit(lambda: FORMS[form](lambda *args: total(body, *args)), strict=True)
    with fdl.disable_jit():
        expected = f()
    close(f(), expected)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch, plain_backend: None) -> list[GraphModule]:
    """Record the graphs that `jit` traces."""
    recorded: list[GraphModule] = []
    original = _unknown_ops.trace

    def trace(*args: Any) -> Any:
        traced = original(*args)
        recorded.append(traced.graph)
        return traced

    monkeypatch.setattr(_unknown_ops, "trace", trace)
    return recorded


def calls_of(op: Any, graph: GraphModule) -> int:
    return sum(node.target is op for node in graph.graph.nodes)


@pytest.mark.parametrize(
    ("form", "loops"),
    {
        "vmap": 1,
        "jvp": 1,
        "grad": 2,
        "vmap of grad": 2,
        "grad of vmap": 2,
        "jvp of grad": 2,
    }.items(),
)
def test_is_one_loop_for_each_direction(form: str, loops: int, graphs: list[GraphModule]) -> None:
    jit(lambda: FORMS[form](lambda *args: total(tanh, *args)), strict=True)()
    assert len(graphs[-1].graph.nodes) < 100, "the steps are unrolled"
    assert calls_of(LOOP, graphs[-1]) == loops


@pytest.mark.parametrize("again", [False, True])
def test_products_are_computed_again_only_in_a_checkpoint(
    again: bool, graphs: list[GraphModule]
) -> None:
    step = lambda w, c: torch.tanh(w @ torch.tanh(w @ c))  # noqa: E731
    body = checkpoint(step) if again else step

    def loss(w: Tensor) -> Tensor:
        return scan(lambda c, _: (body(w, c), None), W, length=STEPS)[0].sum()

    jit(lambda w: grad(loss)(w), strict=True)(W)
    bodies = [cast(GraphModule, body) for body in graphs[-1].children()]
    assert [calls_of(torch.ops.aten.mm.default, body) for body in bodies] == [2, 4 + 2 * again]


@pytest.mark.usefixtures("plain_backend")
def test_a_carry_of_many_dtypes_and_of_leaves_that_do_not_change() -> None:
    data = torch.randn(7, 3, dtype=torch.float64)

    def last(w: Tensor, c: Tensor, data: Tensor) -> Any:
        def body(s: Any, x: Tensor) -> Any:
            c, n, flag, h, half, data = s
            c = torch.where(flag, torch.tanh(w @ c + x + data.mean(0)), c)
            new = (c, n + 1, c.sum() > 0, h + c.float().sum(), half * c.sum().bfloat16(), data)
            return new, (n, c.argmax(), c * n)

        init = (
            c, torch.tensor(0), torch.tensor(True), torch.zeros(()),
            torch.ones((), dtype=torch.bfloat16), data,
        )  # fmt: skip
        s, ys = scan(body, init, XS)
        return s[0].sum() + s[3] + s[4] + ys[2].sum() + s[5].sum(), (s, ys)

    fn = jit(lambda *z: grad(last, argnums=(0, 1, 2), has_aux=True)(*z), strict=True)
    with fdl.disable_jit():
        expected = fn(W, C, data)
    actual = fn(W, C, data)
    assert [x.dtype for x in tree.leaves(actual)] == [x.dtype for x in tree.leaves(expected)]
    close(actual, expected)


@pytest.mark.usefixtures("plain_backend")
def test_batched_and_unbatched_leaves_and_keys() -> None:
    def run(w: Tensor, key: Tensor) -> Any:
        def body(s: Any, key: Tensor) -> Any:
            c, n = s
            return (torch.tanh(w @ c) * random.bernoulli(key, 0.7, (3,)) + G, n + 1), c

        return scan(body, (C, torch.tensor(0)), random.split(key, STEPS))

    fn = jit(lambda w, keys: vmap(run)(w, keys), strict=True)
    keys = random.split(random.key(1), 2)
    expected = [run(w, key) for w, key in zip(TWO, keys, strict=True)]
    actual = fn(TWO, keys)
    for i, one in enumerate(expected):
        close(tree.map(lambda x, i=i: x[i], actual), one)


@pytest.mark.usefixtures("plain_backend")
@pytest.mark.parametrize("order", [grad, hessian, lambda f: vmap(jacfwd(f))])
def test_losses_and_layers(order: Callable[..., Any]) -> None:
    def loss(w: Tensor) -> Tensor:
        def body(c: Tensor, row: Any) -> Any:
            x, label, batch = row
            norm = F.batch_norm(batch * w[0], None, None, training=True)
            return c + w @ x, F.cross_entropy((w @ x)[None], label[None]) + norm.pow(3).mean()

        return scan(body, C, (XS, LABELS, ROWS))[1].sum()

    fn = jit(lambda w: order(loss)(w), strict=True)
    args = TWO if order not in (grad, hessian) else W
    with fdl.disable_jit():
        expected = fn(args)
    close(fn(args), expected)


@pytest.mark.usefixtures("plain_backend")
def test_autocast_casts_once() -> None:
    def loss(w: Tensor) -> Tensor:
        def body(c: Tensor, x: Tensor) -> Any:
            return torch.tanh((w @ c + x).float()), None

        return scan(body, C.float(), XS.float())[0].sum()

    fn = jit(lambda w: grad(loss)(w), strict=True)
    with torch.autocast("cpu", torch.bfloat16):
        with fdl.disable_jit():
            expected = fn(W.float())
        torch.testing.assert_close(fn(W.float()), expected, rtol=0.02, atol=0.02)


def test_a_custom_function_beside_operations_in_place_is_unrolled_and_says_so(
    plain_backend: None,
) -> None:
    def loss(w: Tensor) -> Tensor:
        def body(c: Tensor, x: Tensor) -> Any:
            h = Rounded.apply(w @ c).clone()
            h[0] = 1.0
            return torch.tanh(h + x), None

        return scan(body, C, XS)[0].sum()

    fn = jit(lambda w: grad(loss)(w))
    with pytest.warns(UserWarning, match=r"its 13 steps are unrolled"):
        actual = fn(W)
    with fdl.disable_jit():
        close(actual, fn(W))
    assert "Rounded.apply stands beside operations in place" in fn.report()[0].fallbacks[0]
    with pytest.raises(RuntimeError, match="its 13 steps are unrolled"):
        jit(lambda w: grad(loss)(w), strict=True)(W)


@pytest.mark.usefixtures("plain_backend")
def test_a_pullback_made_in_the_body_under_vmap_alone() -> None:
    def body(c: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        _, pull_back = vjp(lambda c: (c * c).sin(), c)
        return c + 0.1 * pull_back(x)[0], c.sum()

    c, xs = random.normal(random.key(1), (2, 3)), random.normal(random.key(2), (4, 3))
    expected = c
    for x in xs:
        expected = expected + 0.1 * x * 2 * expected * (expected * expected).cos()
    got, _ = jit(vmap(lambda c: scan(body, c, xs)))(c)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("order", [grad, lambda f: vmap(grad(f))])
def test_a_pullback_from_outside_is_unrolled_and_says_so(
    order: Callable[..., Any], plain_backend: None
) -> None:
    def loss(c: Tensor) -> Tensor:
        _, pull_back = vjp(lambda c: (c * c).sin(), c)
        return scan(lambda s, _: (pull_back(s)[0], None), C, length=STEPS)[0].sum()

    args = W if order is not grad else C
    fn = jit(lambda c: order(loss)(c))
    with fdl.disable_jit():
        expected = fn(args)
    with pytest.warns(UserWarning, match="a pullback that was made outside"):
        close(fn(args), expected)


@pytest.mark.usefixtures("plain_backend")
@pytest.mark.parametrize("transform", [vmap, lambda f: grad(lambda k: f(k).sum())])
def test_a_loop_of_which_nothing_depends_on_the_transformed_argument(
    transform: Callable[..., Any],
) -> None:
    fn = jit(lambda k: transform(lambda k: total(tanh, W, C, XS) * k)(k), strict=True)
    close(fn(C), transform(lambda k: total(tanh, W, C, XS) * k)(C))


@pytest.mark.usefixtures("plain_backend")
def test_results_that_do_not_depend_on_what_is_differentiated() -> None:
    def loss(x: Tensor) -> Tensor:
        ones = scan(lambda c, _: (c, torch.ones(2)), x, length=STEPS)[1]
        return ones.sum() + fdl.map(lambda t: (t > 0).double().mean(), x * XS).sum() + x.sum()

    assert jit(lambda x: grad(loss)(x), strict=True)(C).tolist() == [1, 1, 1]


@pytest.mark.usefixtures("plain_backend")
def test_a_gradient_penalty_by_autograd_at_the_same_level() -> None:
    def penalty(x: Tensor) -> Tensor:
        y = scan(lambda c, _: ((W @ c).tanh() * c.exp(), None), x, length=STEPS)[0].sum()
        (slope,) = torch.autograd.grad(y, x, create_graph=True)
        return (slope**2).sum()

    fn = jit(lambda x: grad(penalty)(x), strict=True)
    with fdl.disable_jit():
        expected = fn(0.1 * C)
    close(fn(0.1 * C), expected)


def overwritten(c: Tensor) -> Tensor:
    y = c * 2
    with torch.no_grad():
        y.clamp_(-0.5, 0.5)
    return y


def grad_under_no_grad(c: Tensor) -> Tensor:
    with torch.no_grad():
        return grad(lambda z: (z * c).sin().sum())(c)


def function_under_no_grad(c: Tensor) -> Tensor:
    with torch.no_grad():
        return Rounded.apply(c)


def scan_under_no_grad(c: Tensor) -> Tensor:
    with torch.no_grad():
        return scan(lambda d, u: (d, d * u), c, XS)[1].sum(0)


def changed_behind_autograd(c: Tensor) -> Tensor:
    y = c * 2
    y.detach().mul_(3)
    return y


def detached_in_place(c: Tensor) -> Tensor:
    return (c * 2).detach_()


def by_autograd(c: Tensor) -> Tensor:
    return torch.autograd.grad((c.sin() ** 2).sum(), c, create_graph=True)[0]


@pytest.mark.parametrize(
    "fn",
    [
        overwritten, grad_under_no_grad, function_under_no_grad, scan_under_no_grad,
        changed_behind_autograd, detached_in_place, by_autograd,
    ],
)  # fmt: skip
@pytest.mark.parametrize("order", [grad, lambda f: vmap(grad(f))])
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of eager torch
def test_bodies_that_only_autograd_understands_are_unrolled(
    order: Callable[..., Any], fn: Callable[[Tensor], Tensor], plain_backend: None
) -> None:
    def loss(c: Tensor) -> Tensor:
        return scan(lambda c, x: (torch.tanh(c * x - fn(c)), None), c, XS)[0].sum()

    jitted = jit(lambda c: order(loss)(c))
    args = C if order is grad else W
    with fdl.disable_jit():
        expected = jitted(args)
    with pytest.warns(UserWarning, match=r"its 13 steps are unrolled"):
        close(jitted(args), expected)


@pytest.mark.usefixtures("plain_backend")
def test_threads_trace_one_after_the_other() -> None:
    def compile_some(_: int) -> Tensor:
        return jit(lambda w: grad(lambda w: total(tanh, w, C, XS))(w), strict=True)(W)

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(compile_some, range(6)))
    for result in results:
        close(result, results[0])


@pytest.mark.usefixtures("plain_backend", "real_loops")
def test_tangents_have_the_dtype_of_a_carry_without_axes() -> None:
    """torch's tangent of 0.9 c is float64 for a 0-d c of float32."""
    fn = lambda c: fdl.scan(lambda c, x: (0.9 * c + x, c), c, torch.arange(5.0))  # noqa: E731
    c = torch.tensor(0.5)
    (value, slope), expected = (f(c) for f in (jit(lambda c: jvp(fn, (c,), (c,))), fn))
    close(value, expected)
    assert slope[0].dtype == torch.float32
    torch.testing.assert_close(slope[0], torch.tensor(0.9**5 * 0.5))


@pytest.mark.usefixtures("plain_backend")
def test_a_tangent_of_a_quantile() -> None:
    """torch's meta kernel lets C++ print an argument, of which a tangent cannot be asked there."""
    x = torch.linspace(0, 1, 5)
    fn = lambda x: jvp(lambda x: (x * x).quantile(0.3), (x,), (torch.ones(5),))  # noqa: E731
    try:
        close(jit(fn)(x), fn(x))
    except RuntimeError as error:  # of torch 2.11
        assert "aten.equal" in str(error)
    close(grad(lambda x: x.sin().sum())(x), x.cos())  # torch is as it was


@pytest.mark.usefixtures("plain_backend")
def test_torch_is_as_it_was_after_a_trace() -> None:
    hooks = [*HOOKS, (FunctorchFunctionalizeAPI, "functionalize", None)]
    before = [vars(owner)[name] for owner, name, _ in hooks]
    jit(lambda w: grad(lambda w: total(tanh, w, C, XS))(w))(W)
    jit(lambda w: fdl.scan(lambda c, x: (c + x.T, None), w.clone().add_(1), w.expand(2, 3, 3)))(W)
    assert [vars(owner)[name] for owner, name, _ in hooks] == before


def test_views_in_a_body_are_no_copies_if_a_function_writes_in_place() -> None:
    """torch's functionalization would make them copies: a product reads its transpose at once."""

    def fn(w: Tensor, x: Tensor) -> Any:
        start = w.clone().add_(1)
        return fdl.scan(lambda h, row: (h @ start.T + row.unsqueeze(1), h.sum()), start, x)

    leaves, spec = flatten(((torch.rand(3, 3), torch.rand(4, 3)), {}))
    graph = trace(fn, leaves, spec, unroll=False).graph
    (body,) = (child for child in graph.children() if isinstance(child, GraphModule))
    names = [str(node.target) for node in body.graph.nodes]
    assert any("unsqueeze" in name for name in names)
    assert not any("_copy" in name for name in names)


@pytest.mark.slow
def test_constants_of_a_compiled_loop_may_be_views_and_complex() -> None:
    x = torch.randn(2, 20, 20, dtype=torch.complex128)

    def run(a: Tensor, b: Tensor) -> Any:
        return scan(lambda c, i: (c / 2 + a.T @ b, (c * i).sum()), a, torch.arange(11.0))

    fn = jit(lambda x: (run(x[0], x[1].T), vmap(run, (2, None))(x.permute(1, 2, 0), x[0])))
    with fdl.disable_jit():
        expected = fn(x)
    close(fn(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["grad", "vmap of grad", "jvp of grad"])
def test_compiles(form: str) -> None:
    fn = jit(lambda: FORMS[form](lambda *args: total(scan_inside, *args)), strict=True)
    with fdl.disable_jit():
        expected = fn()
    close(fn(), expected)
    assert fn.report()[0].route == "one program"


@pytest.mark.slow
def test_the_number_of_kernels_does_not_grow_with_the_steps() -> None:
    def kernels(steps: int) -> int:
        fn = jit(lambda w, xs: grad(lambda w: total(tanh, w, C, xs))(w), strict=True)
        fn(W, torch.ones(steps, 3, dtype=torch.float64))
        return fn.report()[0].kernels

    assert kernels(11) == kernels(1009)  # prime: no steps are unrolled
