"""Convert trees of tensors to and from NumPy and JAX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fdl._checks import describe, describe_value
from fdl.tree import Tree, flatten_dict, unflatten_dict
from fdl.tree._paths import as_dicts


def to_numpy(tree: Tree) -> Tree:
    """Convert every tensor to a NumPy array that shares its memory; GPU tensors are copied.

    The tensor owns the memory: a write to either is seen in both. bfloat16, which NumPy does not
    have, needs the package `ml_dtypes` (installed with JAX).

    Raises:
        TypeError: a leaf is not a tensor, or bfloat16 without `ml_dtypes` (with its path).
        ValueError: a leaf requires grad (with its path).

    >>> to_numpy({"w": torch.ones(2)})
    {'w': array([1., 1.], dtype=float32)}
    """
    return _each("to_numpy", tree, _to_numpy)


def _to_numpy(leaf: Any) -> Any:
    _check_tensor(leaf)
    leaf = leaf.cpu().resolve_conj().resolve_neg()
    if leaf.dtype != torch.bfloat16:
        return leaf.numpy()
    try:
        import ml_dtypes
    except ImportError:
        raise TypeError(
            "bfloat16 needs the package ml_dtypes; or cast it: tree.cast(tree, torch.float32)"
        ) from None
    return leaf.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)


def from_numpy(tree: Tree) -> Tree:
    """Convert every NumPy array to a CPU tensor that shares its memory.

    The array owns the memory: a write to either is seen in both. Arrays that torch cannot share are
    copied: read-only ones, negative strides, foreign byte orders, NumPy scalars.

    Raises:
        TypeError: a leaf is not an array, or has a dtype that torch does not have (with its path).

    >>> from_numpy({"w": np.ones(2)})
    {'w': tensor([1., 1.], dtype=torch.float64)}
    """
    return as_tensors("from_numpy", tree)


def as_tensors(caller: str, tree: Tree) -> Tree:
    """Convert the arrays of a tree for `from_numpy`, and for readers of files with arrays."""
    return _each(caller, tree, _from_numpy)


def _from_numpy(leaf: Any) -> Tensor:
    if not isinstance(leaf, np.ndarray | np.generic):
        raise TypeError(f"expected a NumPy array, got {_leaf(leaf)}")
    array = np.asarray(leaf)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    if array.dtype.name == "bfloat16":  # from ml_dtypes
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_jax(tree: Tree) -> Tree:
    """Convert every tensor to a JAX array on its device, through DLPack.

    The memory is shared if JAX supports it (aligned to 64 bytes and without gaps). Do not write to
    such a tensor afterwards, nor donate it to `fdl.jit`: JAX assumes that its arrays are constant.

    Keys of fdl are int64 `[2]`, those of JAX uint32:
    `jax.random.wrap_key_data(to_jax(key.to(torch.uint32)))`.

    Raises:
        TypeError: a leaf is not a tensor, or has 64 bits and JAX would make it 32 (with its path).
        ValueError: a leaf requires grad (with its path).
        ImportError: JAX is not installed.

    Example::

        arrays = fdl.interop.to_jax(params)
    """
    import jax

    def convert(leaf: Any) -> Any:
        _check_tensor(leaf)
        bits = 8 * leaf.dtype.itemsize // (2 if leaf.is_complex() else 1)
        if bits == 64 and not jax.config.read("jax_enable_x64"):
            raise TypeError(
                f"JAX would convert {leaf.dtype} to 32 bits; enable 64 bits "
                '(jax.config.update("jax_enable_x64", True)) or cast the leaf'
            )
        return jax.dlpack.from_dlpack(leaf.contiguous())

    return _each("to_jax", tree, convert)


def from_jax(tree: Tree) -> Tree:
    """Convert every JAX array to a tensor on its device that shares its memory, through DLPack.

    JAX owns the memory and assumes that it is constant: do not write to the tensors, nor donate
    them to `fdl.jit`; clone them first (`tree.map(torch.clone, …)`). JAX's typed Threefry keys, its
    default, become keys of fdl, int64 `[..., 2]`; its raw keys stay uint32.

    Raises:
        TypeError: a leaf is not a JAX array, or is a key of another generator (with its path).
        ImportError: JAX is not installed.

    Example::

        params = fdl.interop.from_jax(arrays)
    """
    import jax

    def convert(leaf: Any) -> Tensor:
        if not isinstance(leaf, jax.Array):
            raise TypeError(f"expected a JAX array, got {_leaf(leaf)}")
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            generator = str(jax.random.key_impl(leaf))
            if generator != "threefry2x32":
                raise TypeError(
                    f"expected a Threefry key, got one of the generator {generator!r}: use "
                    "jax.random.key(seed, impl='threefry2x32')"
                )
            return from_dlpack(jax.random.key_data(leaf)).long()
        return from_dlpack(leaf)

    return _each("from_jax", tree, convert)


def _leaf(leaf: Any) -> str:
    if isinstance(leaf, Mapping):  # a FrozenDict of Flax, a state of nnx
        hint = "make dicts of it first: flax.core.unfreeze, nnx.to_pure_dict"
        return f"{describe(leaf)}, a mapping that torch does not know; {hint}"
    return describe_value(leaf)


def _check_tensor(leaf: Any) -> None:
    if not isinstance(leaf, Tensor):
        raise TypeError(f"expected a tensor, got {_leaf(leaf)}")
    if leaf.requires_grad:
        raise ValueError("the tensor requires grad, which would be lost; detach it first")


def _each(caller: str, tree: Tree, f: Callable[[Any], Any]) -> Tree:
    """Map the leaves, and add their paths to errors."""
    converted = {}
    for path, leaf in flatten_dict(tree).items():
        try:
            converted[path] = f(leaf)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{caller}: at {path!r}: {error}") from error
    return unflatten_dict(converted, like=as_dicts(tree))
