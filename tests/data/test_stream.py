"""`data.stream` against the same rows in memory, and what goes wrong on the way."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fdl
from fdl import data, losses, nn, optim, random, tree
from fdl.data import Dataset, _stream
from tests.support.asserts import draw
from tests.support.soak import repeats

KEY = random.key(3)
N = 23
POINTS = Dataset({"a": draw(0, N, 3), "b": torch.arange(N, dtype=torch.uint8)}, torch.arange(N))


def take(rows):
    return data.take(POINTS, rows)


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("data.stream")]


@pytest.mark.parametrize("ahead", [1, 3, 50])
@pytest.mark.parametrize("steps", [1, 2, 6, 50])
def test_chunks_are_the_batches_of_the_epoch(steps, ahead):
    indices = data.epoch_indices(KEY, N, 4)
    expected = list(data.batches(POINTS, indices))
    chunks = list(data.stream(take, indices, steps, ahead=ahead))
    assert [len(chunk.y) for chunk in chunks[:-1]] == [steps] * (len(chunks) - 1)
    got = [tree.map(lambda leaf: leaf[i], c) for c in chunks for i in range(len(c.y))]  # noqa: B023
    assert tree.diff(got, expected) == [] and threads() == []


def test_without_padding_there_is_no_mask_and_of_no_steps_nothing_comes():
    indices = data.epoch_indices(KEY, N, 4, drop_last=True)
    (chunk,) = data.stream(take, indices, 5)
    assert chunk.mask == () and chunk.x["b"].shape == (5, 4)
    (plain,) = data.stream(take, indices.index, 5)
    assert tree.diff(plain, chunk) == []
    assert list(data.stream(take, indices.index[:0], 5)) == []


def test_a_run_continued_in_mid_epoch_ends_with_the_same_bits():
    model, opt = nn.linear(3, 1), optim.adam(0.1)
    points = Dataset(draw(1, N, 3).float(), draw(2, N, 1).float())
    loss = fdl.supervised(model, losses.mse)
    step = fdl.train_step(loss, opt)
    indices = data.epoch_indices(KEY, N, 4)
    start = fdl.TrainState.create(model, opt, key=KEY)

    def read(rows):
        return data.take(points, rows)

    whole, _ = fdl.scan(lambda s, row: step(s, data.batch(points, row)), start, indices)
    for chunk in data.stream(read, indices, 2):
        state, _ = fdl.scan(step, start, chunk)
        break  # interrupted
    assert threads() == []
    left = data.take(indices, torch.arange(int(state.step), len(indices.index)))
    for chunk in data.stream(read, left, 2):
        state, _ = fdl.scan(step, state, chunk)
    assert tree.diff(state, whole) == []


def test_the_next_chunk_is_read_meanwhile_and_no_more():
    asked, go = [], threading.Event()

    def read(rows):
        asked.append(threading.current_thread())
        go.wait(20)
        return take(rows)

    chunks = data.stream(read, data.epoch_indices(KEY, N, 1), 2, ahead=2)
    assert asked == []  # nothing is read before the first chunk is asked for
    go.set()
    next(chunks)
    deadline = time.monotonic() + 20
    while len(asked) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(asked) == 3 and threading.current_thread() not in asked
    chunks.close()
    assert threads() == [] and len(asked) == 3


def test_an_error_of_read_comes_in_the_place_of_its_chunk():
    def read(rows):
        if int(rows[0]) >= 8:
            raise OSError("the disk is gone")
        return take(rows)

    seen = 0
    with pytest.raises(OSError, match="the disk is gone"):
        for chunk in data.stream(read, data.sequential_indices(16, 4), 1, ahead=2):
            seen += len(chunk.y)
    assert seen == 2 and threads() == []


def test_it_moves_chunks_to_a_device():
    (chunk,) = data.stream(take, data.sequential_indices(4, 2), 2, device="meta")
    assert {leaf.device.type for leaf in tree.leaves(chunk)} == {"meta"}


@pytest.mark.parametrize(("order", "small"), [("C", 9999), ("C", 0), ("F", 0)])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "int64", "bool"])
def test_rows_on_disk(tmp_path, monkeypatch, dtype, order, small):
    monkeypatch.setattr(_stream, "SMALL", small)
    x = np.random.default_rng(0).integers(0, 2, (N, 2, 3)).astype(dtype)
    np.save(tmp_path / "x.npy", np.array(x, order=order))
    np.save(tmp_path / "y.npy", np.arange(N))
    read = data.on_disk(tmp_path / "x.npy", str(tmp_path / "y.npy"))
    rows = torch.tensor([5, 0, 22, 5])
    got = read(rows)
    expected = torch.from_numpy(x)[rows], rows
    assert tree.diff(list(got), list(expected)) == []
    got[0].zero_()  # a copy: the file stays
    assert np.array_equal(np.load(tmp_path / "x.npy"), x)
    assert [len(leaf) for leaf in read(rows[:0])] == [0, 0]


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """In `make test-all` the file has 10 GB, of which not one is resident."""
    width, rows = 1 << 12, repeats(1 << 15, 10 * (1 << 18))  # 128 MB, 10 GB
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, (rows, width))
    for first in range(0, rows, 1 << 12):
        x[first : first + (1 << 12)] = first % 251
    del x
    np.save(tmp_path / "y.npy", np.arange(rows))
    read, before, peak = data.on_disk(tmp_path / "x.npy", tmp_path / "y.npy"), resident(), 0
    indices = data.epoch_indices(KEY, rows, 64)
    for chunk in data.stream(read, indices, 8):  # 2 MB
        peak = max(peak, resident() - before)
        expected = (chunk.y // (1 << 12)) * (1 << 12) % 251
        assert torch.equal(chunk.x[..., 0].long(), expected)
    assert peak < repeats(64 << 20, 1 << 30)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: data.stream([POINTS], INDEX, 1), TypeError, "source must be a function from rows"),
        (lambda: data.stream(take, [1.0], 1), TypeError, "stream: indices must be an index"),
        (lambda: data.stream(take, torch.arange(3), 1), ValueError, r"\[total, batch\], got \[3\]"),
        (lambda: data.stream(take, INDEX.float(), 1), TypeError, "stream: .*int64"),
        (lambda: data.stream(take, INDEX, 0), ValueError, "stream: steps must be at least 1"),
        (lambda: data.stream(take, INDEX, 1.0), TypeError, "stream: steps must be an int"),
        (lambda: data.stream(take, INDEX, True), TypeError, "steps must be an int, got True"),
        (lambda: data.stream(take, INDEX, 1, ahead=0), ValueError, "ahead must be at least 1"),
        (lambda: next(data.stream(len, INDEX, 1)), TypeError, r"must return a pair \(x, y\)"),
        (lambda: next(data.stream(lambda r: (r, 1), INDEX, 1)), TypeError, "what source returns"),
        (lambda: next(data.stream(lambda r: (r[:1], r[:1]), INDEX, 1)), ValueError, "asked for 2"),
    ],
)
def test_errors_say_what_to_pass(call, error, message):
    with pytest.raises(error, match=message):
        call()


INDEX = torch.zeros(3, 2, dtype=torch.int64)


def test_errors_of_files_name_them(tmp_path):
    good, short, text = (tmp_path / name for name in ("good.npy", "short.npy", "text.npy"))
    np.save(good, np.zeros((4, 2)))
    np.save(short, np.zeros(3))
    text.write_text("no array")
    with pytest.raises(FileNotFoundError):
        data.on_disk(tmp_path / "none.npy", good)
    with pytest.raises(ValueError, match=r"text\.npy is not a \.npy file of numbers"):
        data.on_disk(text, good)
    np.save(text, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="of numbers"):
        data.on_disk(text, good)
    for dtype in (">f8", "<U3"):  # of which torch makes no tensor
        np.save(text, np.zeros(4, dtype))
        with pytest.raises(ValueError, match=f"must hold numbers of a dtype .*, got '{dtype}'"):
            data.on_disk(text, good)
    with pytest.raises(ValueError, match=r"got 4 in .*good\.npy and 3 in .*short\.npy"):
        data.on_disk(good, short)
    for row in (-1, 4):
        with pytest.raises(ValueError, match=f"rows must be from 0 to 3, got {row} to {row}"):
            data.on_disk(good, good)(torch.tensor([row]))
