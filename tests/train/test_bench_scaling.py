"""What `train.bench.scaling` expects of more processes, and what docs/scaling.md says of it."""

import json

import numpy as np
import pytest

from train.bench import scaling
from train.bench.scaling import Link, all_reduce_bytes, all_reduce_seconds, simulate

LINKS = Link(3e-6, 4e9), Link(7e-6, 1e9)


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 1), (1, 8), (8, 1), (4, 8), (3, 5)])
def test_equal_clocks_keep_to_the_formula(nodes, per_node):
    def compute(shape):
        return np.full(shape, 0.01)

    found = simulate(compute, [1e6, 3e5], nodes, per_node, *LINKS, steps=3)
    sums = sum(all_reduce_seconds(p, nodes, per_node, *LINKS) for p in (1e6, 3e5))
    assert found == pytest.approx(0.01 + sums)


def test_the_slowest_sets_the_pace():
    def compute(shape):
        slow = np.full(shape, 0.01)
        slow[1, 2] = 0.05
        return slow

    found = simulate(compute, [1e6], 2, 4, *LINKS, steps=3)
    assert found == pytest.approx(0.05 + all_reduce_seconds(1e6, 2, 4, *LINKS))


def test_time_without_latency_is_that_of_the_bytes():
    link = Link(0.0, 1e9)
    for size in (2, 3, 16):
        assert all_reduce_seconds(1e6, 1, size, link, link) == all_reduce_bytes(size, 1e6) / 1e9


def test_the_page_shows_what_was_measured():
    points = json.loads((scaling.ROOT / scaling.RESULT).read_text())
    page = (scaling.ROOT / scaling.PAGE).read_text()
    assert scaling.rendered(page, points) == page
    assert [point["processes"] for point in points] == [1, 2, 3, 4]
    for point in points:
        expected = all_reduce_bytes(point["processes"], point["payload"])
        assert point["sent"] == pytest.approx(expected, rel=0.02)
        assert scaling.predicted(point) == pytest.approx(point["step"], rel=0.2)
