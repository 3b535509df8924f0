"""The examples of the README run as they stand there."""

import re
from pathlib import Path

import pytest
import torch

import fdl

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_examples_run(monkeypatch, tmp_path):
    try:
        fdl.data.fashion_mnist(download=False)
    except FileNotFoundError as error:
        pytest.skip(f"needs the full Fashion-MNIST: {error}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FDL_JIT", "0")
    epoch, population = re.findall(r"```python\n(.*?)```", README, re.S)
    names: dict = {}
    exec(epoch, names)
    assert names["state"].step == 235
    assert names["metrics"]["loss"].count.sum() == 60_000
    assert names["metrics"]["loss"].sum().value < 0.8
    assert not fdl.tree.diff(names["state"].params, fdl.load("mlp.safetensors"))

    row = (leaf[0] for leaf in names["indices"])
    names["batch"] = fdl.data.gather(names["images"], tuple(row))
    exec(population, names)
    weight = names["states"].params["1"]["weight"]
    start = names["state"].params["1"]["weight"]
    moved = (weight - start).flatten(1).norm(dim=1)
    torch.testing.assert_close(moved / moved[0], torch.tensor([1.0, 3.0, 10.0]), rtol=0.05, atol=0)
