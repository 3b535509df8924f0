"""`data.table` against the tables that were written."""

import builtins
import io

import numpy as np
import pytest
import torch
from PIL import Image

from fdl import data, random, tree

pa = pytest.importorskip("pyarrow")
from pyarrow import feather, ipc, parquet  # noqa: E402

N = 23
NUMBERS = np.random.default_rng(0)
X = NUMBERS.normal(size=(N, 2, 3))
ROWS = torch.tensor([5, 0, 22, 5, 9])


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


GREY = NUMBERS.integers(0, 256, (N, 4, 5), dtype=np.uint8)
COLOUR = NUMBERS.integers(0, 256, (N, 4, 5, 3), dtype=np.uint8)
COLUMNS = {
    "numbers": (pa.array(X[:, 0, 0].astype(np.float32)), torch.from_numpy(X[:, 0, 0]).float()),
    "bytes": (pa.array(GREY[:, 0, 0]), torch.from_numpy(GREY[:, 0, 0])),
    "flags": (pa.array(X[:, 0, 0] > 0), torch.from_numpy(X[:, 0, 0] > 0)),
    "lists": (pa.array(X.tolist()), torch.from_numpy(X)),
    "fixed": (
        pa.FixedSizeListArray.from_arrays(X[:, 0].ravel(), 3),
        torch.from_numpy(X[:, 0]),
    ),
    "tensors": (pa.FixedShapeTensorArray.from_numpy_ndarray(X), torch.from_numpy(X)),
    "grey": (pa.array([png(image) for image in GREY]), torch.from_numpy(GREY)),
    "colour": (
        pa.array([{"bytes": png(image), "path": None} for image in COLOUR]),
        torch.from_numpy(COLOUR).movedim(-1, 1),
    ),
}


def written(path, name="numbers", x=None, rows=slice(None)):
    """Write a table in parts of five rows, with a third column that nobody reads."""
    x = COLUMNS[name][0] if x is None else x
    table = pa.table({"x": x, "text": ["…"] * len(x), "y": np.arange(len(x))})
    table = table.take(np.arange(len(x))[rows])
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=5)
    elif path.suffix == ".feather":
        feather.write_feather(table, str(path), chunksize=5)
    else:
        with ipc.new_file(str(path), table.schema) as file:
            file.write_table(table, max_chunksize=5)
    return path


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "feather"])
@pytest.mark.parametrize("name", COLUMNS)
def test_rows_of_a_column(name, suffix, tmp_path):
    read = data.table(written(tmp_path / f"it.{suffix}", name), "x", "y")
    x = COLUMNS[name][1]
    assert tree.diff(list(read(ROWS)), [x[ROWS], ROWS]) == []
    none = read(ROWS[:0])
    assert tree.diff(list(none), [x[:0], ROWS[:0]]) == []


def test_a_folder_is_one_table_and_streams_like_tensors(tmp_path):
    written(tmp_path / "a.parquet", "lists", rows=slice(12))
    written(tmp_path / "b.arrow", "lists", rows=slice(12, None))
    (tmp_path / "README.md").write_text("not a table")
    read = data.table(str(tmp_path), "x", "y")
    points = data.Dataset(torch.from_numpy(X), torch.arange(N))
    for indices in (data.epoch_indices(random.key(0), N, 4), data.sequential_indices(N, 4)):
        got, expected = (list(data.stream(source, indices, 2)) for source in (read, points))
        assert tree.diff(got, expected) == []


def test_neighbouring_rows_read_a_part_once(tmp_path, monkeypatch):
    read, parts = data.table(written(tmp_path / "it.parquet"), "x", "y"), []
    whole = parquet.ParquetFile.read_row_group

    def counted(self, i, columns):
        parts.append((i, columns))
        return whole(self, i, columns=columns)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", counted)
    list(data.stream(read, data.sequential_indices(N, 1), 2))
    assert parts == [(i, ["x", "y"]) for i in range(5)]


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (["a"] * N, TypeError, r"column 'x' of .*it\.parquet must hold numbers.*, got string"),
        ([1.0, None] * 12, ValueError, "must hold no nulls, got 2"),
        ([[1.0], [None]] * 12, ValueError, "must hold no nulls"),
        ([[1.0], [1.0, 2.0]] * 12, ValueError, r"must hold lists of one length, got \[1, 2\]"),
        ([b"no image"] * N, ValueError, "must hold PNG, JPEG or WebP images"),
        ([png(GREY[0]), png(GREY[0, :2])] * 12, ValueError, "of 8 bits, of one size"),
        ([png(GREY[0].astype(np.uint16))] * N, ValueError, "more than 8 bits, mode I;16"),
    ],
)
def test_columns_that_make_no_tensor_are_named(x, error, message, tmp_path):
    read = data.table(written(tmp_path / "it.parquet", x=pa.array(x)), "x", "y")
    with pytest.raises(error, match=message):
        read(ROWS)


def test_files_of_a_folder_have_columns_of_one_type(tmp_path):
    written(tmp_path / "a.parquet")
    path = written(tmp_path / "b.parquet", x=pa.array(range(7))).rename(tmp_path / "B.PARQUET")
    assert data.table(path, "x", "y")(torch.tensor([6]))[0] == 6
    with pytest.raises(ValueError, match=r"'x' .* one type .* int64 in .*B.*float in .*a\.parq"):
        data.table(tmp_path, "x", "y")


def test_errors_of_files_name_them(tmp_path, monkeypatch):
    path = written(tmp_path / "it.parquet")
    for row in (-1, N):
        with pytest.raises(ValueError, match=f"rows must be from 0 to 22, got {row} to {row}"):
            data.table(path, "x", "y")(torch.tensor([row]))
    with pytest.raises(ValueError, match=r"it\.parquet has no column 'z'; it has x, text, y"):
        data.table(path, "x", "z")
    with pytest.raises(FileNotFoundError, match=r"expected \.parquet, .* files, got none at"):
        data.table(tmp_path / "none.parquet", "x", "y")
    with pytest.raises(ValueError, match="there are no rows in"):
        data.table(written(tmp_path / "empty.arrow", rows=slice(0)), "x", "y")
    for suffix in ("parquet", "arrow"):
        (damaged := tmp_path / f"damaged.{suffix}").write_bytes(b"no table")
        with pytest.raises(ValueError, match=r"a file of .*damaged.* is damaged"):
            data.table(damaged, "x", "y")

    (tmp_path / "it.csv").write_text("x,y")
    with pytest.raises(FileNotFoundError, match=r"files, got another file at .*it\.csv"):
        data.table(tmp_path / "it.csv", "x", "y")
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["x", "x"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match=r"twice\.parquet has 2 columns 'x'; it has x, x"):
        data.table(tmp_path / "twice.parquet", "x", "x")

    def no_pyarrow(name, *args):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", no_pyarrow)
    with pytest.raises(ImportError, match=r"it\.parquet needs pyarrow; `pip install 'fdl\[parq"):
        data.table(path, "x", "y")
