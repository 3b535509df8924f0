"""What a case of the transformation laws is made of (tests/laws/test_public_functions.py)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from fdl import interop, nn, random, tree


class Case(NamedTuple):
    f: Callable[..., Any]  # of trees of tensors
    inputs: Callable[[Tensor], tuple[Any, ...]]  # key -> one example of them
    grads: tuple[int, ...] = (0,)  # the inputs it is differentiated by; () if it has no gradient


def draw(key: Tensor, *shape: int) -> Tensor:
    return random.normal(key, shape, torch.float64)


def elementwise(f: Callable[[Tensor], Tensor]) -> Case:
    return Case(f, lambda key: (draw(key, 2, 3),))


def layer(model: nn.Model, *shape: int) -> Case:
    return Case(
        lambda params, x: model.apply(params, x),
        lambda key: (tree.cast(model.init(key), torch.float64), draw(key, *shape)),
        grads=(0, 1),
    )


def layer_with_buffers(model: nn.StatefulModel, *shape: int) -> Case:
    """In training, with a key."""

    def inputs(key: Tensor) -> tuple[Any, ...]:
        params, buffers = tree.cast(model.init(key), torch.float64)
        params = tree.map(lambda p: p + 0.1 * draw(key, *p.shape), params)
        return params, buffers, draw(key, *shape), key

    return Case(
        lambda params, buffers, x, key: model.apply(params, buffers, x, train=True, key=key),
        inputs,
        grads=(0, 2),
    )


def as_module(model: nn.Model, *shape: int) -> Case:
    """The module of a model, with parameters that `functional_call` puts into it."""
    module = interop.as_module(model, model.init(random.key(0)))
    return Case(
        lambda params, x: functional_call(module, tree.flatten_dict(params), (x,)),
        layer(model, *shape).inputs,
        grads=(0, 1),
    )


def initializer(init: nn.init.Initializer, *, grads: tuple[int, ...] = ()) -> Case:
    return Case(lambda key: init(key, (3, 2), torch.float64), lambda key: (key,), grads)


def weights(key: Tensor) -> Any:
    one, two = random.split(key)
    return {"fc": {"weight": draw(one, 2, 3), "bias": draw(two, 2)}}


def predictions(key: Tensor) -> tuple[Tensor, ...]:
    one, two, three = random.split(key, 3)
    return draw(one, 4, 3), draw(two, 4, 3), random.uniform(three, (4,), dtype=torch.float64)


def labelled(key: Tensor) -> tuple[Tensor, ...]:
    one, two, three = random.split(key, 3)
    return draw(one, 4, 3), random.randint(two, (4,), 0, 3), random.bernoulli(three, 0.7, (4,))


def with_keys(f: Callable[..., Any], *shapes: tuple[int, ...]) -> Case:
    """A function of a key and of floating tensors of these shapes."""
    return Case(
        f,
        lambda key: (key, *(draw(random.fold_in(key, i), *s) for i, s in enumerate(shapes))),
        grads=tuple(range(1, len(shapes) + 1)),
    )


def labelled_rows(key: Tensor) -> tuple[Tensor, ...]:
    one, two, three = random.split(key, 3)
    return (
        random.randint(one, (6,), 0, 10),
        random.randint(two, (4,), 0, 6),
        random.bernoulli(three, 0.7, (4,)),
    )
