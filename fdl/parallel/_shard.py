"""Parameters in slices: `shard` and `gather` of `fdl.parallel`."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from fdl import _dtensor, tree
from fdl.parallel._group import Mesh, T, group_of


def shard(params: T, mesh: Mesh | None, rules: Mapping[str, int | None]) -> T:
    """Spread parameters over the processes of a mesh: each keeps a slice, as a `DTensor`.

    What an optimizer keeps for a parameter is spread with it, since it is made like it. The step of
    `train_step` gathers the parameters, sums the gradients so that each process receives its
    slice of the sum, and updates that slice. What is kept between steps takes 1/N of the memory
    (ZeRO), and as many bytes are sent as by an all-reduce of the gradients. The result is that of
    whole parameters, to rounding: rules say where memory is, and nothing else.

    `fdl.jit`, `fdl.scan` in its carry, `fdl.tree`, optimizers and a `Checkpointer` with a group
    take such leaves as they are. Models are applied to `gather(params)`: torch has no rules for
    most layers.

    Args:
        params: the same whole tree in every process (see `check_replicated`).
        mesh: the processes, a `DeviceMesh` of one dimension; None is this process alone, for
            which nothing changes.
        rules: a glob on dotted paths -> the dimension along which to cut what it matches, None for
            leaves that stay whole. The first that matches counts. Slices are as
            `torch.chunk` makes them, so the last processes may have less, or nothing.

    Raises:
        ValueError: a leaf that no rule matches, a rule that matches no leaf, a dimension that a
            leaf does not have (each path is listed).
        TypeError: a leaf is no plain tensor (likewise).

    Source: Rajbhandari et al., ZeRO, 2020, https://arxiv.org/abs/1910.02054

    Example::

        params = parallel.shard(model.init(key), mesh, {"*.weight": 0, "*": None})
        state = fdl.TrainState.create(model, opt, key=key, params=params)
        state, metrics = parallel.train_step(loss, opt, mesh)(state, own_part)

    >>> import torch
    >>> shard({"weight": torch.ones(4, 2)}, None, {"*": 1})["weight"].shape
    torch.Size([4, 2])
    """
    flat = tree.flatten_dict(params)
    dims = _dims(flat, rules)
    if group_of(mesh, "shard")[0] is None:
        return params
    from torch.distributed.tensor import Shard

    def cut(leaf: Tensor, dim: int) -> Any:
        part, how = _dtensor.to_local(_dtensor.distribute(leaf, mesh, [Shard(dim)]))
        return _dtensor.from_local(part.clone(), how)  # not a view of the whole

    cuts = {p: leaf if (d := dims[p]) is None else cut(leaf, d) for p, leaf in flat.items()}
    return tree.unflatten_dict(cuts, like=params)


def _dims(flat: Mapping[str, Any], rules: Mapping[str, int | None]) -> dict[str, int | None]:
    """Say along which dimension each leaf is to be cut."""
    wrong = [
        f"{path}: expected a plain tensor, got {type(leaf).__name__}"
        for path, leaf in flat.items()
        if type(leaf) is not Tensor
    ]
    if wrong:
        raise TypeError("parallel.shard:\n  " + "\n  ".join(wrong))
    found = {path: [g for g in rules if fnmatchcase(path, g)] for path in flat}
    lines = [
        f"{glob}: a rule that matches no leaf"
        for glob in rules
        if not any(glob in globs for globs in found.values())
    ]
    for path, globs in found.items():
        dim, ndim = rules[globs[0]] if globs else None, flat[path].ndim
        if not globs:
            lines.append(f"{path}: no rule matches it; add '*': None for what stays whole")
        elif dim is not None and not 0 <= dim < ndim:
            lines.append(f"{path}: has {ndim} dimensions, and {globs[0]!r} says to cut {dim}")
    if lines:
        raise ValueError("parallel.shard:\n  " + "\n  ".join(lines))
    return {path: rules[globs[0]] for path, globs in found.items()}


def gather(spread: T) -> T:
    """Make a tree whole in every process again: DTensors become plain tensors.

    Every process must call it. A tree without DTensors is returned as it is.

    Args:
        spread: what `shard` made, or anything with such leaves.

    Example::

        prediction = model.apply(parallel.gather(state.params), x)

    >>> import torch
    >>> gather({"weight": torch.ones(2)})
    {'weight': tensor([1., 1.])}
    """
    return _dtensor.gather(spread)
