"""The examples of the README run as they stand there."""

import re
from pathlib import Path

import pytest

import fdl

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_chinese_one_has_the_same_code_pictures_and_links():
    code = re.compile(r"^```python\n(?:.*\n)*?```|^(?:    .*\n)+", re.M)
    chinese = (ROOT / "README.zh.md").read_text()
    assert code.findall(README) == code.findall(chinese) and len(code.findall(README)) >= 5
    links = [sorted(re.findall(r"\]\(([^)]+)\)", text)) for text in (README, chinese)]
    assert set(links[0]) ^ set(links[1]) == {"README.md", "README.zh.md"}


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
    for i, lr in enumerate((0.1, 0.3, 1.0)):
        key = fdl.random.split(fdl.random.key(0), 3)[i]
        state = fdl.TrainState.create(names["model"], names["opt"], key=key)
        opt_state = fdl.optim.with_hyperparams(state.opt_state, lr=lr)
        alone, _ = names["step"](state._replace(opt_state=opt_state), names["batch"])
        member = fdl.population.member(names["states"], i)
        assert fdl.tree.allclose(alone.params, member.params, rtol=1e-4, atol=1e-6)
    assert names["winner"].params["1"]["weight"].shape == (256, 784)
