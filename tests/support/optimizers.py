"""What the tests of optimizers share: a problem, runs of both kinds, torch's own configurations."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.testing._internal.common_optimizers import optim_db

from fdl import optim, tree
from tests.support.asserts import close, draw

SHAPES = {"scalar": (), "vector": (3,), "nested.matrix": (2, 3), "nested.kernel": (2, 1, 2, 2)}
MATRICES = {"tall": (4, 3), "nested.wide": (2, 5), "nested.square": (3, 3)}
STEPS = 100


@contextmanager
def default_dtype(dtype):
    """Torch keeps step counts and the like in the default dtype, which would round them."""
    old = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(old)


class Case(NamedTuple):
    """One configuration of one optimizer of torch."""

    name: str  # ours
    torch_class: type[torch.optim.Optimizer]
    options: dict[str, Any]

    @property
    def id(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.name}({options})"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return MATRICES if self.name == "muon" else SHAPES

    def ours(self) -> optim.Optimizer:
        return getattr(optim, self.name)(**self.options)

    def theirs(self, leaves: Any) -> torch.optim.Optimizer:
        return self.torch_class(leaves, **self.options)


def _cases() -> list[Case]:
    """Every dense configuration that torch tests, those for GPUs included."""
    found = {}
    for info in optim_db:
        if info.optim_cls in (torch.optim.SparseAdam, torch.optim.LBFGS):
            continue  # no dense gradients; a closure (tests/optim/test_lbfgs.py)
        for device in ("cpu", "cuda"):
            for config in info.optim_inputs_func(device):
                options = {n: v for n, v in config.kwargs.items() if n != "capturable"}
                # On the CPU torch wants both betas as numbers or both as tensors, of one element.
                if isinstance(options.get("betas", (0.0,))[0], torch.Tensor):
                    options["betas"] = tuple(b.reshape(()) for b in options["betas"])
                case = Case(info.optim_cls.__name__.lower(), info.optim_cls, options)
                found[case.id] = case
    return list(found.values())


with default_dtype(torch.float64):  # a rate that is a float32 tensor makes torch round to float32
    CASES = _cases()


def start(dtype=torch.float64, shapes=None):
    shapes = shapes or SHAPES
    drawn = {path: draw(i, *shape) for i, (path, shape) in enumerate(shapes.items())}
    return tree.cast(tree.unflatten_dict(drawn), dtype)


def _noise(shapes):
    return {path: draw(i + 10, STEPS, *shape) for i, (path, shape) in enumerate(shapes.items())}


_NOISE = _noise(SHAPES) | _noise(MATRICES)


def grads_at(params, step):
    """Bounded and not linear, so that no long run overflows and no term can hide another."""
    flat = {
        path: p.detach().sin() + _NOISE[path][step].to(p.dtype)
        for path, p in tree.flatten_dict(params).items()
    }
    return tree.unflatten_dict(flat)


def never(path, step):
    return False


def run(opt, params, steps=50, absent=never, state=None, first=0):
    """Let a pure optimizer make steps; `absent` says which gradients are None."""
    state = opt.init(params) if state is None else state
    for step in range(first, first + steps):
        flat = tree.flatten_dict(grads_at(params, step))
        grads = {path: None if absent(path, step) else g for path, g in flat.items()}
        updates, state = opt.update(tree.unflatten_dict(grads), state, params)
        params = optim.apply_updates(params, updates)
    return params, state


def run_torch(make, params, steps=50, absent=never, scheduler=None):
    """Let a torch optimizer, made of the leaves by path, do the same."""
    leaves = {p: x.clone().requires_grad_() for p, x in tree.flatten_dict(params).items()}
    optimizer = make(leaves)
    continue_torch(optimizer, leaves, steps, absent, scheduler(optimizer) if scheduler else None)
    return leaves, optimizer


def continue_torch(optimizer, leaves, steps, absent=never, schedule=None, first=0):
    for step in range(first, first + steps):
        grads = tree.flatten_dict(grads_at(tree.unflatten_dict(leaves), step))
        for path, leaf in leaves.items():
            leaf.grad = None if absent(path, step) else grads[path]
        optimizer.step()
        if schedule:
            schedule.step()


def agree(params, leaves, rtol=1e-10):
    """Compare how far the leaves went, since the start would hide small steps; all must move."""
    began = tree.flatten_dict(start(shapes={p: tuple(x.shape) for p, x in leaves.items()}))
    for path, p in tree.flatten_dict(params).items():
        moved = leaves[path].detach() - began[path]
        assert moved.abs().max() > 1e-5, f"{path} did not move"
        close(p - began[path], moved, rtol=rtol)


# One constructor of each optimizer for laws that need no torch: (lr, weight decay) -> Optimizer.
# A large epsilon, where there is one, so that finite differences are accurate.
Make = Callable[..., optim.Optimizer]
ALL: dict[str, Make] = {
    "adadelta": lambda lr, wd: optim.adadelta(lr, eps=0.1, weight_decay=wd),
    "adafactor": lambda lr, wd: optim.adafactor(lr, weight_decay=wd),
    "adagrad": lambda lr, wd: optim.adagrad(lr, 0.1, wd, 0.1),
    "adam": lambda lr, wd: optim.adam(lr, eps=1e-2, weight_decay=wd, amsgrad=True),
    "adamax": lambda lr, wd: optim.adamax(lr, weight_decay=wd),
    "adamw": lambda lr, wd: optim.adamw(lr, eps=1e-2, weight_decay=wd),
    "asgd": lambda lr, wd: optim.asgd(lr, 0.1, t0=2, weight_decay=wd),
    "muon": lambda lr, wd: optim.muon(lr, wd),
    "nadam": lambda lr, wd: optim.nadam(lr, eps=1e-2, weight_decay=wd),
    "radam": lambda lr, wd: optim.radam(lr, (0.9, 0.99), 1e-2, weight_decay=wd),
    "rmsprop": lambda lr, wd: optim.rmsprop(lr, 0.9, 0.1, wd, 0.5, True),
    "rprop": lambda lr, wd: optim.rprop(lr),
    "sgd": lambda lr, wd: optim.sgd(lr, 0.9, 0.1, wd),
}
