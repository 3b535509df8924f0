"""Gradients by torch.autograd.grad: equal to torch.func's, and where those cannot be taken."""

import pytest
import torch
from torch.func import grad, grad_and_value, jvp, vmap

import fdl
from fdl import losses, nn, optim, random, tree
from fdl.transforms import autograd_grad_and_value
from tests.support.asserts import close, draw, unchanged

CNN = nn.sequential(
    nn.conv2d(1, 2, 3), nn.batch_norm(2), nn.relu, nn.flatten(), nn.dropout(0.3), nn.linear(8, 3)
)
BATCH = draw(0, 6, 1, 4, 4).float(), torch.tensor([0, 1, 2, 0, 1, 2])
CLASSES = losses.cross_entropy


class Square(torch.autograd.Function):
    """Without `setup_context`, as the functions of gpytorch and torchdiffeq."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def old_style(params):
    return (Square.apply(params["w"]) * params["a"]).sum()


PARAMS = {"w": draw(1, 3), "a": draw(2, 3)}


def test_a_step_equals_that_of_torch_func_to_the_bit():
    opt = optim.adam(0.01)
    state = fdl.TrainState.create(CNN, opt, key=random.key(0))
    loss = fdl.supervised(CNN, CLASSES)
    with unchanged(state, BATCH):
        step = fdl.train_step(loss, opt, grad_fn=autograd_grad_and_value)
        got, expected = step(state, BATCH), fdl.train_step(loss, opt)(state, BATCH)
    assert tree.diff(got, expected) == []
    assert not any(leaf.requires_grad for leaf in tree.leaves(got))


@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize("grads_on", [False, True])
def test_results_have_the_form_of_torch_func(has_aux, grads_on):
    def f(params, scale, *, power):
        value = (params["used"] ** power).sum() * scale
        return (value, {"inner": params["used"] + 1}) if has_aux else value

    params = {"used": draw(3, 2), "unused": draw(4, 2)}
    with torch.set_grad_enabled(grads_on):
        got = autograd_grad_and_value(f, has_aux=has_aux)(params, 2.0, power=3)
    expected = grad_and_value(f, has_aux=has_aux)(params, 2.0, power=3)
    assert not got[0]["unused"].any()
    close(got[0], expected[0])
    close(got[1][0] if has_aux else got[1], expected[1][0] if has_aux else expected[1])
    if has_aux:
        close(got[1][1], {"inner": params["used"] + 1})
    assert not any(leaf.requires_grad for leaf in tree.leaves(got))


def test_a_constant_has_gradients_of_0():
    grads, value = autograd_grad_and_value(lambda params: torch.ones(()))(PARAMS)
    assert value == 1 and not any(leaf.any() for leaf in tree.leaves(grads))


def test_functions_without_setup_context_have_gradients():
    with pytest.raises(RuntimeError, match="setup_context"):
        grad_and_value(old_style)(PARAMS)
    expected = {"w": 2 * PARAMS["w"] * PARAMS["a"], "a": PARAMS["w"] ** 2}
    close(autograd_grad_and_value(old_style)(PARAMS)[0], expected)


def test_a_step_with_such_functions_is_jitted_and_scanned(plain_backend):
    model = nn.Model(lambda key: PARAMS, lambda params, x, *, train=False, key=None: x)
    opt = optim.sgd(0.1)

    def loss(params, batch, **_):
        return old_style(params) * batch, {}

    step = fdl.train_step(loss, opt, grad_fn=autograd_grad_and_value)
    state = fdl.TrainState.create(model, opt, key=random.key(0))
    batches = draw(5, 2)
    one, _ = step(state, batches[0])
    close(one.params["w"], PARAMS["w"] - 0.2 * batches[0] * PARAMS["w"] * PARAMS["a"])
    two, _ = step(one, batches[1])
    close(fdl.scan(step, state, batches)[0], two)
    jitted = fdl.jit(lambda state, batches: fdl.scan(step, state, batches)[0], strict=True)
    close(jitted(state, batches), two)


def f_of(w):
    return autograd_grad_and_value(lambda w: (w**3).sum())(w)[1]


@pytest.mark.parametrize(
    ("call", "within"),
    [
        (lambda w: vmap(f_of)(w), "vmap"),
        (lambda w: grad(f_of)(w), "grad"),
        (lambda w: jvp(f_of, (w,), (w,)), "jvp"),
        (lambda w: vmap(grad(f_of))(w), "grad, vmap"),
    ],
)
def test_a_transformation_is_refused_by_name(call, within):
    with pytest.raises(NotImplementedError, match=f"does not work inside {within}; use torch.func"):
        call(PARAMS["w"])


def test_torch_compile_is_refused(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(NotImplementedError, match=r"torch\.compile cannot .* use fdl\.jit"):
        f_of(PARAMS["w"])


def test_inference_mode_is_refused():
    """It records nothing, so that every gradient would be 0."""
    with torch.inference_mode(), pytest.raises(NotImplementedError, match="records no gradients"):
        f_of(PARAMS["w"])


@pytest.mark.parametrize(
    ("params", "text"),
    [
        (
            {"w": torch.ones(2), "n": torch.ones(2).long()},
            r"floating tensors; .*\n  n: torch.int64",
        ),
        ({"w": {"v": torch.ones(2, requires_grad=True)}}, r"require gradients, .*\n  w.v"),
    ],
)
def test_leaves_that_have_no_such_gradient_are_listed(params, text):
    with pytest.raises(ValueError, match=f"(?s)^autograd_grad_and_value: .*{text}$"):
        autograd_grad_and_value(lambda params: torch.ones(()))(params)


@pytest.mark.parametrize("value", [torch.ones(2), 3.0])
def test_what_is_no_scalar_is_refused(value):
    with pytest.raises(ValueError, match="f must return a scalar, a 0-d tensor, got "):
        autograd_grad_and_value(lambda params: value)(PARAMS)


def test_a_result_without_aux_is_refused():
    for result in (torch.ones(()), torch.ones(2)):
        with pytest.raises(TypeError, match=r"must return \(value, aux\), got a tensor"):
            autograd_grad_and_value(lambda params, y=result: y, has_aux=True)(PARAMS)
