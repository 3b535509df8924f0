"""`make gpu`: its parts end in time, and its report says what ran; on the CPU, by a rehearsal."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import fdl
from tests.train.test_bench import make_task
from train.bench import gpu, gpu_parts, gpu_report, kernels, kernels_for_cuda
from train.bench.gpu_parts import Part

ROOT = Path(__file__).parents[2]
# JAX warns of every fork once another test has imported it; a part runs another program at once.
pytestmark = pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")


def part(name, code, *, share=1, codes=(0,)):
    """A part that runs a line of Python; its result is what it wrote to NAME.json."""
    command = [sys.executable, "-c", code]
    return Part(name, share, command, codes, partial(gpu_parts.read_json, f"{name}.json"))


def written(folder, name, value):
    return f"import pathlib; pathlib.Path({str(folder / name)!r}).write_text({json.dumps(value)!r})"


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Run parts; return the exit code, and the entries of the report by name."""
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    monkeypatch.setattr(gpu_report, "SHOW", dict.fromkeys("abcd", str))

    def call(seconds, *parts):
        report = gpu_report.new_report(seconds, True)
        code = gpu.measure(list(parts), seconds, tmp_path, report)
        saved = json.loads((tmp_path / "report.json").read_text())
        return code, {entry["name"]: entry for entry in saved["parts"]}

    return call


