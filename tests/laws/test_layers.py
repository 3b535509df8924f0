"""The house: what each unit of `fdl` may import, read from the sources."""

import ast
import functools
from pathlib import Path

import pytest

import fdl

ROOT = Path(fdl.__file__).parent
# From the ground up. A unit, a package or a file beside them, imports from the storeys below its
# own; on one storey nobody imports from a neighbour.
STOREYS = [
    {"_version", "_torch_compat", "_kinds", "_checks", "_table", "_threefry"},
    {"_modes", "_files", "tree"},
    {"_dtensor", "_numerics", "io"},
    {"_compiler", "_masks", "_differentiable"},
    {"random", "metrics", "debug"},
    {"data", "optim", "nn", "losses"},
    {"interop", "_training", "_summary"},
    {"population", "transforms", "parallel"},
    {"checkpointing", "testing"},
    {"__init__"},
]
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
LEVEL = {unit: level for level, units in enumerate(STOREYS) for unit in units}
FILES = sorted(ROOT.rglob("*.py"))


def unit_of(path):
    """The package that a file is in, or the file itself beside the packages."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def is_module(name):
    path = Path(fdl.__file__).parent.parent / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def imports(path):
    """The modules of `fdl` that a file imports, in functions too: (path below fdl, line)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [(name if is_module(name) else node.module, node.lineno) for name in paths]
        else:
            continue
        yield from ((name[4:], line) for name, line in names if name.startswith("fdl."))


def climbs(path):
    """The imports of a file that do not lead to a storey below."""
    unit = unit_of(path)
    for name, line in imports(path):
        target = name.split(".")[0]
        if target in LEVEL and target != unit and LEVEL[target] >= LEVEL[unit]:
            yield f"{path.relative_to(ROOT)}:{line}: {unit} imports {name}"


# What a function imports since it takes long, or is not there on every platform or installation.
IMPORTED_LATE = {
    "PIL", "h5py", "jax", "ml_dtypes", "orbax", "pyarrow", "torch._dynamo", "torch._inductor",
    "torch._higher_order_ops.triton_kernel_wrap", "torch.distributed",
    "torch.fx.experimental.symbolic_shapes", "torch.utils.flop_counter", "torchvision",
}  # fmt: skip


def late_imports(path):
    """The modules that a file imports in its functions: (name, line)."""
    functions = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, FUNCTION))
    for node in {node for function in functions for node in ast.walk(function)}:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, node.lineno


def is_listed(name):
    return any(f"{name}.".startswith(f"{module}.") for module in IMPORTED_LATE)


def test_functions_import_only_what_is_heavy():
    found = [(path, *each) for path in FILES for each in late_imports(path)]
    assert [each for each in found if not is_listed(each[1])] == []
    assert {m for m in IMPORTED_LATE for _, name, _ in found if f"{name}.".startswith(f"{m}.")} == (
        IMPORTED_LATE
    )


def test_every_unit_has_a_storey():
    assert {unit_of(path) for path in FILES} == LEVEL.keys()
    assert len(STOREYS) <= 10  # the longest chain of imports among units


def test_imports_lead_down():
    assert not [line for path in FILES for line in climbs(path)]


@pytest.mark.parametrize("source", ["from fdl import optim", "def f():\n    import fdl.optim.x"])
def test_an_import_that_climbs_is_seen(source, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "_map.py").write_text(source)
    assert len([*climbs(tmp_path / "tree" / "_map.py")]) == 1


def test_nothing_is_imported_for_type_checkers_alone():
    assert not [path for path in FILES if "TYPE_CHECKING" in path.read_text()]


def test_files_of_a_package_are_private_behind_its_list():
    public = {
        str(path.relative_to(ROOT))
        for path in FILES
        if not any(part.startswith("_") for part in path.with_suffix("").parts[len(ROOT.parts) :])
    }
    assert public == {"nn/init.py", "population.py"}


@functools.cache
def module_imports():
    return {path: {name for name, _ in imports(path)} for path in FILES}


def test_within_a_package_no_circles():
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in FILES
    }
    done, walked = set(), []

    def walk(name):
        assert name not in walked, f"a circle: {[*walked[walked.index(name) :], name]}"
        if name in done:
            return
        walked.append(name)
        for target in module_imports()[names[name]]:
            if target in names and target != name:
                walk(target)
        walked.pop()
        done.add(name)

    for name in names:
        walk(name)
