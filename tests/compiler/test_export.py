"""Programs as files: `export` and `load_program`."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import distribute_tensor

import fdl
from fdl import debug, random, tree
from fdl._compiler import _inductor, _load_program, _package
from fdl._torch_compat import RELEASE
from fdl.metrics import Mean
from tests.support.asserts import equal_bits
from tests.support.exported import CASES, LOOPS

ROOT = Path(__file__).parents[2]
needs_loops = pytest.mark.skipif(RELEASE < (2, 12), reason="torch 2.11 has no loops in files")


def assert_same(got: Any, expected: Any) -> None:
    """Equal structure, and equal bits of all leaves."""
    assert tree.flatten_dict(got).keys() == tree.flatten_dict(expected).keys()
    for path, leaf in tree.flatten_dict(expected).items():
        assert equal_bits(tree.flatten_dict(got)[path], leaf), path


def edit(path: Path, **changes: Any) -> Path:
    """Write a copy of a file with another description; `None` leaves an entry out."""
    edited = path.with_name("edited.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(edited, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("_metadata.json"):
                metadata = json.loads(content)
                about = json.loads(metadata["fdl"]) | changes
                about = {key: value for key, value in about.items() if value is not None}
                content = json.dumps(metadata | {"fdl": json.dumps(about)}).encode()
            new.writestr(name, content)
    return edited


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Write files without compiling, and run the graphs; return the graphs."""
    graphs: list[Any] = []

    def lower(
        graph: Any, mode: Any, inputs: Any, constants: Any, folder: Path, metadata: dict[str, str]
    ) -> list[Path]:
        constants = [leaf.clone() for leaf in constants]
        graphs.append(lambda leaves: graph(*leaves, *constants))
        library, about = folder / "a.wrapper.so", folder / "a.wrapper_metadata.json"
        library.write_text(str(len(graphs) - 1))
        about.write_text(json.dumps(metadata))
        code = folder / "a.wrapper.cpp"
        code.write_text("int main() {}")
        return [library, about, code]

    def load(files: dict[str, bytes], outputs: int, where: str) -> Callable[[Any], Any]:
        run: Callable[[Any], Any] = graphs[int(files["a.wrapper.so"])]
        return run

    monkeypatch.setattr(_package, "lower", lower)
    monkeypatch.setattr(_inductor, "missing_compiler", lambda: "")
    monkeypatch.setattr(_load_program, "_load", load)
    return graphs


def through_file(fn: Callable[..., Any], args: tuple[Any, ...], folder: Path) -> Any:
    fdl.export(fn, args, folder / "it.pt2")
    return fdl.load_program(folder / "it.pt2")


