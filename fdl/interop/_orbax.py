"""Read a checkpoint of Orbax."""

from __future__ import annotations

import os

import numpy as np

from fdl._files import expanded
from fdl.interop._arrays import as_tensors
from fdl.tree import Tree


def from_orbax(path: str | os.PathLike[str]) -> Tree:
    """Read a checkpoint of Orbax, such as the variables of a Flax model, as tensors on the CPU.

    Names, shapes and dtypes are those of the checkpoint, whatever devices it was written from;
    `from_flax` converts the layers. As Orbax reads them without a target, tuples and NamedTuples
    are lists and dicts. Python numbers are tensors `[]`, and random keys their words, uint32:
    `.long()` makes keys of fdl of them.

    Args:
        path: folder of the checkpoint; of a `CheckpointManager` that of an item, `STEP/default`.

    Raises:
        ImportError: orbax-checkpoint is not installed.
        FileNotFoundError: there is no such folder.
        ValueError: it is no checkpoint of a tree.
        TypeError: a leaf has a dtype that torch does not have (with its path).

    Example::

        variables = from_orbax("run/100/default")
        params, buffers = from_flax(variables, like=model.init(random.key(0)))
    """
    try:
        import jax
        import orbax.checkpoint as ocp
    except ImportError:
        raise ImportError(
            "from_orbax: checkpoints are read by Orbax: pip install orbax-checkpoint"
        ) from None
    folder = expanded(path, "from_orbax").absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"from_orbax: no such folder: {folder}")
    if not (folder / "_METADATA").is_file():
        inside = sorted(str(file.parent.relative_to(folder)) for file in folder.glob("*/_METADATA"))
        raise ValueError(
            f"from_orbax: {folder} is not a checkpoint of a tree"
            + (f"; inside it are {inside}" if inside else "")
        )
    reader = ocp.PyTreeCheckpointHandler()
    try:
        like = reader.metadata(folder).tree
        arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
        restored = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=arrays))
    finally:
        reader.close()
    return as_tensors("from_orbax", restored)
