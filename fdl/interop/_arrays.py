"""Trees of tensors to and from NumPy and JAX; `fdl.interop` is where to import them from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fdl.tree import Tree, flatten_dict, unflatten_dict


def to_numpy(tree: Tree) -> Tree:
    """Turn every tensor into a NumPy array that shares its memory; from a GPU it is copied.

    The tensor owns the memory: a write to either is seen in both. bfloat16, which NumPy lacks,
    needs the package `ml_dtypes` (JAX brings it).

    Raises:
        TypeError: a leaf that is no tensor, or bfloat16 without `ml_dtypes` (with its path).
        ValueError: a leaf that requires grad (with its path).

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
    """Turn every NumPy array into a tensor that shares its memory, on the CPU.

    The array owns the memory: a write to either is seen in both. What torch cannot share is copied:
    read-only arrays, negative strides, foreign byte orders, NumPy scalars.

    Raises:
        TypeError: a leaf that is no array, or of a dtype torch lacks (with its path).

    >>> from_numpy({"w": np.ones(2)})
    {'w': tensor([1., 1.], dtype=torch.float64)}
    """
    return _each("from_numpy", tree, _from_numpy)


def _from_numpy(leaf: Any) -> Tensor:
    if not isinstance(leaf, np.ndarray | np.generic):
        raise TypeError(f"expected a NumPy array, got {type(leaf).__name__} {leaf!r}")
    array = np.asarray(leaf)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    if array.dtype.name == "bfloat16":  # of ml_dtypes
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_jax(tree: Tree) -> Tree:
    """Turn every tensor into a JAX array on its device, through DLPack.

    The memory is shared where JAX can (aligned to 64 bytes and without gaps); the tensor then must
    not be written to any more, nor donated to `fdl.jit`: JAX takes its arrays for constant.

    A key of ours is int64 `[2]`, JAX's are uint32:
    `jax.random.wrap_key_data(to_jax(key.to(torch.uint32)))`.

    Raises:
        TypeError: a leaf that is no tensor, or of 64 bits where JAX would make it 32 (with its
            path).
        ValueError: a leaf that requires grad (with its path).
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
                f"JAX would make 32 bits of {leaf.dtype}: turn on its 64 bits "
                '(jax.config.update("jax_enable_x64", True)) or cast the leaf'
            )
        return jax.dlpack.from_dlpack(leaf.contiguous())

    return _each("to_jax", tree, convert)


def from_jax(tree: Tree) -> Tree:
    """Turn every JAX array into a tensor on its device that shares its memory, through DLPack.

    JAX owns the memory and takes it for constant: do not write to the tensors, nor donate them to
    `fdl.jit`; clone them first (`tree.map(torch.clone, …)`). JAX's typed keys of Threefry, its
    default, become ours, int64 `[..., 2]`; its raw ones are plain uint32.

    Raises:
        TypeError: a leaf that is no JAX array, or a key of another generator (with its path).
        ImportError: JAX is not installed.

    Example::

        params = fdl.interop.from_jax(arrays)
    """
    import jax
    from torch.utils.dlpack import from_dlpack

    def convert(leaf: Any) -> Tensor:
        if not isinstance(leaf, jax.Array):
            raise TypeError(f"expected a JAX array, got {type(leaf).__name__} {leaf!r}")
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            generator = str(jax.random.key_impl(leaf))
            if generator != "threefry2x32":
                raise TypeError(
                    f"a key of the generator {generator!r}; only Threefry's can be ours: "
                    "jax.random.key(seed, impl='threefry2x32')"
                )
            return from_dlpack(jax.random.key_data(leaf)).long()
        return from_dlpack(leaf)

    return _each("from_jax", tree, convert)


def _check_tensor(leaf: Any) -> None:
    if not isinstance(leaf, Tensor):
        raise TypeError(f"expected a tensor, got {type(leaf).__name__} {leaf!r}")
    if leaf.requires_grad:
        raise ValueError("the tensor requires grad, which would be lost; detach it")


def _each(caller: str, tree: Tree, f: Callable[[Any], Any]) -> Tree:
    """Map the leaves; errors get the path."""
    found = {}
    for path, leaf in flatten_dict(tree).items():
        try:
            found[path] = f(leaf)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{caller}: at {path!r}: {error}") from error
    return unflatten_dict(found, like=tree)
