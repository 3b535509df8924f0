"""The examples of the README run as they stand there."""

import re
from pathlib import Path

import pytest

import fdl

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def code(text):
    """The blocks of Python, and the commands, whose comments are in the language of the text."""
    python = re.findall(r"^```python\n(?:.*\n)*?```", text, re.M)
    commands = [re.sub(r" +#.*", "", line) for line in re.findall(r"^    (.+)", text, re.M)]
    return python + [line for line in commands if line not in "".join(python)]


def test_the_chinese_one_has_the_same_code_pictures_and_links():
    chinese = (ROOT / "README.zh.md").read_text()
    assert code(README) == code(chinese) and len(code(README)) >= 10
    links = [sorted(re.findall(r"\]\(([^)]+)\)", text)) for text in (README, chinese)]
    assert set(links[0]) ^ set(links[1]) == {"README.md", "README.zh.md"}


@pytest.mark.slow
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
    assert not fdl.tree.diff(names["state"].params, fdl.io.load("mlp.safetensors"))

    exec(population, names)  # as it stands there, behind the first block
    mean_loss = names["metrics"]["loss"].sum().value
    assert mean_loss.shape == (3,) and mean_loss.isfinite().all()
    winner = fdl.population.member(names["states"], int(mean_loss.argmin()))
    assert not fdl.tree.diff(winner, names["winner"]) and winner.step == 235

    # A member is the model trained alone: the worst rate has not begun to amplify rounding.
    key = fdl.random.split(fdl.random.key(0), 3)[0]
    alone = fdl.TrainState.create(names["model"], names["opt"], key=key)
    opt_state = fdl.optim.with_hyperparams(alone.opt_state, lr=0.1)
    alone, metrics = names["epoch"](
        alone._replace(opt_state=opt_state), names["images"], names["indices"]
    )
    assert abs(metrics["loss"].sum().value - mean_loss[0]) < 1e-3
