"""Random convolutional nets equal eager torch in float64, values and derivatives."""

import pytest
from hypothesis import assume, given, settings

from tests.support.blocks import EVERY, check
from tests.support.random_nets import Net, loss_of, nets, problem
from tests.support.soak import repeats


def check_net(net: Net) -> None:
    args = problem(net)
    assume("convolution" in net.used())
    check(int(net.shape[0] > 1), loss_of(net), *args)


@given(nets(4))
@settings(max_examples=3, **EVERY)
def test_a_few_random_nets(net: Net) -> None:
    check_net(net)


@pytest.mark.slow
@given(nets())
@settings(max_examples=repeats(20, 400), **EVERY)
def test_random_nets(net: Net) -> None:
    check_net(net)
