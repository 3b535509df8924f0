"""Mixed precision: the dtypes in which a model stores, computes and returns.

There is no autocast: a model under a policy is a model like any other, whose `apply` casts.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fdl import tree
from fdl._checks import describe
from fdl.nn._capture import Record, inside
from fdl.nn._model import Model, StatefulModel, check_model
from fdl.tree import Tree

AnyModel = TypeVar("AnyModel", Model, StatefulModel)


class Policy(NamedTuple):
    """The floating dtypes of a model.

    >>> Policy(compute=torch.float16)
    Policy(param=torch.float32, compute=torch.float16, output=torch.float32)
    """

    param: torch.dtype = torch.float32  # what init returns: parameters, and so their gradients
    compute: torch.dtype = torch.bfloat16  # what apply computes in
    output: torch.dtype = torch.float32  # what apply returns


def with_policy(model: AnyModel, policy: Policy = Policy()) -> AnyModel:  # noqa: B008
    """Return a model that computes in another precision than it stores.

    `init` returns parameters in `policy.param`. `apply` casts them and floating inputs to
    `policy.compute`, and its result to `policy.output`; integers and bools are not cast. The cast
    is part of the function that is differentiated, so gradients have the dtype of the parameters,
    and the optimizer computes and keeps its state in `policy.param`: small updates are not lost.
    In float16, gradients may underflow before they reach the cast unless the loss is scaled
    (`optim.loss_scale`); bfloat16 has the range of float32.

    Buffers are stored in `policy.param` and not cast, since small changes to a running mean would
    round to nothing in 16 bits; a layer casts them where it uses them (`mean.to(x.dtype)`). New
    buffers have the dtypes of the old. A loss should be computed in 32 bits: for that, leave
    `output` at float32.

    Args:
        model: a `Model` or a `StatefulModel`; the result has the same type.
        policy: the dtypes.

    Raises:
        TypeError: `model` is not a model, or an entry of `policy` is not a floating dtype.

    Source: Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740

    >>> from fdl import nn, random
    >>> net = with_policy(nn.sequential(nn.linear(2, 1), lambda x: print(x.dtype) or x))
    >>> params = net.init(random.key(0))
    >>> params["0"]["weight"].dtype, net.apply(params, torch.ones(2)).dtype
    torch.bfloat16
    (torch.float32, torch.float32)
    """
    check_model("with_policy", model)
    if not isinstance(policy, Policy):
        raise TypeError(f"with_policy: policy must be an nn.Policy, got {describe(policy)}")
    for name, dtype in policy._asdict().items():
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"with_policy: {name} must be a floating torch.dtype, got {dtype!r}")

    keyword = inside(model)

    def init(key: Tensor) -> Tree:
        return tree.cast(model.init(key), policy.param)

    if isinstance(model, StatefulModel):

        def apply_stateful(
            params: Tree, buffers: Tree, x: Any, *, record: Record | None = None, **options: Any
        ) -> tuple[Any, Tree]:
            options |= keyword("", record)
            params, x = tree.cast((params, x), policy.compute)
            y, new = model.apply(params, buffers, x, **options)
            new = tree.map(lambda n, old: n.to(old.dtype), new, buffers)
            return tree.cast(y, policy.output), new

        return StatefulModel(init, apply_stateful, model.takes_mask)

    def apply(params: Tree, x: Any, *, record: Record | None = None, **options: Any) -> Any:
        options |= keyword("", record)
        params, x = tree.cast((params, x), policy.compute)
        return tree.cast(model.apply(params, x, **options), policy.output)

    return Model(init, apply, model.uses_key)
