"""`nn.dropout2d`: whole channels, by the key; elements are in test_layers.py."""

import pytest
import torch
from torch.func import vmap

from fdl import nn, random
from tests.support.asserts import close, draw, unchanged

KEY = random.key(3)


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
def test_drops_whole_channels_and_keeps_the_mean(rate):
    x = draw(0, 300, 20, 2, 3) + 3
    with unchanged(x, KEY):
        y = nn.dropout2d(rate).apply({}, x, train=True, key=KEY)
    kept = random.uniform(KEY, (300, 20, 1, 1)) >= rate
    close(y, torch.where(kept, x / (1 - rate), 0.0), rtol=0, atol=0)
    dropped = (y == 0).flatten(2)
    assert torch.equal(dropped.all(-1), dropped.any(-1))
    assert abs(dropped[..., 0].double().mean() - rate) < 4 * (rate * (1 - rate) / 6000) ** 0.5


def test_is_the_identity_in_evaluation_and_at_rate_0():
    x = draw(0, 2, 3, 4, 4)
    assert nn.dropout2d(0.5).apply({}, x, key=KEY) is x
    assert nn.dropout2d(0.0).apply({}, x, train=True) is x
    assert not nn.dropout2d(0.0).uses_key and nn.dropout2d(0.5).init(KEY) == {}


def test_under_vmap_over_keys_equals_the_loop():
    keys, x = random.split(KEY, 5), draw(0, 2, 3, 4, 4)

    def run(key):
        return nn.dropout2d(0.4).apply({}, x, train=True, key=key)

    close(vmap(run)(keys), torch.stack([run(key) for key in keys]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("x", "key", "error", "text"),
    [
        (
            torch.ones(2, 3, 4),
            KEY,
            ValueError,
            r"dropout2d\(0.5\): expected x \[batch, channels, he",
        ),
        (torch.ones(2, 3, 4, 4), None, ValueError, r"dropout2d\(0.5\) with train=True needs a key"),
        (torch.ones(2, 3, 4, 4).long(), KEY, TypeError, r"dropout2d\(0.5\): x must be floating"),
    ],
    ids=["rank", "no-key", "integers"],
)
def test_refuses(x, key, error, text):
    with pytest.raises(error, match=text):
        nn.dropout2d(0.5).apply({}, x, train=True, key=key)


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan")])
def test_a_rate_is_a_fraction(rate):
    with pytest.raises(ValueError, match=rf"dropout2d: rate, the fraction .*, got {rate}"):
        nn.dropout2d(rate)
