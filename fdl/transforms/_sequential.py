"""`sequential_vmap`: `vmap` as a loop."""

from __future__ import annotations

from collections.abc import Callable

from fdl import tree
from fdl._compiler._map import map
from fdl.tree import Tree
from fdl.tree._checks import check_tensors


def sequential_vmap(
    f: Callable[..., Tree], in_dims: tuple[int | None, ...] | int = 0
) -> Callable[..., Tree]:
    """Make `torch.vmap(f, in_dims)` that computes one row after another, by `fdl.map`.

    Under `fdl.jit` this is one program too. Peak memory is that of one row, and convolutions stay
    ungrouped; under `vmap` they become grouped, which is about twice as slow on a CPU. Nothing is
    lost where one row already keeps the device busy: for a population of LeNets on a CPU, say.

    Args:
        f: a pure function of trees of tensors.
        in_dims: for each argument 0 if it is mapped over its first axis, or None if all rows share
            it. 0 for all arguments.

    Returns:
        A function of the same arguments; every leaf of its result has the first axis `[rows]`.

    Raises:
        TypeError: `in_dims` is neither an int nor a tuple; at call, a mapped leaf is not a tensor.
        ValueError: `in_dims` has an axis other than 0 and None, or no 0; at call, the number of
            arguments differs from that of `in_dims`, or mapped leaves have no common first axis.

    >>> import torch
    >>> sequential_vmap(torch.dot, (0, None))(torch.eye(2), torch.tensor([3.0, 4.0]))
    tensor([3., 4.])
    """
    if not isinstance(in_dims, (tuple, int)):
        raise TypeError(f"sequential_vmap: in_dims must be 0 or a tuple, got {in_dims!r}")
    if isinstance(in_dims, tuple) and (0 not in in_dims or not {0, None}.issuperset(in_dims)):
        raise ValueError(
            f"sequential_vmap: in_dims must be 0 or None for each argument, and 0 for at least one,"
            f" got {in_dims}"
        )
    if isinstance(in_dims, int) and in_dims != 0:
        raise ValueError(f"sequential_vmap: in_dims must be 0 or a tuple, got {in_dims}")

    def call(*args: Tree) -> Tree:
        dims = in_dims if isinstance(in_dims, tuple) else (0,) * len(args)
        if len(dims) != len(args):
            raise ValueError(
                f"sequential_vmap: in_dims has {len(dims)} entries for {len(args)} arguments"
            )
        mapped = {str(i): arg for i, arg in enumerate(args) if dims[i] == 0}
        _check_mapped(mapped)

        def one(row: list[Tree]) -> Tree:
            rest = iter(row)
            return f(
                *(arg if dim is None else next(rest) for arg, dim in zip(args, dims, strict=True))
            )

        return map(one, list(mapped.values()))

    return call


def _check_mapped(mapped: dict[str, Tree]) -> None:
    """Raise unless the mapped arguments are tensors with one common first axis."""
    check_tensors(tree.leaves(mapped), mapped, "sequential_vmap: every mapped leaf")
    shapes = {f"args.{path}": list(x.shape) for path, x in tree.flatten_dict(mapped).items()}
    lengths = {shape[0] if shape else None for shape in shapes.values()}
    if len(lengths) != 1 or None in lengths:
        raise ValueError(
            f"sequential_vmap: mapped arguments need one common first axis, got {shapes}; in_dims "
            "says which arguments are mapped (0) and which are shared by all rows (None)"
        )
