"""Show measurements: a table on the terminal, tables in docs/benchmark.md, a chart."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from train.bench import record, speed_starts
from train.bench.chart import draw, figure

__all__ = ["BEGIN", "END", "markdown", "render", "terminal_table"]

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
STARTS_BEGIN, STARTS_END = "<!-- starts:begin -->", "<!-- starts:end -->"
Record = dict[str, Any]


def terminal_table(workload: Record) -> str:
    """Make the table of one workload, at most 80 columns wide."""
    head = ("µs: min", "median", "examples/s", "cold s", "again s", "MB", "+MB", "off")
    widths = (8, 8, 11, 7, 8, 6, 6, 7)
    lines = [
        f"{workload['name']}, batch {workload['batch']}, {workload['steps']} steps a call",
        f"{'':19}" + "".join(f"{name:>{w}}" for name, w in zip(head, widths, strict=True)),
    ]
    for runner in sorted(workload["runners"], key=lambda row: row.get("median_us", math.inf)):
        cells = f"  {status(runner)}"
        if runner["status"] == "right":
            cells = "".join(
                f"{c:>{w}}" for c, w in zip(terminal_cells(runner), widths, strict=True)
            )
        lines.append(f"{runner['name']:19}{cells}"[:80].rstrip())
    if "fdl_over_best_peer" in workload:
        lines.append(
            f"{workload['best_fdl']} / {workload['best_peer']}, the best peer: "
            f"{workload['fdl_over_best_peer']:.2f}"
        )
    if "floor_reached" in workload:
        floor = workload["floor"]
        lines.append(
            f"floor {figure(floor['us'])} µs ({floor['flops'] / 1e6:.3g} MFLOP, "
            f"{floor['bytes'] / 1e6:.2g} MB): {workload['best_fdl']} reaches "
            f"{workload['floor_reached']:.1%}"
        )
    for runner in workload["runners"]:
        lines += [f"{runner['name']} warned: {text}"[:80] for text in runner.get("warnings", [])]
    if any(masks_differ(runner) for runner in workload["runners"]):
        lines.append("* other dropout masks: mean loss within 5 σ of the mean over seeds")
    return "\n".join(lines)


def terminal_cells(runner: Record) -> list[str]:
    """Format the figures of a runner; a missing one is blank."""

    def cell(name: str, form: str, scale: float = 1.0) -> str:
        return format(runner[name] * scale, f"z{form}") if name in runner else ""

    taken = {"+MB": runner["peak_bytes"] - runner["start_bytes"]} if "peak_bytes" in runner else {}
    checked = runner["check"]
    off = checked["loss"] if masks_differ(runner) else max(checked["loss"], checked["distance"])
    return [
        figure(runner["min_us"]),
        figure(runner["median_us"]),
        cell("examples_per_s", ",.0f"),
        cell("cold_over_eager_s", ".1f"),
        cell("warm_over_eager_s", ".1f"),
        cell("peak_bytes", ".0f", 1e-6),
        f"{taken['+MB'] / 1e6:.0f}" if taken else "",
        f"{off:.0e}" + ("*" if masks_differ(runner) else ""),
    ]


def masks_differ(runner: Record) -> bool:
    """Return True if only the mean loss of a runner could be compared."""
    return "check" in runner and runner["check"]["right"] and runner["check"]["distance"] is None


def status(runner: Record) -> str:
    """Explain why a runner has no figures."""
    reason = f": {runner['reason']}" if "reason" in runner else ""
    return f"{runner['status']}{reason}"


def markdown(document: Record) -> str:
    """Make the tables of one document."""
    plain = [w for w in document["workloads"] if not w["scaled"]]
    scaled = [w for w in document["workloads"] if w["scaled"]]
    parts = [provenance(document)]
    if plain:
        heads = [f"{w['name']}, {w['batch']}" for w in plain]
        parts.append(table("median µs a step", heads, plain))
    if scaled:
        heads = [f"{w['batch']:,}" for w in scaled]
        parts.append(table("LeNet, by batch size", heads, scaled))
    return "\n\n".join(parts)


def provenance(document: Record) -> str:
    """Describe in one sentence where the figures come from."""
    machine, versions, rates = (document[name] for name in ("machine", "versions", "rates"))
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    threads = f"{machine['threads']} thread" + "s" * (machine["threads"] > 1)
    packages = [f"{name} {versions[name]}" for name in ("torch", "jax", "fdl") if versions[name]]
    return (
        f"**{document['device'].upper()}**: {where}, {threads}; "
        f"{', '.join(packages)}; float32; {document['data']}; {document['date']}; "
        f"{document['rounds']} interleaved rounds; products at "
        f"{rates['matrix_flops'] / 1e9:,.0f} GFLOP/s (by {rates['matrix_by']}), copies at "
        f"{rates['copy_bytes'] / 1e9:,.0f} GB/s."
    )


def table(title: str, heads: list[str], workloads: list[Record]) -> str:
    """Make a Markdown table with a row for each runner and a column for each workload."""
    labels = {runner["name"]: runner["label"] for w in workloads for runner in w["runners"]}
    rows = [[title, *heads], ["---"] * (len(heads) + 1)]
    rows += [
        [f"{label} (`{name}`)", *(markdown_cell(w, name) for w in workloads)]
        for name, label in labels.items()
    ]
    rows.append(
        ["**fdl / best peer**", *(optional(w, "fdl_over_best_peer", ".2f") for w in workloads)]
    )
    rows.append(
        [
            "share of the floor that fdl reaches",
            *(optional(w, "floor_reached", ".2g%") for w in workloads),
        ]
    )
    rows.append(
        ["fdl's first step beyond eager's, s: cold, again", *(starts(w) for w in workloads)]
    )
    rows.append(
        ["most memory beyond the start, MB: fdl, best peer", *(memory(w) for w in workloads)]
    )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def markdown_cell(workload: Record, name: str) -> str:
    """Format the median of a runner; the smallest of its workload is bold."""
    runner = next((runner for runner in workload["runners"] if runner["name"] == name), None)
    if runner is None:
        return ""
    if runner["status"] != "right":
        return str(runner["status"])
    least = min(w["median_us"] for w in workload["runners"] if w["status"] == "right")
    cell = figure(runner["median_us"]) + ("*" if masks_differ(runner) else "")
    return f"**{cell}**" if runner["median_us"] == least else cell


def optional(workload: Record, name: str, form: str) -> str:
    """Format a figure of a workload; a missing one is blank."""
    if name not in workload:
        return ""
    value = workload[name]
    return f"{100 * value:.2g} %" if form.endswith("%") else format(value, form)


def starts(workload: Record) -> str:
    """Format the time of the first step of fdl's best runner, cold and in a second process."""
    runners = {runner["name"]: runner for runner in workload["runners"]}
    runner = runners.get(workload["best_fdl"], {})
    times = [runner.get(f"{start}_over_eager_s") for start in ("cold", "warm")]
    return ", ".join(f"{seconds:.1f}" for seconds in times if seconds is not None)


