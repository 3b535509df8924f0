"""`testing.count_programs`: a program for each signature of each jitted function."""

import threading

import torch

import fdl
from fdl.testing import count_programs


def test_programs_are_counted_within_the_block(plain_backend):
    double = fdl.jit(lambda x: 2 * x)
    with count_programs() as outer:
        double(torch.ones(2))
        with count_programs() as inner:
            for n in (2, 2, 3):
                double(torch.ones(n))
            thread = threading.Thread(target=fdl.jit(torch.sin), args=(torch.ones(2),))
            thread.start()
            thread.join()
        double(torch.ones(4))
    double(torch.ones(5))
    assert (outer.count, inner.count) == (4, 2)


def test_an_error_in_the_block_ends_the_count(plain_backend):
    try:
        with count_programs() as programs:
            raise KeyError
    except KeyError:
        fdl.jit(torch.sin)(torch.ones(2))
    assert programs.count == 0
