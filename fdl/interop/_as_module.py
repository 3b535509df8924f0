"""Give a model to code that wants an `nn.Module`."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from fdl import tree
from fdl._checks import describe
from fdl.interop import _closures
from fdl.nn import Model, StatefulModel
from fdl.nn._model import check_model
from fdl.tree import Tree, flatten_dict, unflatten_dict
from fdl.tree._paths import as_dicts

KEYS = 2**32  # a key is two numbers below this


def as_module(model: Model | StatefulModel, params: Tree, buffers: Tree | None = None) -> nn.Module:
    """Make an `nn.Module` of a model, for torch's optimizers, exporters and trainers.

    Calling the module calls `model.apply` with its parameters and buffers, which are copies of
    those given, in memory of its own. Their names are the paths of the trees, so that
    `state_dict()` is `tree.flatten_dict(params)` and that of the buffers;
    `tree.unflatten_dict(dict(module.named_parameters()), like=params)` is the way back.

    - *Mode*: `module.train()` and `module.eval()` choose `train`. The mode of submodules, which
      only hold parameters, has no effect.
    - *Buffers* are written in place, as by torch's own modules.
    - *Randomness*: `module(x, key=key)` draws from the key. Without one, a module in training mode
      draws a key from torch's generator, as `nn.Dropout` does: `torch.manual_seed` repeats it.
    - *Copies*: `copy.deepcopy`, `pickle` and `torch.save` work for models of `fdl.nn` and for your
      own whose functions are, or are made by, functions at the top of a module; other lambdas are
      an error by name. A file of `state_dict()` does not depend on code.

    It is for one x, which may be a tree, and for the keywords of `apply`, such as `mask`.

    Args:
        model: the model.
        params: its parameters, on one device; each floating one gets `requires_grad`.
        buffers: its buffers; required for a `StatefulModel`.

    Raises:
        TypeError: `model` is not a model, or a leaf is not a tensor.
        ValueError: buffers are missing, or there are some but the model has none; a path is that of
            two tensors, or a name is one of the attributes of `nn.Module`.

    >>> from fdl import nn, random
    >>> net = nn.sequential(nn.linear(3, 2), nn.dropout(0.5))
    >>> module = as_module(net, net.init(random.key(0)))
    >>> list(module.state_dict()), module(torch.ones(4, 3)).shape
    (['0.weight', '0.bias'], torch.Size([4, 2]))
    >>> optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    """
    check_model("as_module", model)
    check_buffers("as_module", model, buffers)
    return ModelModule(model, params, {} if buffers is None else buffers)


def check_buffers(caller: str, model: Model | StatefulModel, buffers: Tree | None) -> None:
    """Raise unless there are buffers if and only if the model has some.

    >>> from fdl import nn
    >>> check_buffers("here", nn.linear(3, 2), None)
    """
    if isinstance(model, StatefulModel) == (buffers is not None):
        return
    kind = type(model).__name__
    raise ValueError(
        f"{caller}: buffers must be those of the model, which is a {kind}, got none"
        if buffers is None
        else f"{caller}: the model is a {kind}, which has no buffers; leave them out"
    )


class _Held:
    """A model as the attribute of a module: copies share it, and pickle stores its functions."""

    def __init__(self, model: Model | StatefulModel) -> None:
        self.model = model

    def __deepcopy__(self, memo: Any) -> _Held:
        return self

    def __reduce__(self) -> Any:
        return _held, (_closures.dumps(tuple(self.model)), type(self.model))


def _held(functions: bytes, kind: type) -> _Held:
    return _Held(kind(*_closures.loads(functions)))


class ModelModule(nn.Module):
    """The module that `as_module` makes."""

    def __init__(self, model: Model | StatefulModel, params: Tree, buffers: Tree) -> None:
        super().__init__()
        self._held = _Held(model)
        self._params: Tree = None  # so that no leaf can have one of these names
        self._buffers_of_model: Tree = None
        self._params = self._register("params", params)
        self._buffers_of_model = self._register("buffers", buffers)

    def _register(self, kind: str, values: Tree) -> Tree:
        """Register the leaves of a tree; return the tree of their paths."""
        leaves = flatten_dict(values)
        for path, leaf in leaves.items():
            if not isinstance(leaf, Tensor):
                raise TypeError(
                    f"as_module: {kind} must hold tensors, got {describe(leaf)} at {path!r}"
                )
            *parents, name = path.split(".")
            owner: nn.Module = self
            try:
                for parent in parents:
                    if parent not in owner._modules:
                        owner.add_module(parent, nn.Module())
                    owner = owner.get_submodule(parent)
                copy = leaf.detach().clone()
                if kind == "params":
                    differentiable = leaf.is_floating_point() or leaf.is_complex()
                    owner.register_parameter(name, nn.Parameter(copy, differentiable))
                else:
                    owner.register_buffer(name, copy)
            except KeyError as error:
                raise ValueError(
                    f"as_module: {kind} at {path!r} cannot be registered: {error.args[0]}; rename "
                    "the layer"
                ) from None
        return unflatten_dict({path: path for path in leaves}, like=as_dicts(values))

    def _values(self, paths: Tree) -> Tree:
        return tree.map(lambda path: operator.attrgetter(path)(self), paths)

    def forward(self, x: Any, *, key: Tensor | None = None, **options: Any) -> Any:
        """Call `model.apply`.

        Args:
            x: the input, a tensor or a tree of them.
            key: for what the model draws in training; if None, it is drawn from torch's generator.
            options: further keywords of `apply`.
        """
        model = self._held.model
        if key is None and self.training and getattr(model, "uses_key", True):
            tensors = (leaf for leaf in tree.leaves(x) if isinstance(leaf, Tensor))
            device = next((leaf.device for leaf in tensors), None)
            key = torch.randint(KEYS, (2,), device=device)
        options = {"train": self.training, "key": key, **options}
        params = self._values(self._params)
        if isinstance(model, Model):
            return model.apply(params, x, **options)
        buffers = self._values(self._buffers_of_model)
        # The derivative may need the old values, which are overwritten below.
        given = tree.map(Tensor.clone, buffers) if self.training else buffers
        y, new = model.apply(params, given, x, **options)
        with torch.no_grad():
            tree.map(lambda old, value: old if value is old else old.copy_(value), buffers, new)
        return y
