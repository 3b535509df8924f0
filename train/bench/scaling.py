"""The cost of data parallelism: measured up to four processes, simulated beyond.

`python -m train.bench.scaling` measures on this machine, and writes docs/scaling.json and the
tables of docs/scaling.md, which explains the formulas. `train.bench.step_time` measures steps on a
GPU.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import init_device_mesh

import fdl
import models
from fdl import TrainState, losses, optim, parallel, random, tree
from train import planning
from train.bench import step_time
from train.records import to_json

__all__ = ["Link", "all_reduce_bytes", "all_reduce_seconds", "sent_bytes", "simulate"]

ROOT = Path(__file__).parents[2]
RESULT, PAGE = Path("docs/scaling.json"), Path("docs/scaling.md")
BATCH, STEPS, ROUNDS, SIZES = 64, 40, 6, (1, 2, 3, 4)
TCP_INFO, BYTES_SENT = 11, 200  # of Linux: the socket option, and the offset of two counters


class Link(NamedTuple):
    """A connection between two neighbours of a ring."""

    latency: float  # seconds
    bandwidth: float  # bytes/s


# Assumptions of the planning table, because only one GPU was available: NVLink of an H100, in each
# direction, and a network of 400 Gbit/s for each GPU.
NVLINK, NETWORK = Link(2e-6, 450e9), Link(5e-6, 50e9)
CASES = {
    "lenet": ("LeNet", step_time.IMAGES, "images"),
    "resnet": ("ResNet-50", step_time.IMAGES, "images"),
    "billion": ("1 B parameters", step_time.SEQUENCES * step_time.LENGTH, "tokens"),
}
GPUS, PER_NODE, JITTER = (8, 64, 512), 8, 0.01


def all_reduce_bytes(processes: int, payload: float) -> float:
    """Return the bytes that each process sends to sum a payload: 2 (N − 1) / N times its size.

    In a ring each process sends one N-th of the payload in each of 2 (N − 1) rounds: N − 1 until
    every process has one N-th of the sum, N − 1 until each has all of it. This is the minimum.

    Source: Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms, 2009,
    https://doi.org/10.1016/j.jpdc.2008.09.002

    >>> all_reduce_bytes(4, 1e6)
    1500000.0
    """
    return 2 * (processes - 1) / processes * payload


def all_reduce_seconds(
    payload: float, nodes: int, per_node: int, inside: Link, between: Link
) -> float:
    """Return the time of a sum: within each node, between nodes, and within each node again.

    2 (g − 1) (α + P / g B) + 2 (M − 1) (α' + P / g M B')

    Args:
        payload: size P of the tensors, in bytes.
        nodes: number M of machines.
        per_node: number g of processes on each machine; they send at the same time.
        inside: link between processes of a machine, with latency α and bandwidth B.
        between: link of each process to another machine, with latency α' and bandwidth B'.

    >>> round(all_reduce_seconds(8e9, 1, 8, Link(0, 1e9), Link(0, 1)), 6)
    14.0
    """
    within = 2 * (per_node - 1) * _round(inside, payload / per_node)
    return within + 2 * (nodes - 1) * _round(between, payload / per_node / nodes)


def _round(link: Link, size: float) -> float:
    return link.latency + size / link.bandwidth


def simulate(
    compute: Callable[[tuple[int, int]], np.ndarray],
    payloads: Sequence[float],
    nodes: int,
    per_node: int,
    inside: Link,
    between: Link,
    steps: int = 50,
) -> float:
    """Simulate processes that compute and sum, each with its own clock; return seconds per step.

    In each round of a ring a process waits for its neighbour, so a slow one delays all. The formula
    of `all_reduce_seconds` ignores this.

    Args:
        compute: function that draws the computing times, `(nodes, per_node) -> seconds`.
        payloads: bytes of each sum of a step.
        nodes: number of machines.
        per_node: number of processes on each machine.
        inside: link between processes of a machine.
        between: link of each process to another machine.
        steps: number of steps to simulate.

    >>> links = Link(0.5, 4.0), Link(0.0, 1.0)
    >>> float(simulate(np.ones, [8.0], 1, 2, *links)), all_reduce_seconds(8.0, 1, 2, *links)
    (4.0, 3.0)
    """
    clocks = np.zeros((nodes, per_node))
    for _ in range(steps):
        clocks = clocks + compute(clocks.shape)
        for payload in payloads:
            clocks = _ring(clocks, 1, per_node - 1, _round(inside, payload / per_node))
            clocks = _ring(clocks, 0, 2 * (nodes - 1), _round(between, payload / per_node / nodes))
            clocks = _ring(clocks, 1, per_node - 1, _round(inside, payload / per_node))
    return clocks.max() / steps


def _ring(clocks: np.ndarray, axis: int, rounds: int, seconds: float) -> np.ndarray:
    for _ in range(rounds):
        clocks = np.maximum(clocks, np.roll(clocks, 1, axis)) + seconds
    return clocks


def sent_bytes() -> int:
    """Return the bytes that the open TCP connections of this process have sent (Linux).

    >>> sent_bytes() >= 0
    True
    """
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, TCP_INFO, 256)
            sent, again = struct.unpack_from("QQ", info, BYTES_SENT)
            total += sent - again
        except (OSError, struct.error):  # closed by now; not TCP
            continue
    return total


def lenet_step(mesh: Any) -> tuple[Callable[..., Any], Any, Any]:
    """Make the step to measure, its state and a batch: LeNet on 64 images per process."""
    model, opt = models.lenet(), optim.sgd(0.1, momentum=0.9)
    loss = fdl.supervised(model, losses.cross_entropy)
    state = TrainState.create(model, opt, key=random.key(0))
    x = random.normal(random.key(1), (BATCH, 1, 28, 28))
    y = random.randint(random.key(2), (BATCH,), 0, 10)
    return fdl.jit(parallel.train_step(loss, opt, mesh)), state, (x, y)


def times(act: Callable[[], Any], count: int = STEPS) -> list[float]:
    """Time some calls, after a few to warm up."""
    cpu = torch.device("cpu")
    return [planning.timed(act, cpu) for _ in range(count + 5)][5:]


def worker() -> None:
    """Measure in one process of several: steps, steps without sums, sums without steps."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    step, state, batch = lenet_step(mesh)
    each = init_device_mesh("cpu", (size, 1), mesh_dim_names=("all", "alone"))
    alone, _, _ = lenet_step(each["alone"])  # the same program, with sums over one process
    payload = 4 * (tree.size(state.params) + 1)  # gradients, and the value of the loss

    def total(count: int) -> Callable[[], Any]:
        x = torch.ones(count)
        return lambda: collectives.wait_tensor(collectives.all_reduce(x, "sum", mesh))

    acts = [lambda: step(state, batch), lambda: alone(state, batch), total(4), total(payload // 4)]
    measured: list[list[float]] = [[] for _ in acts]
    for _ in range(ROUNDS):  # interleaved, because the load of this machine varies
        for act, seconds in zip(acts, measured, strict=True):
            dist.barrier()
            seconds += times(act)
    full, compute, small, large = measured
    everywhere: list[list[float]] = [[] for _ in range(size)]
    dist.all_gather_object(everywhere, compute)
    dist.barrier()  # no message is in flight
    before = sent_bytes()
    for _ in range(STEPS):
        step(state, batch)
    dist.barrier()
    sent = (sent_bytes() - before) / STEPS
    if dist.get_rank() == 0:
        rounds = 2 * (size - 1)
        latency = float(np.mean(small)) / max(rounds, 1)
        longer = max(float(np.mean(large)) - float(np.mean(small)), 1e-6)
        point = {
            "processes": size,
            "step": float(np.mean(full)),
            "compute": [round(t, 6) for row in everywhere for t in row],
            "payload": payload,
            "sent": sent,
            "latency": latency,
            "bandwidth": all_reduce_bytes(size, payload) / longer if size > 1 else 1.0,
        }
        print(to_json(point), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def measure() -> list[dict[str, Any]]:
    """Measure with 1 to 4 processes."""
    points = []
    for size in SIZES:
        launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        command = [sys.executable, "-m", *launch, "-m", "train.bench.scaling", "--worker"]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        points.append(json.loads(output.stdout.splitlines()[-1]))
        print(f"{size} processes: {points[-1]['step'] * 1e3:.1f} ms a step", file=sys.stderr)
    return points


def predicted(point: dict[str, Any]) -> float:
    """Simulate a measured step from its computing times and its link."""
    draws = np.random.default_rng(0)
    link = Link(point["latency"], point["bandwidth"])
    return simulate(
        lambda shape: draws.choice(point["compute"], shape),
        [point["payload"], 16.0],  # gradients; total and count of the loss
        1,
        point["processes"],
        link,
        link,
    )


def measured_table(points: Sequence[dict[str, Any]]) -> str:
    """Tabulate measured and expected values."""
    lines = [
        "| processes | sent, kB a step | 2 (N − 1) / N | step, ms | simulated, ms |",
        "|---|---|---|---|---|",
    ]
    for point in points:
        size = point["processes"]
        expected = all_reduce_bytes(size, point["payload"])
        lines.append(
            f"| {size} | {point['sent'] / 1e3:.1f} | {expected / 1e3:.1f} "
            f"| {point['step'] * 1e3:.1f} | {predicted(point) * 1e3:.1f} |"
        )
    return "\n".join(lines)


def planning_table() -> str:
    """Tabulate estimates for many GPUs, from steps of one GPU and the assumptions above."""
    heads = " | ".join(f"{count} GPUs" for count in GPUS)
    lines = [f"| | gradients | computing | {heads} |", "|---" * (3 + len(GPUS)) + "|"]
    measured = json.loads(step_time.RESULT.read_text())["steps"]
    for name, (label, number, unit) in CASES.items():
        each, payload = measured[name]["seconds"], 4 * measured[name]["params"]
        cells = []
        for count in GPUS:
            draws = np.random.default_rng(0)

            def compute(
                shape: tuple[int, int], each: float = each, draws: Any = draws
            ) -> np.ndarray:
                return each * draws.normal(1.0, JITTER, shape)

            where = (count // PER_NODE, PER_NODE, NVLINK, NETWORK)
            sums = all_reduce_seconds(payload, *where)
            seconds = simulate(compute, [payload], *where)
            cells.append(f"{sums * 1e3:.3g} ms, {each / seconds:.0%}")
        size = f"{payload / 1e6:,.4g} MB"
        pace = f"{each * 1e3:.3g} ms, {number / each:,.0f} {unit}/s"
        lines.append(f"| {label}, {number:,} {unit} | {size} | {pace} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rendered(page: str, points: Sequence[dict[str, Any]]) -> str:
    """Put both tables between their markers in a page."""
    for name, table in [("measured", measured_table(points)), ("planning", planning_table())]:
        begin, end = f"<!-- {name}:begin -->\n", f"\n<!-- {name}:end -->"
        before, _, rest = page.partition(begin)
        page = before + begin + table + end + rest.partition(end)[2]
    return page


def main() -> None:
    """Measure and write the results."""
    if "--worker" in sys.argv:
        worker()
        return
    points = measure()
    (ROOT / RESULT).write_text(to_json(points, indent=1) + "\n")
    page = ROOT / PAGE
    page.write_text(rendered(page.read_text(), points))


if __name__ == "__main__":
    main()
