"""The collector of cyclic garbage runs less often while a function is traced and compiled."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor

from fdl import jit
from fdl._compiler._garbage import OBJECTS, fewer_collections

USUAL = (700, 10, 10)


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    """Let the collector run as in a new process, and afterwards as before."""
    before, enabled = gc.get_threshold(), gc.isenabled()
    gc.set_threshold(*USUAL)
    yield
    gc.set_threshold(*before)
    (gc.enable if enabled else gc.disable)()


def test_it_starts_later_in_the_context_and_as_before_after_it() -> None:
    with fewer_collections():
        assert gc.get_threshold() == (OBJECTS, *USUAL[1:])
        with fewer_collections():
            assert gc.get_threshold()[0] == OBJECTS
        assert gc.get_threshold()[0] == OBJECTS
    assert gc.get_threshold() == USUAL
    with pytest.raises(ValueError, match="inside"), fewer_collections():
        raise ValueError("inside")
    assert gc.get_threshold() == USUAL


def test_cycles_in_the_context_are_found_once_there_are_many() -> None:
    found = list[int]()

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            found.append(info["collected"])

    gc.callbacks.append(note)
    try:
        with fewer_collections():
            for _ in range(OBJECTS + 1000):
                cycle: list[object] = []
                cycle.append(cycle)
    finally:
        gc.callbacks.remove(note)
    assert sum(found) > OBJECTS // 2 and len(found) < 20


@pytest.mark.parametrize("threshold", [(0, 10, 10), (3 * OBJECTS, 5, 5)])
def test_a_collector_that_is_off_or_runs_even_less_often_is_left_alone(
    threshold: tuple[int, int, int],
) -> None:
    gc.set_threshold(*threshold)
    with fewer_collections():
        assert gc.get_threshold() == threshold
    assert gc.get_threshold() == threshold


def test_a_collector_that_is_disabled_stays_so() -> None:
    gc.disable()
    with fewer_collections():
        assert not gc.isenabled()
    assert not gc.isenabled()


def test_what_is_chosen_in_the_context_is_kept() -> None:
    with fewer_collections():
        gc.set_threshold(100, 5, 5)
    assert gc.get_threshold() == (100, 5, 5)


def test_objects_that_are_frozen_stay_frozen() -> None:
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with fewer_collections():
            pass
        assert gc.get_freeze_count() > frozen // 2  # some may have been freed, as always
    finally:
        gc.unfreeze()
    with fewer_collections():
        young = [[] for _ in range(1000)]  # type: ignore[var-annotated]
    assert gc.get_freeze_count() == 0 and all(map(gc.is_tracked, young))


def test_garbage_of_the_context_is_found_after_it() -> None:
    gc.collect()
    with fewer_collections():
        cycle: list[object] = []
        cycle.append(cycle)
        del cycle
    assert gc.collect() >= 1


def test_threads_share_it() -> None:
    inside, first_left = Barrier(2, timeout=60), Barrier(2, timeout=60)

    def first() -> None:
        with fewer_collections():
            inside.wait()
        first_left.wait()

    def second() -> int:
        with fewer_collections():
            inside.wait()
            first_left.wait()
            return gc.get_threshold()[0]

    with ThreadPoolExecutor(2) as pool:
        done = pool.submit(first)
        assert pool.submit(second).result() == OBJECTS
        done.result()
    assert gc.get_threshold() == USUAL


def test_while_jit_traces_and_not_while_it_runs(plain_backend: None) -> None:
    seen = list[int]()

    def fn(x: Tensor) -> Tensor:
        seen.append(gc.get_threshold()[0])
        return x + 1

    jitted = jit(fn)
    jitted(torch.zeros(2))
    assert seen == [OBJECTS] and gc.get_threshold() == USUAL

    def fails(x: Tensor) -> Tensor:
        raise ValueError("of the user")

    with pytest.raises(ValueError, match="of the user"):
        jit(fails)(torch.zeros(2))
    assert gc.get_threshold() == USUAL
