"""A process that jits functions, and prints as JSON what it got: `python -m … CASE [CASE …]`."""

import hashlib
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fdl
from fdl import random, tree
from tests.support.programs import load, rows

PROGRAMS = [
    "attention",
    "bits",
    "char_gru",
    "convolutions",
    "diffusion",
    "early_stop",
    "gaussian_process",
    "indexing_writes",
    "kalman",
    "module_batch_norm",
    "variational_autoencoder",
    "video",
]
Case = Callable[[list[Any]], Any]  # adds to a list what it jitted, and returns a result


def bits(result: Any) -> str:
    """A digest of the structure and every bit of a result."""
    text = hashlib.sha256()
    for path, leaf in tree.flatten_dict([result]).items():
        text.update(f"{path} {leaf.dtype} {list(leaf.shape)} {leaf.stride()}".encode())
        text.update(leaf.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return text.hexdigest()


def program(name: str, jitted: list[Any]) -> Any:
    """Every other program as steps with donation, and the others as a scan."""
    this = load(name)
    if PROGRAMS.index(name) % 2:
        jitted.append(fdl.jit(lambda state, xs: fdl.scan(this.step, state, xs)))
        return jitted[-1](this.init(), this.xs())
    jitted.append(fdl.jit(this.step, donate_argnums=0))
    state, ys = tree.map(torch.clone, this.init()), []
    for row in rows(this.xs()):
        state, y = jitted[-1](state, row)
        ys.append(y)
    return state, ys


def recipe(name: str, jitted: list[Any]) -> Any:
    """Two steps of a recipe."""
    from fdl import TrainState, data, train_step
    from tests.train.test_recipes import RECIPES
    from train import recipes

    config = RECIPES[name]
    problem = recipes.build(config, random.key(1))
    state = TrainState.create(problem.model, problem.opt, key=random.key(0))
    step = train_step(problem.loss, problem.opt)
    jitted.append(
        fdl.jit(
            lambda state, train, row: step(state, data.to_float(data.batch(train, row))),
            donate_argnums=0,
        )
    )
    order = data.epoch_indices(random.key(2), len(problem.train.x), config.batch_size)
    for i in (0, 1):
        state, metrics = jitted[-1](state, problem.train, (order.index[i], order.mask[i]))
    return state, metrics


def scaled(jitted: list[Any]) -> Tensor:
    """A small program."""
    jitted.append(fdl.jit(lambda x: torch.sin(x) * 3))
    return jitted[-1](torch.arange(5.0))


def out_of_range(jitted: list[Any]) -> Any:
    """The kind and text of the errors at the first call, and at a later one."""
    jitted.append(fdl.jit(lambda x, i: x[i] * 2))
    texts = []
    for i in (7, 1, 7):
        try:
            jitted[-1](torch.arange(4.0), torch.tensor([0, i]))
        except IndexError as error:
            texts.append(str(error))
    assert texts == ["index out of range: expected -4 <= index < 4"] * 2
    return torch.zeros(1)


def stop(jitted: list[Any]) -> Any:
    """Ctrl-C in a loop that would take hours: the donated argument is as it was."""
    import signal
    import traceback

    def interrupt(_: int, frame: Any) -> None:
        if any(f.f_code.co_name == "_execute" for f, _ in traceback.walk_stack(frame)):
            raise KeyboardInterrupt
        signal.setitimer(signal.ITIMER_REAL, 0.1)

    def body(c: Tensor, x: Tensor) -> tuple[Tensor, tuple[()]]:
        return (c @ c).tanh() + x + 1, ()

    jitted.append(fdl.jit(lambda c, xs: fdl.scan(body, c, xs)[0], donate_argnums=0))
    c = torch.eye(16)
    for n, seconds in ((10_000_000, 0.1), (11, 0)):
        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            result = jitted[-1](c, torch.zeros(n))
        except KeyboardInterrupt:
            assert type(c) is Tensor and torch.equal(c, torch.eye(16))
            continue
        assert n == 11
    return result


def forked(jitted: list[Any]) -> Tensor:
    """What a child computes with a program that its parent has loaded, and with another."""
    import os

    first = scaled(jitted)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        other: list[Any] = []
        again = fdl.jit(lambda x: torch.cos(x) * 3)
        values = [jitted[-1](torch.arange(5.0)), scaled(other), again(torch.arange(5.0))]
        os.write(write, "\n".join(map(bits, values)).encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    lines = os.read(read, 1000).decode().split()
    assert lines == [bits(first)] * 2 + [
        bits(fdl.jit(lambda x: torch.cos(x) * 3)(torch.arange(5.0)))
    ]
    return first


def printed(jitted: list[Any]) -> Tensor:
    """A function with a callback."""

    def fn(x: Tensor) -> Tensor:
        fdl.debug.print("the sum is {}", x.sum())
        return x * 2

    jitted.append(fdl.jit(fn))
    return jitted[-1](torch.arange(3.0))


def with_own_operator(jitted: list[Any]) -> Tensor:
    """An operator in Python, which computes something else in every process."""
    import os

    @torch.library.custom_op("tests_cache::process", mutates_args=())
    def process(x: Tensor) -> Tensor:
        return x + os.getpid()

    process.register_fake(torch.empty_like)
    jitted.append(fdl.jit(lambda x: process(x) * 2))
    assert jitted[-1](torch.arange(3.0).double()).tolist() == [
        (i + os.getpid()) * 2 for i in range(3)
    ]
    return torch.zeros(1)


def with_table(jitted: list[Any]) -> Tensor:
    """A table of numbers, another in every process."""
    import os

    numbers = [float(i * os.getpid()) for i in range(100)]
    jitted.append(fdl.jit(lambda x: x + torch.tensor(numbers)))
    assert jitted[-1](torch.ones(100)).tolist() == (torch.tensor(numbers) + 1).tolist()
    return torch.zeros(1)


CASES: dict[str, Case] = {
    "scaled": scaled,
    "out of range": out_of_range,
    "stop": stop,
    "forked": forked,
    "printed": printed,
    "with own operator": with_own_operator,
    "with table": with_table,
}


def run(case: str) -> tuple[str, list[bool]]:
    """The bits of a result, and whether each program came from the cache."""
    kind, _, name = case.partition(":")
    jitted: list[Any] = []
    result = (
        {"program": program, "recipe": recipe}[kind](name, jitted) if name else CASES[case](jitted)
    )
    return bits(result), [report.cached for fn in jitted for report in fn.report()]


def main(*cases: str) -> None:
    print(
        json.dumps(
            {case: run(case) for case in cases}
            | {"inductor": "torch._inductor.compile_fx" in sys.modules}
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
