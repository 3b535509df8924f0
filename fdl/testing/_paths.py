"""Give the leaves of a model the values of a module, matched by path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fdl import tree
from fdl._checks import describe
from fdl.testing._trees import listed
from fdl.tree import Tree
from fdl.tree._paths import join

KINDS = "parameter", "buffer"


def take_values(
    values: tuple[Tree, Tree], module: nn.Module, names: Mapping[str, str]
) -> tuple[Tree, Tree, dict[str, str]]:
    """Fill the leaves of a model with those of a module.

    Args:
        values: parameters and buffers of the model.
        module: in float64.
        names: paths of the model, or beginnings of them, to those in the module.

    Returns:
        Parameters and buffers with copies of the module's values, and its paths to the model's.

    Raises:
        AssertionError: a path or shape differs; each is listed.
        ValueError: `names` has a path that the model lacks.

    >>> import torch
    >>> net = nn.Linear(2, 1).double()
    >>> params = {"w": torch.zeros(1, 2), "bias": torch.zeros(1)}
    >>> take_values((params, {}), net, {"w": "weight"})[2]
    {'weight': 'w', 'bias': 'bias'}
    """
    ours = tuple(tree.flatten_dict(part) for part in values)
    theirs = dict(module.named_parameters()), dict(module.named_buffers())
    _check_names(names, [*ours[0], *ours[1]])
    paths = {_renamed(path, names): path for part in ours for path in part}
    lines = [line for i in (0, 1) for line in _mismatches(i, ours, theirs, paths, module)]
    if lines:
        raise AssertionError(
            f"check_equals_module: paths or shapes differ from those of {type(module).__name__}"
            + listed(lines + _suggestion(ours[0], theirs[0], paths))
        )
    flat = {paths[path]: x.detach().clone() for part in theirs for path, x in part.items()}
    params, buffers = (
        tree.unflatten_dict({path: flat[path] for path in part}, like=like)
        for part, like in zip(ours, values, strict=True)
    )
    return params, buffers, paths


def _renamed(path: str, names: Mapping[str, str]) -> str:
    """Return the path in the module for one of the model.

    >>> _renamed("hidden.weight", {"hidden": "layers.0"}), _renamed("output.bias", {})
    ('layers.0.weight', 'output.bias')
    """
    for ours, theirs in names.items():
        if path == ours or path.startswith(f"{ours}."):
            return join(theirs, path[len(ours) + 1 :])
    return path


def _check_names(names: Mapping[str, str], paths: list[str]) -> None:
    if not isinstance(names, Mapping):
        raise TypeError(
            "check_equals_module: names must be a dict from paths of the model to those of the "
            f"module, got {describe(names)}"
        )
    unknown = [name for name in names if all(_renamed(path, {name: ""}) == path for path in paths)]
    if unknown:
        raise ValueError(
            f"check_equals_module: names must have paths of the model, got {unknown}; the model "
            f"has {paths}"
        )


def _mismatches(
    i: int,
    ours: tuple[dict[str, Any], ...],
    theirs: tuple[dict[str, Any], ...],
    paths: dict[str, str],
    module: nn.Module,
) -> Iterator[str]:
    """Yield a line for each parameter (i = 0) or buffer (1) that differs in path or shape."""
    kind, other = KINDS[i], KINDS[1 - i]
    for path, leaf in theirs[i].items():
        if paths.get(path) not in ours[i]:
            hint = f"; there it is a {other}" if path in paths else ""
            yield f"{path}: the model lacks this {kind} {list(leaf.shape)} of the module{hint}"
    tied = dict(module.named_parameters(remove_duplicate=False))
    for path, name in paths.items():
        if name not in ours[i]:
            continue
        leaf, own = ours[i][name], theirs[i].get(path)
        if own is None and path not in theirs[1 - i]:
            first = next((p for p, x in theirs[0].items() if x is tied.get(path)), None)
            hint = f"; there it is {first!r}, which nn.tied shares" if first else ""
            yield f"{name}: the module has no {kind} {path!r}{hint}"
        elif own is not None and own.shape != leaf.shape:
            hint = "; it is stored transposed" if own.shape == leaf.shape[::-1] else ""
            yield f"{name}: expected {list(own.shape)}, got {list(leaf.shape)}{hint}"


def _suggestion(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], paths: Mapping[str, str]
) -> list[str]:
    """Suggest names if the parameters that remain have the same shapes in the same order."""
    wanted = {name: path for path, name in paths.items()}
    mine = [name for name in ours if wanted[name] not in theirs]
    others = [path for path in theirs if path not in paths]
    if not mine or [ours[p].shape for p in mine] != [theirs[p].shape for p in others]:
        return []
    return [f"in this order the shapes fit: names={dict(zip(mine, others, strict=True))}"]
