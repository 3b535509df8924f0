"""Checkpoints of Orbax, read as trees of tensors."""

import sys

import pytest
import torch

from fdl import interop
from tests.support.asserts import close, draw

TREE = {
    "params": {"Dense_0": {"kernel": draw(0, 3, 4).float(), "bias": draw(1, 4).bfloat16()}},
    "layers": [draw(2, 2).float(), torch.ones((), dtype=torch.int32)],
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of Orbax
def test_names_dtypes_and_values_are_kept(tmp_path):
    jax, ocp = pytest.importorskip("jax"), pytest.importorskip("orbax.checkpoint")
    saved = {**interop.to_jax(TREE), "step": 7, "key": jax.random.key(3)}
    with ocp.StandardCheckpointer() as writer:
        writer.save(tmp_path / "4" / "default", saved)
    found = interop.from_orbax(tmp_path / "4" / "default")
    expected = {**TREE, "step": torch.tensor(7), "key": torch.tensor([0, 3], dtype=torch.uint32)}
    close(found, dict(sorted(expected.items())), rtol=0, atol=0)
    assert interop.from_flax(found["params"])["Dense_0"]["weight"].shape == (4, 3)
    with pytest.raises(
        ValueError, match=r"not a checkpoint of a tree; inside it are \['default'\]"
    ):
        interop.from_orbax(tmp_path / "4")


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    pytest.importorskip("orbax.checkpoint")
    with pytest.raises(FileNotFoundError, match="from_orbax: no such folder"):
        interop.from_orbax(tmp_path / "none")
    with pytest.raises(ValueError, match=r"not a checkpoint of a tree$"):
        interop.from_orbax(tmp_path)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match="pip install orbax-checkpoint"):
        interop.from_orbax(tmp_path)