def test_without_a_gpu_it_is_one_line_and_nothing_is_made(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert gpu.main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: torch ") and err.count("\n") == 1
    assert "finds no GPU on this machine; --rehearse" in err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_even_without_torch(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "NEEDS", ("torch", "absent_one", "absent_two"))
    assert gpu.main(["--rehearse"]) == 2
    assert "lacks absent_one, absent_two: pip install" in capsys.readouterr().err
    code = "import sys; sys.modules['torch'] = None; import train.bench.gpu as g; print(g.SECONDS)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "480.0\n", done.stderr


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_a_wrong_budget_is_refused(seconds, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--rehearse", "--seconds", seconds])
    assert "--seconds" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["there", "file/below"])
def test_results_of_another_run_are_not_overwritten(out, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    assert gpu.main(["--rehearse", "--out", out]) == 2
    assert f"error: --out {out}" in capsys.readouterr().err


def test_each_part_is_an_entry_whatever_becomes_of_it(measure, tmp_path):
    fails = "print('first'); raise SystemExit('it broke')"
    code, entries = measure(
        60,
        part("a", written(tmp_path, "a.json", [1])),
        part("b", fails),
        part("c", "pass"),  # ends well and writes nothing
        part("d", written(tmp_path, "d.json", [2]) + "; raise SystemExit(1)", codes=(0, 1)),
    )
    assert code == 1
    assert [entries[name]["status"] for name in "abcd"] == ["done", "failed", "failed", "done"]
    assert entries["a"]["result"] == [1] and entries["d"]["result"] == [2]
    assert entries["b"]["reason"] == "it broke" and "FileNotFoundError" in entries["c"]["reason"]
    text = (tmp_path / "report.txt").read_text()
    assert "b: failed, " in text and ": it broke" in text and "REHEARSAL" in text


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_stopped_with_what_it_has(measure, tmp_path):
    polite = f"""
import time
try:
    time.sleep(100)
except KeyboardInterrupt:
    {written(tmp_path, "a.json", "so far")}
"""
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(100)"
    began = time.monotonic()
    code, entries = measure(15, part("a", polite), part("b", stubborn), part("c", "pass"))
    assert time.monotonic() - began < 30
    assert entries["a"]["status"] == entries["b"]["status"] == "out of time"
    assert entries["a"]["result"] == "so far" and "result" not in entries["b"]
    assert code == 1  # of c, which writes nothing


def test_time_that_a_part_leaves_is_for_the_next_and_what_has_none_is_named(measure, tmp_path):
    quick = written(tmp_path, "a.json", 1)
    code, entries = measure(
        60, part("a", quick, share=9), part("b", written(tmp_path, "b.json", 2))
    )
    assert code == 0 and entries["a"]["limit_s"] == pytest.approx(54, abs=0.1)
    assert entries["b"]["limit_s"] > 50
    code, entries = measure(0.9, part("a", quick))
    assert code == 0 and entries["a"] == {"name": "a", "status": "not run"}
    assert "a: not run" in (tmp_path / "report.txt").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_part_and_the_report_has_the_rest(number, code, tmp_path):
    """Also with SIGINT ignored, as in the background of a shell: the part gets its own."""
    script = f"""
import signal, sys
from functools import partial
from pathlib import Path
from train.bench import gpu, gpu_parts
if {number.value} != signal.SIGINT:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
def parts(folder, rehearse):
    late = ("import os, sys, time, pathlib\\ntry:\\n    os.kill(os.getppid(), {number.value})\\n"
            "    time.sleep(100)\\nexcept KeyboardInterrupt:\\n"
            f"    pathlib.Path({{str(folder / 'kernels.json')!r}}).write_text('[]')")
    read = partial(gpu_parts.read_json, "kernels.json")
    return [gpu_parts.Part("kernels", 1, [sys.executable, "-c", late], (0,), read)] * 2
gpu_parts.parts = parts
sys.exit(gpu.main(["--rehearse", "--out", {str(tmp_path / "it")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    first, second = json.loads((tmp_path / "it" / "report.json").read_text())["parts"]
    assert first["status"] == "interrupted" and first["result"] == []
    assert second["status"] == "not run"


def test_a_report_that_cannot_be_written_is_one_line(monkeypatch, capsys, tmp_path):
    def full(report, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gpu_report, "write", full)
    monkeypatch.setattr(gpu_parts, "parts", lambda folder, rehearse: [part("a", "pass")])
    assert gpu.main(["--rehearse", "--out", str(tmp_path / "it")]) == 74
    err = capsys.readouterr().err
    assert "it cannot be written: [Errno 28] No space left" in err and err.count("\n") == 1


TESTS = """
import time, pytest
def test_right(): pass
def test_wrong(): assert 1 == 2
@pytest.mark.parametrize("way", ["one way", "b"])
def test_ways(way): pass
@pytest.mark.skip(reason="of no use")
def test_skipped(): pass
@pytest.fixture
def broken(): raise OSError("broken")
def test_error(broken): pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_fates_of_tests_are_read_from_the_log(processes, tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    shared = ["-n", str(processes)] if processes else []
    with (tmp_path / "tests.log").open("w") as log:
        subprocess.run([*command, "-ra", *shared, "test_it.py"], cwd=tmp_path, stdout=log)
    read = gpu_parts.read_tests(tmp_path)
    assert read["result"]["counts"] == {"error": 1, "failed": 1, "passed": 3, "skipped": 1}
    assert len(read["wrong"]) == 2 and any("assert 1 == 2" in line for line in read["wrong"])
    shown = gpu_report.show_tests(read["result"])
    assert shown.startswith("1 error, 1 failed, 3 passed, 1 skipped")
    if processes:
        assert read["result"]["selected"] == 6


def test_a_log_cut_short_counts_what_ran(tmp_path):
    log = tmp_path / "tests.log"
    fates = ["tests/a.py::test_a[x y] PASSED [  2%]", "tests/a.py::test_b FAILED [  4%]"]
    begun = ["collected 300 items / 250 deselected / 50 selected", "", *fates, "tests/a.py::test_c"]
    log.write_text("\n".join(begun))
    read = gpu_parts.read_tests(tmp_path)
    assert read["wrong"] == ["tests/a.py::test_b"]
    assert gpu_report.show_tests(read["result"]) == "1 failed, 1 passed, 48 not run"
    log.write_text("ImportError: no module\n")
    with pytest.raises(ValueError, match="no test was found: ImportError: no module"):
        gpu_parts.read_tests(tmp_path)


def test_every_file_with_a_test_for_cuda_is_run_and_the_telling_ones_first():
    command = ["grep", "-rlE", "mark[.]cuda", "tests", "--include=test_*.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    files = gpu_parts.test_files()
    assert sorted(files) == sorted(done.stdout.split())
    assert files[:3] == [f"tests/{name}" for name in gpu_parts.TELLING]


def test_a_wrong_runner_of_the_benchmark_is_wrong(tmp_path):
    runners = [
        {"name": "eager", "status": "right"},
        {"name": "fdl-scan", "status": "wrong", "reason": "loss 1e-1 off"},
        {"name": "jax-scan", "status": "not installed"},
    ]
    document = {"schema": 2, "workloads": [{"name": "lenet", "runners": runners}]}
    (tmp_path / "benchmark.json").write_text(json.dumps(document))
    read = gpu_parts.read_benchmark(tmp_path)
    assert read["wrong"] == ["lenet, fdl-scan: wrong: loss 1e-1 off"]
    assert read["not_run"] == ["mlp", "softmax", "linreg"]
    head = {"name": "benchmark", "status": "out of time", "seconds": 5.0, "limit_s": 5.0}
    expected = "benchmark: out of time, 5 s of at most 5; not run: mlp, softmax, linreg"
    assert gpu_report.heading(head | read) == expected


def test_the_report_names_the_gpu(monkeypatch):
    report = gpu_report.new_report(1.0, True)
    report["machine"] |= {"gpu": "NVIDIA H100", "capability": "9.0", "gpu_bytes": 80 * 2**30}
    assert "on NVIDIA H100 (compute capability 9.0, 80 GiB); torch 2" in gpu_report.where(report)


# The kernels of a step.


def test_a_profile_is_for_one_step_and_without_a_graph_if_it_sees_none(monkeypatch):
    task = make_task("linreg", steps=4)
    with fdl.disable_jit():
        found = kernels.profile_epoch(kernels.Scan(task))
    products = [k for k in found["kernels"] if k["name"] == "aten::addmm"]
    assert found["profiled_graph"] and found["steps"] == 4
    assert [k["count"] for k in products] == [1.0]  # one linear layer
    assert found["launches"] == pytest.approx(sum(k["count"] for k in found["kernels"]))
    assert found["device_us"] == pytest.approx(sum(k["us"] for k in found["kernels"]))
    times = [k["us"] for k in found["kernels"]]
    assert times == sorted(times, reverse=True)
    calls = iter([[], [("add", 2.0)] * 8])
    monkeypatch.setattr(kernels, "profile_call", lambda runner: next(calls))
    found = kernels.profile_epoch(kernels.Scan(task))
    assert not found["profiled_graph"] and found["launches"] == 2.0


def test_kernels_are_profiled_though_no_graph_is_captured(stand_in, monkeypatch):
    """The way without a graph: capture is refused, and the program runs nevertheless."""
    task = make_task("linreg", steps=4)
    monkeypatch.setattr(kernels._cuda_graphs, "_capture", kernels.refuse)
    events = kernels.profile_call(kernels.Scan(task))
    assert sum(name == "aten::addmm" for name, _ in events) == 4


def test_the_table_has_a_row_for_each_workload():
    plain = {"name": "lenet", "batch": 256, "route": "one program", "generated": 34, "regions": 2}
    counted = {"for_cuda": {"triton": 41, "library": 13, "calls": []}}
    entries = [
        plain | {"fallbacks": ["it is slow"]} | counted,
        plain
        | {"name": "mlp", "fallbacks": [], "steps": 2, "profiled_graph": True}
        | kernels.launches([("gemm", 8.0), ("add", 1.0)] * 2, 2),
    ]
    lines = kernels.markdown(entries).splitlines()
    assert lines[2] == "| lenet | 256 | one program | 34 | 2 | 41, 13 |  |  |"
    assert lines[3] == "| mlp | 256 | one program | 34 | 2 |  | 2.0 | 9.0 |"
    assert lines[4] == "lenet: it is slow"
    assert lines[6:] == [
        "mlp, a step in the graph: count, µs, name",
        "   1.0     8.00  gemm",
        "   1.0     1.00  add",
    ]


needs_triton_and_no_gpu = pytest.mark.skipif(
    torch.cuda.is_available() or importlib.util.find_spec("triton") is None,
    reason="needs Triton, and a machine without a GPU",
)


@needs_triton_and_no_gpu
@pytest.mark.slow
def test_kernels_for_cuda_are_counted_without_a_gpu():
    def f(x, w):
        y = torch.relu(x @ w) * 2  # one kernel of cuBLAS, one of Triton
        return y, (x + torch.zeros(3, 1)).sum(1)  # one of Triton: the constant is folded

    args = torch.ones(3, 4), torch.ones(4, 5)
    found = kernels_for_cuda.count(f, args)
    assert (found["triton"], found["library"], len(found["calls"])) == (2, 1, 3)
    assert "mm" in found["calls"]
    # Nothing pretends any more, and the CPU computes as before.
    with pytest.raises((RuntimeError, AssertionError)):
        torch.cuda.get_device_properties(0)
    torch.testing.assert_close(fdl.jit(f)(*args), f(*args))


@needs_triton_and_no_gpu
@pytest.mark.slow
def test_what_inductor_cannot_lower_is_said(monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("no such operation")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", refuse)
    task = make_task("linreg")
    found = kernels.for_cuda(kernels.Step(task))
    assert found["for_cuda"] is None and "no such operation" in found["not_counted"]
    monkeypatch.setitem(sys.modules, "triton.runtime.driver", None)
    assert "triton.runtime.driver" in kernels.for_cuda(kernels.Step(task))["not_counted"]


@pytest.mark.slow
def test_the_rehearsal_runs_all_of_it(tmp_path):
    """The command as users type it, but that make gets the interpreter of these tests."""
    out = tmp_path / "it"
    command = ["make", "gpu", f"PYTHON={sys.executable}", f"ARGS=--rehearse --out {out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text())
    assert {entry["name"]: entry["status"] for entry in report["parts"]} == {
        "tests": "done",
        "benchmark": "done",
        "kernels": "done",
        "population": "done",
    }
    tests, benchmark, counted, population = (entry["result"] for entry in report["parts"])
    assert tests["selected"] > 40
    if not torch.cuda.is_available():
        assert tests["counts"] == {"skipped": tests["selected"]}
    assert [entry["name"] for entry in benchmark["workloads"]] == list(gpu_parts.WORKLOADS)
    assert {r["status"] for entry in benchmark["workloads"] for r in entry["runners"]} == {"right"}
    assert counted[0]["name"] == "linreg" and counted[0]["generated"] > 0
    assert population[0]["members"] == 2 and np.isfinite(list(population[0]["ms"].values())).all()
    text = (out / "report.txt").read_text()
    for words in (
        "REHEARSAL",
        "lenet, batch 256",
        "| linreg | 10 |",
        "lenet, 2 members",
        "skipped",
    ):
        assert words in text
    assert text in done.stdout


def test_images_are_those_that_the_parts_find_wherever_it_starts(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_parts, "ROOT", tmp_path / "checkout")
    (tmp_path / "checkout").mkdir()
    asked = []

    def find(**options):
        asked.append((Path.cwd(), options))
        if not Path("data").is_dir():
            raise FileNotFoundError("data")

    monkeypatch.setattr(gpu_parts.data, "fashion_mnist", find)
    monkeypatch.chdir(tmp_path)
    assert gpu_parts.found_data() == "sample"
    (tmp_path / "checkout" / "data").mkdir()
    assert gpu_parts.found_data() == "auto" and Path.cwd() == tmp_path
    assert asked == [(tmp_path / "checkout", {"download": False})] * 2
