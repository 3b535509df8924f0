"""Curvature products equal those with the matrix, and matrices equal finite differences."""

import pytest
import torch
from torch.func import grad, jacrev, jvp, linearize, vjp, vmap

import fdl
from fdl import losses, nn, random, tree
from fdl.transforms import gnvp, hessian, hutchinson_trace, hvp
from tests.support.asserts import close, draw

net = nn.sequential(nn.linear(2, 3), nn.tanh, nn.linear(3, 3))
params = tree.cast(net.init(random.key(0)), torch.float64)
v = tree.map(lambda p: draw(p.numel(), *p.shape), params)
x, y = draw(1, 4, 2), torch.tensor([0, 2, 1, 1])
SIZE = tree.size(params)


def predict(p):
    return net.apply(p, x)


def of_predictions(logits):
    return losses.cross_entropy(logits, y)


def f(p):
    return of_predictions(predict(p))


def ravel(p):
    return torch.cat([leaf.flatten() for leaf in tree.leaves(p)])


def unravel(w):
    parts = iter(w.split([leaf.numel() for leaf in tree.leaves(params)]))
    return tree.map(lambda leaf: next(parts).view(leaf.shape), params)


MATRIX = torch.autograd.functional.hessian(lambda w: f(unravel(w)), ravel(params))


def test_hvp_equals_finite_differences_of_the_gradient():
    eps = 1e-6
    up, down = (grad(f)(tree.map(lambda p, u, s=s: p + s * eps * u, params, v)) for s in (1, -1))
    expected = tree.map(lambda a, b: (a - b) / (2 * eps), up, down)
    close(hvp(f, params, v), expected, rtol=1e-6, atol=1e-8)
    assert ravel(expected).abs().min() > 1e-4


def test_hvp_equals_the_matrix_in_any_order_of_keys():
    close(ravel(hvp(f, params, v)), MATRIX @ ravel(v))
    turned = dict(reversed([(k, dict(reversed(part.items()))) for k, part in v.items()]))
    close(ravel(hvp(f, params, turned)), MATRIX @ ravel(v))


@pytest.mark.parametrize("chunk", [None, 1, 4, SIZE, 1000])
def test_hessian_blocks_are_those_of_the_matrix(chunk):
    blocks = hessian(f, chunk)(params)
    close(blocks, torch.func.hessian(f)(params))
    rows = [
        torch.cat([b.reshape(p.numel(), -1) for b in tree.leaves(row)], 1)
        for p, row in zip(
            tree.leaves(params), [r for part in blocks.values() for r in part.values()], strict=True
        )
    ]
    close(torch.cat(rows), MATRIX)


def test_gnvp_equals_the_matrix_product():
    j = torch.autograd.functional.jacobian(lambda w: predict(unravel(w)).flatten(), ravel(params))
    h = torch.autograd.functional.hessian(
        lambda z: of_predictions(z.view(4, 3)), predict(params).flatten()
    )
    matrix = j.T @ h @ j
    close(ravel(gnvp(predict, of_predictions, params, v)), matrix @ ravel(v))
    assert (matrix - MATRIX).abs().max() > 1e-2, "the Hessian would pass as well"
    assert torch.linalg.eigvalsh(matrix).min() > -1e-12


def test_gnvp_of_predictions_that_are_a_tree():
    both = lambda p: {"b": predict(p), "a": (p["0"]["weight"] ** 3,)}  # noqa: E731
    end = lambda z: of_predictions(z["b"]) + (z["a"][0] ** 2).sum()  # noqa: E731
    more = 2 * (3 * params["0"]["weight"] ** 2) ** 2 * v["0"]["weight"]
    got, plain = gnvp(both, end, params, v), gnvp(predict, of_predictions, params, v)
    close(got["0"]["weight"], plain["0"]["weight"] + more)
    close(got["2"], plain["2"])


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")  # torch's own
def test_many_products_at_one_point_by_linearize():
    predictions, push = linearize(predict, params)
    pull = vjp(predict, params)[1]

    def product(v):
        return pull(jvp(grad(of_predictions), (predictions,), (push(v),))[1])[0]

    close(product(v), gnvp(predict, of_predictions, params, v))


def test_the_trace_of_a_diagonal_matrix_is_exact():
    square = lambda p: sum((c * leaf**2).sum() for c, leaf in zip((1, 2, 3, 4), tree.leaves(p)))  # noqa: B905, E731
    exact = sum(2 * c * leaf.numel() for c, leaf in zip((1, 2, 3, 4), tree.leaves(params)))  # noqa: B905
    for seed in range(3):
        got = hutchinson_trace(lambda v: hvp(square, params, v), params, random.key(seed), 1)
        close(got, torch.tensor(float(exact)).double())


def test_the_trace_is_unbiased_with_the_variance_of_the_formula():
    def product(v):
        return unravel(MATRIX @ ravel(v))

    keys = random.split(random.key(0), 4000)
    found = vmap(lambda k: hutchinson_trace(product, params, k, 1))(keys)
    variance = 2 * (MATRIX**2).sum() - 2 * (MATRIX.diagonal() ** 2).sum()
    error = (variance / len(keys)).sqrt()
    assert (found.mean() - MATRIX.trace()).abs() < 4 * error
    close(found.var(), variance, rtol=0.1)


