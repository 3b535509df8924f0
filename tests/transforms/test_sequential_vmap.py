"""`sequential_vmap` equals `torch.vmap`, and raises for wrong arguments."""

import pytest
import torch
from torch.func import grad, vmap

from fdl import jit, tree
from fdl.transforms import sequential_vmap

W = {"w": torch.randn(5, 3, 2, dtype=torch.float64), "b": torch.randn(5, 2, dtype=torch.float64)}
X = torch.randn(5, 4, 3, dtype=torch.float64)


def f(params, x):
    return {"y": (x @ params["w"] + params["b"]).sin(), "x": x}


CASES = {
    "all mapped": (0, (W, X)),
    "a tuple": ((0, 0), (W, X)),
    "shared x": ((0, None), (W, X[0])),
    "shared params": ((None, 0), (tree.map(lambda leaf: leaf[0], W), X)),
}
each_case = pytest.mark.parametrize("in_dims, args", CASES.values(), ids=CASES)


@pytest.mark.slow
@each_case
@pytest.mark.parametrize("run", [lambda f: f, jit], ids=["eager", "jit"])
def test_equals_vmap(in_dims, args, run, plain_backend):
    got = run(sequential_vmap(f, in_dims))(*args)
    assert tree.diff(vmap(f, in_dims)(*args), got, rtol=1e-12, atol=1e-14) == []


@each_case
def test_its_derivative_equals_that_of_vmap(in_dims, args):
    def total(transformation):
        return lambda *args: (transformation(f, in_dims)(*args)["y"] ** 2).sum()

    got, expected = (grad(total(t), (0, 1))(*args) for t in (sequential_vmap, vmap))
    assert tree.diff(expected, got, rtol=1e-12, atol=1e-14) == []


def test_rows_are_computed_one_after_another():
    shapes = []
    sequential_vmap(lambda x: (shapes.append(x.shape), x)[1])(X)
    assert shapes == [X[0].shape] * len(X)


def test_wrong_in_dims():
    for dims in (1, (None, None), (0, 1)):
        with pytest.raises(ValueError, match="sequential_vmap: in_dims must be 0 or"):
            sequential_vmap(torch.add, dims)
    with pytest.raises(TypeError, match=r"in_dims must be 0 or a tuple, got \[0, None\]"):
        sequential_vmap(torch.add, [0, None])
    with pytest.raises(ValueError, match="in_dims has 2 entries for 1 arguments"):
        sequential_vmap(torch.add, (0, None))(torch.zeros(3))


def test_wrong_arguments():
    state, batch = {"w": torch.zeros(3, 2)}, torch.zeros(5)
    for f, args, text in [
        (torch.add, (torch.tensor(1.0), batch), r"got \{'args.0': \[\], 'args.1': \[5\]\}"),
        (lambda s, b: s, (state, batch), r"'args.0.w': \[3, 2\], 'args.1': \[5\].*in_dims says"),
        (lambda: (), (), r"got \{\}"),
        (lambda s: s, ({},), r"got \{\}"),
    ]:
        with pytest.raises(ValueError, match=rf"sequential_vmap: mapped arguments.*{text}"):
            sequential_vmap(f)(*args)
    with pytest.raises(TypeError, match=r"(?s)sequential_vmap: every mapped leaf.*0.lr: 0.1"):
        sequential_vmap(lambda s: s)({"lr": 0.1})
