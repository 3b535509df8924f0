"""Mixed precision: what a model stores, computes and returns in, said once.

There is no autocast: a model under a policy is a model like any other, whose `apply` casts.
"""

from __future__ import annotations

from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fdl import tree
from fdl.nn._model import Model, StatefulModel
from fdl.tree import Tree

AnyModel = TypeVar("AnyModel", Model, StatefulModel)


class Policy(NamedTuple):
    """The floating dtypes of a model.

    >>> Policy(compute=torch.float16)
    Policy(param=torch.float32, compute=torch.float16, output=torch.float32)
    """

    param: torch.dtype = torch.float32  # what init gives: parameters, so also their gradients
    compute: torch.dtype = torch.bfloat16  # what apply computes in
    output: torch.dtype = torch.float32  # what apply returns


def with_policy(model: AnyModel, policy: Policy = Policy()) -> AnyModel:  # noqa: B008
    """Make of a model one that computes in another precision than it stores.

    `init` gives parameters in `policy.param`. `apply` casts them and floating inputs to
    `policy.compute`, and its result to `policy.output`; integers and bools stay as they are.
    Since the cast is part of the function that is differentiated, gradients come in the dtype of
    the parameters, and so the optimizer works, and keeps its state, in `policy.param`: small
    updates are not lost. float16 gradients underflow on their way there unless the loss is scaled:
    `optim.loss_scale`; bfloat16 has the range of float32.

    Buffers are stored in `policy.param` and not cast, since running means of 8 bits stand still; a
    model casts them where it uses them (`mean.to(x.dtype)`). They come out in the dtype that they
    went in with. A loss should be computed in 32 bits: leave `output` at float32 for that.
    Source: Micikevicius et al., 2018.

    Args:
        model: a `Model` or a `StatefulModel`; the result is the same.
        policy: the dtypes.

    Raises:
        TypeError: `model` is neither, or the policy has something that is not a floating dtype.

    >>> from fdl import nn, random
    >>> net = with_policy(nn.sequential(nn.linear(2, 1), lambda x: print(x.dtype) or x))
    >>> params = net.init(random.key(0))
    >>> params["0"]["weight"].dtype, net.apply(params, torch.ones(2)).dtype
    torch.bfloat16
    (torch.float32, torch.float32)
    """
    if not isinstance(model, (Model, StatefulModel)):
        raise TypeError(f"with_policy: model must be a Model or a StatefulModel, got {model!r}")
    for name, dtype in policy._asdict().items():
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"with_policy: {name} must be a floating torch.dtype, got {dtype!r}")

    def init(key: Tensor) -> Tree:
        return tree.cast(model.init(key), policy.param)

    if isinstance(model, StatefulModel):

        @wraps(model.apply)  # which shows whether it takes a mask
        def apply_stateful(
            params: Tree, buffers: Tree, x: Tensor, **options: Any
        ) -> tuple[Tensor, Tree]:
            low, inputs = tree.cast(params, policy.compute), tree.cast(x, policy.compute)
            y, new = model.apply(low, buffers, inputs, **options)
            new = tree.map(lambda n, old: n.to(old.dtype), new, buffers)
            return tree.cast(y, policy.output), new

        return StatefulModel(init, apply_stateful)

    def apply(params: Tree, x: Tensor, *, train: bool = False, key: Tensor | None = None) -> Tensor:
        low, inputs = tree.cast(params, policy.compute), tree.cast(x, policy.compute)
        return tree.cast(model.apply(low, inputs, train=train, key=key), policy.output)

    return Model(init, apply, model.draws)
