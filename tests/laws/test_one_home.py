"""One public name for a thing, and one home for a helper."""

import ast
import importlib
import pkgutil
from collections import Counter
from pathlib import Path
from types import ModuleType

import fdl

PUBLIC = {
    "fdl": fdl,
    **{
        info.name: importlib.import_module(info.name)
        for info in pkgutil.walk_packages(fdl.__path__, "fdl.")
        if "._" not in info.name
    },
}
# A function of torch that a package lists under its own name is at home in torch.
NAMES = [
    (f"{module.__name__}.{name}", getattr(module, name))
    for module in PUBLIC.values()
    for name in module.__all__
]


def test_the_law_sees_the_packages():
    assert {"fdl.optim", "fdl.optim.schedules", "fdl.nn.init", "fdl.io"} <= PUBLIC.keys()


def test_a_thing_has_one_public_name():
    homes = {}
    for path, thing in NAMES:
        if not isinstance(thing, ModuleType) and hasattr(thing, "__qualname__"):
            homes.setdefault(id(thing), []).append(path)
    assert not [paths for paths in homes.values() if len(paths) > 1]


def definitions():
    """The functions and classes at the top of each file of `fdl`, by name and source."""
    for path in sorted(Path(fdl.__file__).parent.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                body = [part for part in node.body if not isinstance(part, ast.Expr)]
                yield path.relative_to(Path(fdl.__file__).parent), node.name, ast.unparse(body)


def test_no_helper_is_written_twice():
    found = [(name, body) for _, name, body in definitions() if body]
    twice = [name for (name, body), n in Counter(found).items() if n > 1]
    assert not twice
    bodies = Counter(body for _, body in found if "\n" in body)
    same = [name for name, body in found if bodies[body] > 1]
    assert not same


def shape(function):
    """The body of a function in which its variables are numbered, and the docstring left out."""
    names = {}
    nodes = [*ast.walk(function)]
    own = {node.arg for node in nodes if isinstance(node, ast.arg)}
    own |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for node in nodes:
        if isinstance(node, ast.arg):
            node.arg, node.annotation = names.setdefault(node.arg, f"v{len(names)}"), None
        elif isinstance(node, ast.Name) and node.id in own:
            node.id = names.setdefault(node.id, f"v{len(names)}")
    return ast.unparse(function.body[1:] if ast.get_docstring(function) else function.body)


def test_no_two_functions_differ_in_names_only():
    found = [
        (path.name, node.name, shape(node))
        for path in Path(fdl.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    bodies = Counter(body for *_, body in found if len(body) > 60)
    assert not [each[:2] for each in found if bodies[each[2]] > 1]
