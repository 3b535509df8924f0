"""pad_to: batches of any loader at one length, and the forms and columns that they may have."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

import fdl
from fdl import data, losses, metrics, nn, optim, random, tree
from fdl.data import Batch, pad_to
from tests.support.asserts import close, draw, unchanged

X, Y = draw(0, 5, 3), torch.tensor([0, 1, 2, 0, 1])
NET = nn.sequential(nn.linear(3, 4), nn.batch_norm(4), nn.tanh, nn.linear(4, 3))
LOSS = fdl.supervised(NET, losses.cross_entropy, {"accuracy": metrics.accuracy})
OPT = optim.sgd(0.1)


class Column(Sequence):
    """As that of a data set of Hugging Face: a sequence of rows, with large output."""

    def __init__(self, rows):
        self.rows = rows

    def __getitem__(self, key):
        return self.rows[key]

    def __len__(self):
        return len(self.rows)

    def __repr__(self):
        return "Column([1.2345, ...])"


@pytest.mark.parametrize(("n", "size"), [(0, 2), (1, 1), (1, 4), (3, 4), (5, 5), (5, 9)])
def test_rows_are_kept_and_copies_of_the_first_follow(n, size):
    with unchanged(X, Y):
        x, y, mask = pad_to((X[:n], Y[:n]), size)
    assert mask.tolist() == [i < n for i in range(size)]
    index = [i if i < n else 0 for i in range(size)]
    close(x, X[index] if n else torch.zeros(size, 3, dtype=torch.float64), rtol=0, atol=0)
    close(y, Y[index] if n else torch.zeros(size, dtype=torch.int64))


def test_batches_padded_by_hand_are_those_of_the_indices():
    rows = data.sequential_indices(5, batch_size=3)
    for i, expected in enumerate(data.batches((X, Y), rows)):
        got = pad_to((X[3 * i : 3 * i + 3], Y[3 * i : 3 * i + 3]), 3)
        assert torch.equal(got.mask, expected.mask)
        close(tree.map(lambda leaf, m=got.mask: leaf[m], got), tree.map(
            lambda leaf, m=got.mask: leaf[m], expected))  # fmt: skip


def test_trees_of_several_inputs_are_padded_leaf_by_leaf():
    x = {"words": Y, "more": (X, X[:, None].bfloat16())}
    padded = pad_to({"x": x, "y": ()}, 7)
    assert padded.y == ()
    assert tree.map(lambda leaf: leaf.shape[0], padded.x) == {"words": 7, "more": (7, 7)}
    assert padded.x["more"][1].dtype == torch.bfloat16 and padded.mask.sum() == 5


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_a_mask_is_continued_with_zeros_of_its_dtype(dtype):
    mask = torch.tensor([1, 0, 1, 1, 1]).to(dtype)
    for batch in ((X, Y, mask), Batch(X, Y, mask), {"x": X, "y": Y, "mask": mask}):
        padded = pad_to(batch, 7)
        assert torch.equal(padded.mask, torch.cat([mask, torch.zeros(2, dtype=dtype)]))
    again = pad_to(padded, 9)
    assert again.mask.sum() == mask.sum() and again.x.shape == (9, 3)


def test_a_padded_step_is_that_of_the_ragged_batch():
    params, _ = tree.cast(NET.init(random.key(0)), torch.float64)
    state = fdl.TrainState.create(NET, OPT, key=random.key(1), params=params)
    state = state._replace(buffers=tree.cast(state.buffers, torch.float64))
    step = fdl.train_step(LOSS, OPT)
    for batch in ((X, Y), (X[:3], Y[:3])):
        close(step(state, pad_to(batch, 5)), step(state, batch))


def test_ragged_batches_are_one_program(plain_backend):
    loss = fdl.jit(lambda x, y, mask: losses.mse(x, y, mask))
    for batch in ((X, X + 1), (X[:3], X[:3] + 1)):
        close(loss(*pad_to(batch, 5)), torch.tensor(1.0, dtype=torch.float64))
    assert len(loss.report()) == 1


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: pad_to((X, Y), 4), ValueError, "the batch has 5 rows, more than size=4"),
        (lambda: pad_to((X, Y), 0), ValueError, "size must be at least 1, got 0"),
        (lambda: pad_to((X, Y), 8.0), TypeError, "size must be an int, got 8.0"),
        (lambda: pad_to((X, Y[:3]), 8), ValueError, r"same number of rows, got {'x': 5, 'y': 3}"),
        (lambda: pad_to((X, Y, Y > 0, Y), 8), TypeError, "batch must be Batch.*, got a tuple"),
        (lambda: pad_to({"x": X}, 8), TypeError, r"batch must be .* got the entries \['x'\]"),
        (
            lambda: pad_to((X, Y, (Y > 0)[:2]), 8),
            ValueError,
            r"mask must have the shape \[5\], got",
        ),
        (lambda: pad_to((X, torch.tensor(1)), 8), TypeError, r"one row for each .*\n  y: a tensor"),
        (lambda: pad_to(((), ()), 8), ValueError, "got no tensor"),
    ],
)
def test_what_cannot_be_padded_is_named(call, error, text):
    with pytest.raises(error, match=f"^pad_to: .*{text}"):
        call()


COLUMN = Column([1.2345, 2.0])
ARRAY = np.full((2, 3), 1.2345, np.float32)
STATE = fdl.TrainState.create(nn.linear(3, 1), OPT, key=random.key(0))
STEP = fdl.train_step(fdl.supervised(nn.linear(3, 1), losses.mse), OPT)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: STEP(STATE, {"x": x, "y": Y}),
        lambda x: STEP(STATE, (X, {"deep": [Y, x]})),
        lambda x: fdl.jit(STEP)(STATE, (x, x)),
        lambda x: pad_to((x, x), 8),
        lambda x: data.batch((x, x), torch.tensor([0])),
        lambda x: data.take({"x": x}, 0),
    ],
)
def test_columns_and_arrays_are_named_by_type_or_shape_with_what_to_do(call):
    for x, text in (
        (COLUMN, r'a Column; take the rows of a column, as in d\["x"\]\[:\]'),
        (ARRAY, r"float32\[2, 3\].*interop.from_numpy|interop.from_numpy.*float32\[2, 3\]"),
    ):
        with pytest.raises(TypeError, match=f"(?s){text}") as error:
            call(x)
        assert "1.23" not in str(error.value)
