"""A law over the public names: what is public says what it takes, and shows it."""

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import fdl
import models

MODULES = {
    name: importlib.import_module(name)
    for package in (fdl, models)
    for name in [
        package.__name__,
        *(info.name for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")),
    ]
    if not any(part.startswith("_") for part in name.split("."))
}


def public():
    """Map each name to what it stands for: functions, classes and their methods, of ours."""
    found = {}
    for module in MODULES.values():
        for name in module.__all__:
            thing = getattr(module, name)
            if not (inspect.isfunction(thing) or inspect.isclass(thing)):
                continue  # modules, type aliases, constants
            if not thing.__module__.startswith(("fdl", "models")):
                continue  # torch's own activations
            found[f"{thing.__module__}.{thing.__qualname__}"] = thing
            if inspect.isclass(thing):
                for method, f in vars(thing).items():
                    f = f.__func__ if isinstance(f, classmethod) else f
                    if inspect.isfunction(f) and not method.startswith("_"):
                        found[f"{thing.__module__}.{f.__qualname__}"] = f
    return found


PUBLIC = public()
FUNCTIONS = {name: f for name, f in PUBLIC.items() if inspect.isfunction(f)}
OF_A_MODULE = {name: f for name, f in PUBLIC.items() if "." not in f.__qualname__}


def parameters(f):
    return [name for name in inspect.signature(f).parameters if name not in ("self", "cls")]


def documented(f):
    """The names in the `Args:` section, or None where there is none."""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", inspect.getdoc(f), re.MULTILINE)
    return re.findall(r"^    \*{0,2}(\w+): ", section[1], re.MULTILINE) if section else None


def test_the_law_sees_the_library():
    assert {"fdl.optim", "fdl.nn.init", "fdl.tree", "models.lenet"} <= MODULES.keys()
    assert {
        "fdl.tree._map.map",
        "fdl._training._state.TrainState.create",
        "models.mlp.mlp",
    } <= FUNCTIONS.keys()
    assert documented(fdl.optim.sgd) == parameters(fdl.optim.sgd) and len(PUBLIC) > 80


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_a_module_has_a_docstring_and_lists_what_exists(module):
    assert module.__doc__
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
    assert len(set(module.__all__)) == len(module.__all__)


@pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)
def test_args_are_exactly_the_parameters(f):
    assert f.__doc__, "no docstring"
    if documented(f) is None:
        assert len(parameters(f)) <= 2, f"no Args section for {parameters(f)}"
    else:
        assert documented(f) == parameters(f)


@pytest.mark.parametrize("thing", OF_A_MODULE.values(), ids=OF_A_MODULE)
def test_a_docstring_has_an_example(thing):
    # NamedTuple writes a docstring of its own where there is none.
    assert thing.__doc__ and not thing.__doc__.startswith(f"{thing.__name__}("), "no docstring"
    assert ">>> " in thing.__doc__ or "Example::" in thing.__doc__


def test_the_groups_of_the_reference_hold_every_name_once():
    source = (Path(fdl.__file__).parents[1] / "docs" / "_hooks.py").read_text()
    groups = next(
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.AnnAssign | ast.Assign) and "GROUPS" in ast.unparse(node)[:8]
    )
    for module, parts in groups.items():
        named = [name for names in parts.values() for name in names.split()]
        assert sorted(named) == sorted(importlib.import_module(module).__all__), module