def memory(workload: Record) -> str:
    """Format the memory that fdl's best runner and the best peer took while they trained."""
    runners = {runner["name"]: runner for runner in workload["runners"]}
    best = [runners.get(workload[f"best_{side}"], {}) for side in ("fdl", "peer")]
    sizes = []
    for runner in best:
        start = "warm_" if "warm_peak_bytes" in runner else ""
        if "peak_bytes" in runner:
            sizes.append(runner[f"{start}peak_bytes"] - runner[f"{start}start_bytes"])
    return ", ".join(f"{size / 1e6:,.0f}" for size in sizes)


def render(root: Path = ROOT) -> list[Path]:
    """Rewrite the tables of docs/benchmark.md and the charts; return the files written.

    Raises:
        ValueError: there is no result to render, or the page lacks the markers.
    """
    sources = sorted((root / "docs/bench").glob("*.json"))
    if not sources:
        raise ValueError(f"--render: no result in {root / 'docs/bench'}")
    documents = {path: record.read(path) for path in sources}
    page, written = root / "docs/benchmark.md", []
    text = between(page.read_text(), BEGIN, END, tables(documents))
    starts = root / speed_starts.RESULT
    if starts.exists():
        table = speed_starts.markdown(json.loads(starts.read_text()))
        text = between(text, STARTS_BEGIN, STARTS_END, table)
    for path, document in documents.items():
        draw(document, path.with_suffix(".png"))
        written.append(path.with_suffix(".png"))
    page.write_text(text)
    return [page, *written]


def between(page: str, begin: str, end: str, text: str) -> str:
    """Replace the text between the markers of a page."""
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(
            f"--render: docs/benchmark.md needs the markers {begin} and {end}, once each"
        )
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def tables(documents: dict[Path, Record]) -> str:
    """Make the tables of all documents, each with its chart."""
    charts = [
        f"{markdown(document)}\n\n![Time per step relative to the fastest, "
        f"{path.stem}](bench/{path.stem}.png)"
        for path, document in documents.items()
    ]
    return "\n\n".join(charts)