def test_samples_are_a_mean_whatever_the_chunks():
    key = random.key(5)
    product = lambda v: hvp(f, params, v)  # noqa: E731
    whole = hutchinson_trace(product, params, key, 6)
    for chunk in (1, 4, 6):
        close(hutchinson_trace(product, params, key, 6, chunk), whole)
    # The documented signs: sample s, leaf i of the sorted paths.
    values = []
    for s in range(6):
        of_sample = random.fold_in(key, s)
        z = {}
        for i, (path, p) in enumerate(sorted(tree.flatten_dict(params).items())):
            z[path] = random.bernoulli(random.fold_in(of_sample, i), 0.5, p.shape).double() * 2 - 1
        z = ravel(tree.map(lambda _, s: s, params, tree.unflatten_dict(z)))
        values.append(z @ MATRIX @ z)
    close(whole, torch.stack(values).mean())


def test_a_third_derivative_equals_finite_differences():
    def traces(p):
        whole = hessian(f, 5)(p)["0"]["bias"]["0"]["bias"].trace()
        product = lambda u: hvp(f, p, u)  # noqa: E731
        return whole + hutchinson_trace(product, p, random.key(2), 3, 2)

    eps = 1e-6
    up, down = (traces(tree.map(lambda p, u, s=s: p + s * eps * u, params, v)) for s in (1, -1))
    got = grad(traces)(params)
    along = (ravel(got) * ravel(v)).sum()
    close(along, (up - down) / (2 * eps), rtol=1e-6)


def test_torch_has_jacobians_of_trees_in_chunks():
    """This is why fdl has no Jacobians of its own."""
    got = jacrev(predict, chunk_size=5)(params)
    flat = torch.cat([leaf.flatten(2) for leaf in tree.leaves(got)], 2)
    close(flat, torch.autograd.functional.jacobian(lambda w: predict(unravel(w)), ravel(params)))


def test_compiled_by_inductor_equals_eager():
    def everything(params, v):
        return [hvp(f, params, v), gnvp(predict, of_predictions, params, v)]

    close(fdl.jit(everything)(params, v), everything(params, v))


@pytest.mark.slow
def test_compiled_with_loops_equals_eager(plain_backend, real_loops):
    def everything(params, v, key):
        return {
            "hessian": hessian(f, 5)(params),
            "trace": hutchinson_trace(lambda u: hvp(f, params, u), params, key, 4, 2),
        }

    key = random.key(1)
    close(fdl.jit(everything)(params, v, key), everything(params, v, key))


def test_a_convolution_has_hessian_products(plain_backend):
    model = nn.sequential(
        nn.conv2d(1, 2, 3), nn.max_pool2d(2), nn.sigmoid, nn.flatten(), nn.linear(8, 2)
    )
    start = tree.cast(model.init(random.key(0)), torch.float64)
    images, u = draw(2, 3, 1, 6, 6), tree.map(torch.ones_like, start)
    of_model = lambda p: losses.cross_entropy(model.apply(p, images), y[:3] % 2)  # noqa: E731
    eps = 1e-6
    up, down = (grad(of_model)(tree.map(lambda p, s=s: p + s * eps, start)) for s in (1, -1))
    expected = tree.map(lambda a, b: (a - b) / (2 * eps), up, down)
    close(hvp(of_model, start, u), expected, rtol=1e-5, atol=1e-8)
    close(fdl.jit(lambda p: hvp(of_model, p, u))(start), hvp(of_model, start, u))


def test_errors():
    wrong = {"0": v["0"], "2": {"weight": v["2"]["weight"][:1], "bais": v["2"]["bias"]}}
    for product in (hvp, lambda f, *args: gnvp(predict, of_predictions, *args)):
        with pytest.raises(ValueError, match=r"(?s)2\.bais: expected nothing.*2\.bias: expected"):
            product(f, params, wrong)
        with pytest.raises(ValueError, match=r"expected float64\[3\], got float32\[3\]"):
            product(f, params, tree.cast(v, torch.float32))
        with pytest.raises(ValueError, match="w: float"):
            product(f, {"w": 1.0}, {"w": 1.0})
    with pytest.raises(
        ValueError, match=r"hvp: f must return a scalar, a 0-d tensor, got \[4, 3\]"
    ):
        hvp(predict, params, v)
    with pytest.raises(ValueError, match=r"gnvp: loss must return a scalar.*got \[4, 3\]"):
        gnvp(predict, lambda z: z, params, v)
    with pytest.raises(ValueError, match=r"hessian: f must return a scalar.*got tuple"):
        hessian(lambda p: (f(p), {}))(params)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        hessian(f, 0)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        hutchinson_trace(lambda v: v, params, random.key(0), 0)
    with pytest.raises(ValueError, match="result of matvec: trees differ in"):
        hutchinson_trace(lambda v: v["0"], params, random.key(0), 1)
    with pytest.raises(ValueError, match=r"step: torch\.int64"):
        hutchinson_trace(lambda v: v, {"step": torch.tensor(1)}, random.key(0), 1)