# --- with the compiler ---


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_four_calls_without_compiler_or_code_have_the_bits_of_jit(
    name: str, tmp_path: Path
) -> None:
    """Zeros, and an average that is the parameters, must not become constants of the program."""
    fn, args = CASES[name]()
    if name in LOOPS and RELEASE < (2, 12):
        with pytest.raises(NotImplementedError, match=r"has a loop.*torch 2\.11.*install torch 2"):
            fdl.export(fn, args, tmp_path / "program.pt2")
        return
    fdl.export(fn, args, tmp_path / "program.pt2")
    fdl.io.save(tmp_path / "arguments.safetensors", args)
    files = ("program.pt2", "arguments.safetensors", "results.safetensors")
    nothing = tmp_path / "empty"
    nothing.mkdir()
    done = subprocess.run(
        [sys.executable, ROOT / "tests/workers/program_worker.py", *(tmp_path / f for f in files)],
        cwd=nothing,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PATH": str(nothing), "CXX": "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    jitted, outputs = fdl.jit(fn), []
    state, *rest = args
    for _ in range(4):
        state, output = jitted(state, *rest)
        outputs.append(output)
    assert_same(fdl.io.load(tmp_path / "results.safetensors"), (state, outputs))
    if name == "mlp with ema":
        assert state["step"] == 4
        assert not torch.equal(state["key"], args[0]["key"])
        assert tree.diff(state["ema"], state["params"])
    assert (tmp_path / "program.pt2").stat().st_size < 3_000_000
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled program that indexes, closes over tensors, and returns an argument."""
    table, offset = torch.arange(12.0).view(4, 3), torch.tensor([0.1, -0.0, 1e-8])
    large = random.normal(random.key(0), (3, 1000))

    def fn(x: Tensor, i: Tensor) -> dict[str, Any]:
        rows = table[i] * offset
        return {"x": x, "twice": [rows @ large @ large.T + x, None], "table": table, "i": i + 1}

    path: Path = tmp_path_factory.mktemp("small") / "small.pt2"
    fdl.export(fn, (torch.ones(2, 3), torch.tensor([1, 3])), path)
    table.zero_()  # the file has its values at the time of export
    return path


def expected_of_small(x: Tensor, i: Tensor) -> dict[str, Any]:
    table, offset = torch.arange(12.0).view(4, 3), torch.tensor([0.1, -0.0, 1e-8])
    large = random.normal(random.key(0), (3, 1000))
    twice = [table[i] * offset @ large @ large.T + x, None]
    return {"x": x, "twice": twice, "table": table, "i": i + 1}


def memory(results: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in tree.leaves(results) if leaf is not None}


@pytest.mark.slow
def test_nothing_shares_memory(small: Path) -> None:
    x, i = torch.randn(2, 3), torch.tensor([0, -1])
    first, second = fdl.load_program(small), fdl.load_program(small)
    results = [first(x, i), first(x, i), second(x, i)]
    assert len(set().union(memory([x, i]), *map(memory, results))) == 2 + 3 * 4
    for leaf in tree.leaves(results[0]):
        if leaf is not None:
            leaf.fill_(7)  # not even the constants of the program
    del first
    for got in (results[1], second(x, i)):
        assert not tree.diff(expected_of_small(x, i), got, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_any_strides_and_alignment(small: Path) -> None:
    program = fdl.load_program(small)
    base = torch.randn(7)
    for x in (
        base[:-1].view(2, 3),
        base[1:].view(2, 3),
        torch.randn(3, 2).T,
        torch.randn(2, 1).expand(2, 3),
        torch.randn(2, 6)[:, ::2],
        torch.randn(2, 3, dtype=torch.complex64).conj().imag,
    ):
        i = torch.tensor([2, 0])
        assert not tree.diff(expected_of_small(x, i), program(x, i), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_an_index_out_of_range_raises_and_the_program_goes_on(small: Path) -> None:
    program, x = fdl.load_program(small), torch.ones(2, 3)
    message = r"-4 <= index < 4" if RELEASE >= (2, 12) else "printed above"
    with pytest.raises((IndexError, RuntimeError), match=message):
        program(x, torch.tensor([0, 4]))
    assert torch.equal(program(x, torch.tensor([0, 3]))["i"], torch.tensor([1, 4]))


@pytest.mark.slow
def test_threads_and_a_file_that_is_replaced(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "it.pt2"
    path.write_bytes(small.read_bytes())
    program = fdl.load_program(path)
    path.write_bytes(b"")
    failed: list[Any] = []

    def work(seed: int) -> None:
        x, i = torch.full((2, 3), float(seed)), torch.tensor([seed, 0])
        for _ in range(200):
            if tree.diff(expected_of_small(x, i), program(x, i), rtol=1e-5, atol=1e-6):
                failed.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@pytest.mark.slow
@needs_loops
def test_other_threads_run_while_a_program_does(tmp_path: Path) -> None:
    def fn(c: Tensor) -> Tensor:
        return fdl.fori_loop(0, 30_000, lambda _, c: (c @ c).tanh(), c)

    program, turns, done = through_file(fn, (torch.eye(64),), tmp_path), [0], threading.Event()

    def count() -> None:
        while not done.wait(0.001):
            turns[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    before = turns[0]
    program(torch.eye(64))  # about a second
    during = turns[0] - before
    done.set()
    thread.join()
    assert during > 10


@pytest.mark.slow
def test_autocast_counts_where_the_program_is_exported(tmp_path: Path) -> None:
    def fn(w: Tensor, x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, w).square()

    w, x = torch.randn(4, 3, 3, 3), torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        program = through_file(fn, (w, x), tmp_path)
        expected = fdl.jit(fn)(w, x)
    assert expected.dtype == torch.bfloat16 and torch.equal(program(w, x), expected)
    plain = through_file(fn, (w, x), tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(w, x), fdl.jit(fn)(w, x).float()) is False
        inside = plain(w, x)
    assert torch.equal(inside, fdl.jit(fn)(w, x))


@pytest.mark.slow
def test_operations_without_a_function_in_torchs_c_interface(tmp_path: Path) -> None:
    """torch calls them by name, with a list of them in the file."""

    def fn(x: Tensor) -> tuple[Tensor, ...]:
        return torch.linalg.qr(x @ x.T + torch.eye(4)).R, torch.fft.fft(x).abs(), x.cumsum(0)

    x = torch.randn(4, 4)
    program = through_file(fn, (x,), tmp_path)
    assert_same(program(x), fdl.jit(fn)(x))


@pytest.mark.slow
def test_a_file_that_was_damaged(small: Path, tmp_path: Path) -> None:
    """Cut off or changed anywhere: an error that says what to do, never a crash."""
    content = small.read_bytes()
    path = tmp_path / "it.pt2"
    for size in (0, 1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"it\.pt2: it is damaged.*export it again"):
            fdl.load_program(path)
    directory = content.rindex(b"PK\x05\x06")
    for place in (*range(0, len(content), len(content) // 50), *range(directory, len(content))):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            program = fdl.load_program(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:  # a byte that nobody reads
            x, i = torch.ones(2, 3), torch.tensor([0, 3])
            assert not tree.diff(expected_of_small(x, i), program(x, i), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_folder_that_libraries_cannot_be_loaded_from(
    small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(OSError, match=r"small\.pt2: No such file.*; set TMPDIR"):
        fdl.load_program(small)


@pytest.mark.slow
def test_a_failed_export_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "it.pt2"
    path.write_text("old")

    def fail(*_: Any) -> Any:
        raise RuntimeError("no space left")

    monkeypatch.setattr(_package, "lower", fail)
    with pytest.raises(RuntimeError, match=r"export: torch's compiler refused .*no space left"):
        fdl.export(lambda x: x + 1, (torch.ones(1),), path)
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def cpp_command(source: Path, to: Path) -> list[str]:
    """The command that the comment in the source gives."""
    torch_folder = Path(torch.__path__[0])
    libraries = torch_folder / "lib"
    flags = f"-L {libraries} -Wl,-rpath,{libraries},--no-as-needed -ltorch -ltorch_cpu -lc10"
    include = ("-I", torch_folder / "include")
    return list(map(str, ("g++", "-std=c++20", "-O1", *include, source, "-o", to, *flags.split())))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@needs_loops
def test_lenet_trains_in_cpp_with_the_same_bits(tmp_path: Path) -> None:
    examples = ROOT / "docs" / "examples"
    source = examples / "lenet_train.cpp"
    subprocess.run(
        [sys.executable, examples / "lenet_export.py", tmp_path],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        timeout=600,
    )
    subprocess.run(cpp_command(source, tmp_path / "lenet_train"), check=True, timeout=600)
    program = [tmp_path / "lenet_train", tmp_path]
    only_threads = {"OMP_NUM_THREADS": "1"}  # no PATH, and no folder of Python
    done = subprocess.run(
        [*program, "2"], env=only_threads, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    init, epoch = (fdl.load_program(tmp_path / name) for name in ("init.pt2", "epoch.pt2"))
    state, losses = init(random.key(0)), []
    images, labels = fdl.data.fashion_mnist_sample()
    for _ in range(2):
        state, loss, _ = epoch(state, images, labels.byte())
        losses.append(f"{loss.item():.6g}")
    assert re.findall(r"loss (\S+),", done.stdout) == losses
    leaves = torch.load(tmp_path / "state.pt", weights_only=True)
    assert len(leaves) == len(tree.leaves(state)) and state.step == 2 * 24
    for got, expected in zip(leaves, tree.leaves(state), strict=True):
        assert equal_bits(got, expected)
    (tmp_path / "images").write_bytes(bytes(28 * 28))
    failed = subprocess.run([*program, "1"], env=only_threads, capture_output=True, timeout=300)
    assert failed.returncode != 0 and b"unmatched dim value" in failed.stderr


# --- without the compiler ---


class Own(NamedTuple):
    w: Any
    count: Tensor


def test_trees(stand_in: list[Any], tmp_path: Path) -> None:
    """Dicts in any order; fdl's NamedTuples as such, others as ones of the same fields."""
    args = (
        {"b": [torch.ones(2), None], "a": (torch.zeros(1),)},
        Own({"x": torch.ones(1)}, torch.tensor(0)),
        OrderedDict(m=Mean(torch.tensor(1.0), torch.tensor(2.0))),
    )
    program = through_file(lambda a, *rest: (a, *rest, None, {}), args, tmp_path)
    got = program({"a": args[0]["a"], "b": args[0]["b"]}, *args[1:])
    assert list(got[0]) == ["b", "a"] and got[0]["b"][1] is None
    assert type(got[1]).__name__ == "Own" and type(got[1]) is not Own
    assert got[1]._fields == Own._fields and torch.equal(got[1].w["x"], torch.ones(1))
    assert type(got[2]) is OrderedDict and type(got[2]["m"]) is Mean
    assert got[3:] == (None, {})
    assert program(*got[:3])[1] == got[1]  # its own results are arguments too


def test_a_single_tensor_and_no_tensor(stand_in: list[Any], tmp_path: Path) -> None:
    assert torch.equal(
        through_file(lambda x: x * 2, (torch.ones(2),), tmp_path)(torch.ones(2)),
        torch.full((2,), 2.0),
    )
    assert through_file(lambda: torch.zeros(1), (), tmp_path)() == torch.zeros(1)


def test_other_arguments_are_refused_by_path(stand_in: list[Any], tmp_path: Path) -> None:
    args = ({"w": torch.ones(2, 3), "old": (torch.ones(1), None)}, torch.arange(2))
    program = through_file(lambda state, rows: (state, rows), args, tmp_path)
    state, rows = args

    def message(*args: Any) -> str:
        with pytest.raises(
            ValueError,
            match=r"it\.pt2: the arguments differ from those of the export; change them, or ",
        ) as error:
            program(*args)
        return "\n".join(line.strip() for line in str(error.value).splitlines()[1:])

    assert message(state, rows.int()) == "rows: expected int64[2], got int32[2]"
    assert message(state, rows[:1]) == "rows: expected int64[2], got int64[1]"
    assert message(state, 3) == "rows: expected int64[2], got the int 3"
    assert message(state, [rows]) == "rows: expected int64[2], got a list"
    assert message(state, rows.to("meta")) == "rows: expected int64[2], got int64[2] on meta"
    assert message({"w": state["w"], "new": rows}, rows) == (
        "state.old: missing (expected a tuple)\nstate.new: unexpected (got int64[2])"
    )
    assert message({**state, "old": [torch.ones(1), None]}, rows) == (
        "state.old: expected a tuple, got a list"
    )
    assert message({**state, "old": (torch.ones(1), rows)}, rows) == (
        "state.old.1: expected None, got int64[2]"
    )
    assert message({**state, "w": Own(rows, rows)}, rows) == (
        "state.w: expected float32[2, 3], got a NamedTuple (w, count)"
    )
    with pytest.raises(TypeError, match=r"expected 2 arguments \(state, rows\), got 1"):
        program(state)
    with pytest.raises(TypeError, match=r"program\(\) got an unexpected keyword"):
        program(state, rows=rows)
    with pytest.raises(ValueError, match=r"state\.w require grad.*detach"):
        program({**state, "w": state["w"].clone().requires_grad_()}, rows)
    with torch.no_grad():
        program({**state, "w": torch.nn.Parameter(state["w"])}, rows)
    assert program(*args)  # still


def test_fields_in_another_order_are_refused(stand_in: list[Any], tmp_path: Path) -> None:
    class Swapped(NamedTuple):
        count: Tensor
        w: Tensor

    one = torch.ones(1)
    program = through_file(lambda own: own, (Own(one, one),), tmp_path)
    with pytest.raises(ValueError, match=r"\(w, count\), got a NamedTuple \(count, w\)"):
        program(Swapped(one, one))
    with pytest.raises(
        ValueError, match=r"own: expected a NamedTuple \(w, count\), got a fdl.Mean"
    ):
        program(Mean(one, one))


def test_a_program_cannot_be_transformed_or_traced(stand_in: list[Any], tmp_path: Path) -> None:
    program = through_file(lambda x: x * 2, (torch.ones(2),), tmp_path)
    calls: list[Callable[[], Any]] = [
        lambda: torch.vmap(program)(torch.ones(3, 2)),
        lambda: torch.func.grad(lambda x: program(x).sum())(torch.ones(2)),
        lambda: torch.func.jvp(program, (torch.ones(2),), (torch.ones(2),)),
        lambda: fdl.jit(program)(torch.ones(2)),
        lambda: fdl.jit(lambda xs: fdl.map(program, xs))(torch.ones(3, 2)),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="cannot be traced, vmapped or differentiated"):
            call()


def test_files_for_other_places(stand_in: list[Any], tmp_path: Path) -> None:
    program = through_file(lambda x: x, (torch.ones(1),), tmp_path)
    path = tmp_path / "it.pt2"
    assert torch.equal(fdl.load_program(edit(path))(torch.ones(1)), program(torch.ones(1)))
    for changes, message in (
        ({"torch": "2.3.1+cpu"}, rf"for torch 2\.3\.1\+cpu.*{torch.__version__[:4]}.*export the"),
        ({"machine": "z80"}, r"for linux on z80, and this is linux on .*export the function"),
        ({"system": "win32"}, r"for win32 on .*export the function again here"),
        ({"features": ["avx", "avx9000"]}, r"a processor with avx9000, which this one lacks.*here"),
    ):
        with pytest.raises(RuntimeError, match=message):
            fdl.load_program(edit(path, **changes))
    with pytest.raises(ValueError, match=r"fdl 9\.9 wrote it in format 2.*export it again"):
        fdl.load_program(edit(path, format=2, fdl="9.9"))
    for changes in ({"torch": None}, {"argument_leaves": 3}, {"more": 1}):
        with pytest.raises(ValueError, match="its description is malformed"):
            fdl.load_program(edit(path, **changes))


def test_what_is_not_a_file_of_a_program(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"load_program: \S+/no\.pt2: no such file"):
        fdl.load_program(tmp_path / "no.pt2")
    with pytest.raises(ValueError, match="it is not a file"):
        fdl.load_program(tmp_path)
    path = tmp_path / "it.pt2"
    path.write_text("text")
    with pytest.raises(ValueError, match=r"it is damaged, or not a file of fdl\.export"):
        fdl.load_program(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data/aotinductor/model/a.wrapper_metadata.json", "{}")
    with pytest.raises(ValueError, match="another package of torch's"):
        fdl.load_program(path)


def test_arguments_of_export(stand_in: list[Any], tmp_path: Path) -> None:
    x, path = torch.ones(2), tmp_path / "it.pt2"

    def fn(x: Tensor, y: Tensor) -> Tensor:
        return x + y

    with pytest.raises(TypeError, match="fn must be a function, got an int"):
        fdl.export(3, (x,), path)  # type: ignore[arg-type]
    for wrong in (x, {"x": x, "y": x}, Mean(x, x)):
        with pytest.raises(TypeError, match=r"must be a tuple of the arguments.*\(x,\) for one"):
            fdl.export(fn, wrong, path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"do not fit .*fn.*missing a required argument: 'y'"):
        fdl.export(fn, (x,), path)
    with pytest.raises(TypeError, match=r"export: every leaf of an argument.*\n  y.b: 3"):
        fdl.export(fn, (x, {"b": 3}), path)
    with pytest.raises(ValueError, match=r"export: y\.0 is on meta.*fdl\.tree\.to"):
        fdl.export(fn, (x, [x.to("meta")]), path)
    with pytest.raises(TypeError, match=r"NamedTuple, tensor, .* got deque at 'y'"):
        fdl.export(fn, (x, deque([x])), path)
    with pytest.raises(TypeError, match="key must be a str, got 3"):
        fdl.export(lambda x: x[3], ({3: x},), path)
    with pytest.raises(TypeError, match=r"every leaf of the result must be a tensor.*\n  a: \{"):
        fdl.export(lambda x: {"a": {x}}, (x,), path)
    with pytest.raises(ValueError, match=r"path must end in \.pt2.*'program\.so'"):
        fdl.export(fn, (x, x), "program.so")
    with pytest.raises(FileNotFoundError, match="no such folder; create it first"):
        fdl.export(fn, (x, x), tmp_path / "no" / "it.pt2")
    assert [*tmp_path.iterdir()] == []


def test_tensors_without_values_of_their_own(stand_in: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "it.pt2"
    with FakeTensorMode():
        fake = torch.ones(2)
    with pytest.raises(TypeError, match="ordinary tensors with values, not DTensors"):
        fdl.export(lambda x: x, (fake,), path)
    with pytest.raises(RuntimeError, match="call it outside jit"):
        torch.vmap(lambda x: fdl.export(lambda x: x, (x,), path))(torch.ones(2, 2))
    program = through_file(lambda x: x, (torch.ones(4),), tmp_path)
    with pytest.raises(ValueError, match=r"x: expected float32\[4\], got .*, a FakeTensor"):
        program(fake.new_ones(4))
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        leaf = distribute_tensor(torch.ones(4), mesh)
        with pytest.raises(TypeError, match=r"not DTensors.*fdl\.parallel\.gather"):
            fdl.export(lambda x: x, (leaf,), path)
        with pytest.raises(ValueError, match=r"x: expected float32\[4\], got .*, a DTensor"):
            program(leaf)
    finally:
        dist.destroy_process_group()


def test_what_a_file_cannot_hold_is_refused_by_name(
    stand_in: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, path = torch.ones(2), tmp_path / "it.pt2"

    def prints(x: Tensor) -> Tensor:
        debug.print("{x}", x=x)
        return x + 1

    with pytest.raises(NotImplementedError, match=r"prints .*calls fdl\.debug\.print.*remove"):
        fdl.export(prints, (x,), path)

    with torch.library._scoped_library("own_test", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CPU")
        with pytest.raises(NotImplementedError, match=r"calls own_test.twice.*operations of torch"):
            fdl.export(lambda x: torch.ops.own_test.twice(x), (x,), path)
        torch.library.register_fake("own_test::twice", torch.empty_like, lib=library)
        with pytest.raises(NotImplementedError, match=r"calls own_test.twice.*operations of torch"):
            fdl.export(lambda x: torch.ops.own_test.twice(x), (x,), path)
    monkeypatch.setattr(_inductor, "missing_compiler", lambda: "no C++ compiler was found")
    with pytest.raises(RuntimeError, match=r"export: no C\+\+ compiler was found"):
        fdl.export(lambda x: x, (x,), path)
    assert [*tmp_path.iterdir()] == []


def test_closed_over_tensors_are_part_of_the_file(stand_in: list[Any], tmp_path: Path) -> None:
    w = torch.ones(2, requires_grad=True)
    program = through_file(lambda x: x * w, (torch.ones(2),), tmp_path)
    with torch.no_grad():
        w.fill_(5)
    assert torch.equal(program(torch.ones(2)), torch.ones(2))


def test_a_jitted_function_and_overlapping_examples(stand_in: list[Any], tmp_path: Path) -> None:
    """An expanded example has one element in memory; the program must not expect the same."""
    example = torch.ones(1).expand(3), torch.ones(4).as_strided((3, 2), (1, 1))
    program = through_file(fdl.jit(lambda x, y: (x + 1, y), donate_argnums=0), example, tmp_path)
    x, y = torch.arange(3.0), torch.arange(6.0).view(3, 2)
    assert_same(program(x, y), (torch.arange(3.0) + 1, torch.arange(6.0).view(3, 2)))
    assert torch.equal(x, torch.arange(3.0))


def test_nothing_is_said(stand_in: list[Any], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        through_file(lambda x: x + 1, (torch.ones(1),), tmp_path)(torch.ones(1))
