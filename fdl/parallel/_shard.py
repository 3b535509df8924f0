"""`shard` parameters over processes, and `gather` them."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from fdl import _dtensor, tree
from fdl._checks import check_dict
from fdl.parallel._group import Mesh, T, group_of


def shard(params: T, mesh: Mesh | None, rules: Mapping[str, int | None]) -> T:
    """Shard parameters over the processes of a mesh: each keeps a slice, as a `DTensor`.

    The optimizer's state of a parameter is sharded like the parameter. A step of `train_step`
    gathers the parameters, sums the gradients so that each process receives its slice of the sum,
    and updates that slice. Between steps the state takes 1/N of the memory (ZeRO), and a step sends
    as many bytes as an all-reduce of the gradients. Results equal those of unsharded parameters, up
    to rounding: the rules only decide where memory is.

    `fdl.jit`, the carry of `fdl.scan`, `fdl.tree`, optimizers and a `Checkpointer` with a group
    accept sharded leaves. Apply models to `gather(params)`: torch has no sharding rules for most
    layers.

    Args:
        params: the same full tree in every process (see `check_replicated`).
        mesh: the processes, a `DeviceMesh` of one dimension; None for this process alone, where
            nothing changes.
        rules: from globs on dotted paths to the dimension to shard, or None to replicate. The first
            glob that matches applies. Slices are those of `torch.chunk`: those of the last
            processes may be smaller, or empty.

    Raises:
        ValueError: no rule matches a leaf, a rule matches no leaf, or a leaf lacks the dimension
            (each path is listed).
        TypeError: a leaf is not a plain tensor (each path is listed).

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
        return _dtensor.from_local(part.clone(), how)  # a copy: a view would keep the full tensor

    cuts = {p: leaf if (d := dims[p]) is None else cut(leaf, d) for p, leaf in flat.items()}
    return tree.unflatten_dict(cuts, like=params)


def _dims(flat: Mapping[str, Any], rules: Mapping[str, int | None]) -> dict[str, int | None]:
    """Return the dimension along which to shard each leaf."""
    lines = [
        f"{path}: expected a plain tensor, got {type(leaf).__name__}"
        for path, leaf in flat.items()
        if type(leaf) is not Tensor
    ]
    if lines:
        raise TypeError("parallel.shard:\n  " + "\n  ".join(lines))
    check_dict("shard", "rules", rules, "a dict from globs to dimensions")
    matches = {path: [g for g in rules if fnmatchcase(path, g)] for path in flat}
    lines = [
        f"{glob}: this rule matches no leaf"
        for glob in rules
        if not any(glob in globs for globs in matches.values())
    ]
    for path, globs in matches.items():
        dim, ndim = rules[globs[0]] if globs else None, flat[path].ndim
        if not globs:
            lines.append(f"{path}: no rule matches; add '*': None to replicate the rest")
        elif dim is not None and not 0 <= dim < ndim:
            lines.append(f"{path}: has {ndim} dimensions, but {globs[0]!r} shards dimension {dim}")
    if lines:
        raise ValueError("parallel.shard:\n  " + "\n  ".join(lines))
    return {path: rules[globs[0]] for path, globs in matches.items()}


def gather(sharded: T) -> T:
    """Replace every DTensor of a tree by the full tensor, in every process.

    Every process must call it. A tree without DTensors is returned unchanged.

    Args:
        sharded: the result of `shard`, or any tree with such leaves.

    Example::

        prediction = model.apply(parallel.gather(state.params), x)

    >>> import torch
    >>> gather({"weight": torch.ones(2)})
    {'weight': tensor([1., 1.])}
    """
    return _dtensor.gather(sharded)
