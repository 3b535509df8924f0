"""Every dense configuration of optimizers that torch itself tests: 100 steps in float64.

`python -m tests.optim.test_torch_recipes` prints the table of the largest relative differences.
"""

import pytest
import torch

from fdl import optim, tree
from tests.support.asserts import close
from tests.support.optimizers import CASES, STEPS, agree, default_dtype, run, run_torch, start

each_case = pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])


def both(case):
    """Run a case both ways; return parameters, slots, and torch's leaves and slots by path."""
    with default_dtype(torch.float64):
        begin = start(shapes=case.shapes)
        params, state = run(case.ours(), begin, STEPS)
        leaves, optimizer = run_torch(lambda p: case.theirs(p.values()), begin, STEPS)
    theirs = {path: optimizer.state[leaf] for path, leaf in leaves.items()}
    return params, optim.slots(state), leaves, theirs


@pytest.mark.slow
@each_case
def test_parameters_and_slots_equal_torch(case):
    params, slots, leaves, theirs = both(case)
    agree(params, leaves)
    names = {name for state in theirs.values() for name, x in state.items() if x is not None}
    assert slots.keys() == names - {"step"}
    for name, slot in slots.items():
        for path, value in tree.flatten_dict(slot).items():
            if name in theirs[path]:
                close(value, theirs[path][name])
            else:
                assert value.numel() == 0  # adafactor, where a leaf has too few axes


def test_every_dense_optimizer_of_torch_is_here():
    classes = {
        name.lower()
        for name, thing in vars(torch.optim).items()
        if isinstance(thing, type) and issubclass(thing, torch.optim.Optimizer)
    }
    here = {case.name for case in CASES}
    assert classes - here == {"optimizer", "sparseadam", "lbfgs"}
    assert all(hasattr(optim, name) for name in here)


def relative(ours, theirs):
    """The largest difference of a leaf, relative to its largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-300))


HEAD = f"""# How far optimizers are from torch.optim

The largest differences after {STEPS} float64 steps, relative to the largest value of their leaf: of
the change of the parameters, and of the slots (per-parameter state). Made with torch
{torch.__version__.partition("+")[0]} by `python -m tests.optim.test_torch_recipes`; the tests
require 1e-10. In Muon both sides round to bfloat16.

| configuration | parameters | slots |
|---|---|---|"""


def table():
    print(HEAD)
    for case in CASES:
        params, slots, leaves, theirs = both(case)
        began = tree.flatten_dict(start(shapes=case.shapes))
        moved = max(
            relative(p - began[path], leaves[path].detach() - began[path])
            for path, p in tree.flatten_dict(params).items()
        )
        kept = [
            relative(value, theirs[path][name])
            for name, slot in slots.items()
            for path, value in tree.flatten_dict(slot).items()
            if name in theirs[path]
        ]
        last = f"{max(kept):.0e}" if kept else "–"
        print(f"| `{case.id}` | {moved:.0e} | {last} |")


if __name__ == "__main__":
    table()
