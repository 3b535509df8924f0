"""The benchmark's figures: what follows from the rounds, and how it is shown."""

import doctest
import importlib
import json
import shutil
from pathlib import Path

import pytest

from train.bench import record, render

ROOT = Path(__file__).parents[2]
RATES = {"matrix_flops": 1e11, "matrix_by": "torch", "copy_bytes": 1e10}


def document(**changes):
    """A run with one runner of each fate."""

    def runner(name, **more):
        ok = {"right": True, "loss": 1e-7, "distance": 2e-5, "reason": ""}
        return {"name": name, "label": f"the {name}", "status": "measuring", "check": ok} | more

    entry = {"name": "lenet", "scaled": False, "batch": 256, "steps": 100, "model": "lenet"}
    entry["floor"] = {"flops": 4 * 10**8, "bytes": 10**6, "us": 50.0}
    times = {"cold_call_s": 3.0, "first_steps": 1}
    entry["runners"] = [
        runner("fdl-scan", rounds_us=[120.0, 100.0, 140.0], cold_call_s=9.0, first_steps=100)
        | {"peak_bytes": 9e8, "start_bytes": 7e8, "warm_call_s": 4.0}
        | {"warm_peak_bytes": 8e8, "warm_start_bytes": 7.5e8},
        runner("eager", rounds_us=[200.0], **times),
        runner("compile-step", rounds_us=[80.0], peak_bytes=1e9, start_bytes=9.1e8, **times),
        runner("jax-step", status="not installed"),
        runner("jax-scan", status="failed", reason="out of memory"),
        runner("learner"),
    ]
    record.summarise(entry)
    machine = {"cpu": "a CPU", "cores": 2, "threads": 2, "gpu": None, "system": "Linux"}
    versions = {"fdl": "0.1.0", "python": "3.11", "torch": "2.15.0", "jax": None, "optax": None}
    return {
        "schema": record.SCHEMA,
        "date": "2026-11-23",
        "device": "cpu",
        "machine": machine,
        "versions": versions,
        "rates": RATES,
        "data": "images",
        "rounds": 3,
        "workloads": [entry],
    } | changes


def test_figures_follow_from_the_rounds():
    (entry,) = document()["workloads"]
    scan, eager = entry["runners"][:2]
    assert (scan["min_us"], scan["median_us"]) == (100, 120)
    assert scan["examples_per_s"] == pytest.approx(256 / 120e-6)
    assert scan["cold_s"] == pytest.approx(9 - 99 * 120e-6)  # less the other steps of the call
    assert scan["cold_over_eager_s"] == pytest.approx(scan["cold_s"] - eager["cold_s"])
    assert scan["warm_over_eager_s"] == pytest.approx(4 - 99 * 120e-6 - 3)
    assert entry["fdl_over_best_peer"] == 1.5 and entry["best_peer"] == "compile-step"
    assert entry["floor_reached"] == pytest.approx(50 / 120)
    assert entry["runners"][5]["status"] == "unfinished"


def test_a_table_on_the_terminal_says_everything_in_80_columns():
    lines = render.terminal_table(document()["workloads"][0]).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[2:5]] == ["compile-step", "fdl-scan", "eager"]
    assert lines[3].split()[1:] == ["100", "120", "2,133,333", "6.0", "1.0", "900", "200", "2e-05"]
    text = "\n".join(lines)
    assert "not installed" in text and "failed: out of memory" in text and "unfinished" in text
    assert "fdl-scan / compile-step, the best peer: 1.50" in text
    assert "fdl-scan reaches 41.7%" in text


def test_the_page_gets_bold_medians_and_fates():
    text = render.markdown(document())
    assert "| the compile-step (`compile-step`) | **80.0** |" in text
    assert "| the fdl-scan (`fdl-scan`) | 120 |" in text
    assert "| the jax-step (`jax-step`) | not installed |" in text
    assert "| **fdl / best peer** | 1.50 |" in text
    assert "a CPU, 2 cores, 2 threads; torch 2.15.0, fdl 0.1.0" in text


def test_a_document_survives_its_file(tmp_path):
    record.write(document(), tmp_path / "it.json")
    assert record.read(tmp_path / "it.json") == record.rounded(document())
    with pytest.raises(ValueError, match=r"it.json: expected schema 2, got 0; measure again"):
        record.write(document(schema=0), tmp_path / "it.json")
        record.read(tmp_path / "it.json")
    (tmp_path / "it.json").write_text("{")
    with pytest.raises(ValueError, match=r"it.json: not JSON"):
        record.read(tmp_path / "it.json")


def test_render_remakes_page_and_chart(tmp_path):
    with pytest.raises(ValueError, match="--render: no result in"):
        render.render(tmp_path)
    folder = tmp_path / "docs" / "bench"
    folder.mkdir(parents=True)
    record.write(document(), folder / "cpu.json")
    page = tmp_path / "docs" / "benchmark.md"
    page.write_text("before\n")
    with pytest.raises(ValueError, match=r"docs/benchmark.md needs the markers"):
        render.render(tmp_path)
    assert page.read_text() == "before\n"
    page.write_text(f"before\n{render.BEGIN}\nstale\n{render.END}\nafter\n")
    render.render(tmp_path)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    assert "| most memory beyond the start, MB: fdl, best peer | 50, 90 |" in text
    assert "**80.0**" in text and "(bench/cpu.png)" in text
    first = (folder / "cpu.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    render.render(tmp_path)
    assert page.read_text() == text and (folder / "cpu.png").read_bytes() == first


STARTS = {
    "date": "2026-11-29",
    "cpu": "A processor",
    "cores": 2,
    "versions": {"torch": "2.15.0", "jax": None},
    "rounds": 3,
    "starts": [
        {"name": "linreg", "way": "fdl-step", "cold": [9.0, 3.04, 2.0], "again": [1.2, 0.9, 0.94]},
        {"name": "kalman", "way": "fdl-step", "cold": [4.0], "again": [1.0]},
        {"name": "kalman", "way": "compile-step", "cold": [], "again": [], "reason": "broken"},
    ],
}


def test_render_puts_the_starts_in_their_place(tmp_path):
    folder = tmp_path / "docs" / "bench"
    folder.mkdir(parents=True)
    record.write(document(), folder / "cpu.json")
    page = tmp_path / "docs" / "benchmark.md"
    begin, end = render.STARTS_BEGIN, render.STARTS_END
    page.write_text(f"{render.BEGIN}\n{render.END}\nbetween\n{begin}\nstale\n{end}\nafter\n")
    render.render(tmp_path)
    assert f"{begin}\nstale\n{end}" in page.read_text()  # nothing has been measured
    (tmp_path / "docs" / "starts.json").write_text(json.dumps(STARTS))
    render.render(tmp_path)
    _, _, table = page.read_text().partition("between\n")
    assert (
        table
        == f"""{begin}
A processor, 2 cores; torch 2.15.0; 2026-11-29; medians of 3 rounds.

| seconds: cold, again | `fdl.jit(step)` | `torch.compile(step)` |
| --- | --- | --- |
| linreg | 3.0, 0.9 |  |
| Kalman filter | 4.0, 1.0 | failed |
{end}
after
"""
    )


@pytest.mark.slow
def test_the_page_holds_what_was_committed(tmp_path):
    shutil.copytree(ROOT / "docs" / "bench", tmp_path / "docs" / "bench")
    for starts in ROOT.glob("docs/starts.json"):
        shutil.copy(starts, tmp_path / "docs")
    shutil.copy(ROOT / "docs" / "benchmark.md", tmp_path / "docs")
    render.render(tmp_path)
    made, committed = (root / "docs" / "benchmark.md" for root in (tmp_path, ROOT))
    assert made.read_text() == committed.read_text()
    for path in (ROOT / "docs" / "bench").glob("*.json"):
        assert path.with_suffix(".png").exists() and len(path.read_text()) < 100_000
        for entry in record.read(path)["workloads"]:
            assert "measuring" not in {runner["status"] for runner in entry["runners"]}


@pytest.mark.parametrize("name", ["chart", "record"])
def test_examples_in_docstrings_hold(name):
    found = doctest.testmod(importlib.import_module(f"train.bench.{name}"))
    assert found.attempted and not found.failed
