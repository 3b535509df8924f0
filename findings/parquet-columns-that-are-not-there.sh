#!/usr/bin/env bash
# pyarrow 26.0.1: asked for columns that a Parquet file does not have, ParquetFile.iter_batches yields
# batches without columns and with the right number of rows, where read_table raises. Who checks only the
# count of rows trains on nothing. Compare the names with ParquetFile.schema_arrow.names first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pyarrow==26.0.1
cat >"$folder/find.py" <<'PYTHON'
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "train.parquet")
    pq.write_table(pa.table({"pixels": [1, 2, 3], "class": [0, 1, 2]}), path)
    batches = list(pq.ParquetFile(path).iter_batches(columns=["image", "label"]))
    print("iter_batches:", [(batch.num_rows, batch.to_pydict()) for batch in batches])
    assert [(batch.num_rows, batch.num_columns) for batch in batches] == [(3, 0)], "pyarrow has changed"
    try:
        table = pq.read_table(path, columns=["image", "label"])
        print("read_table: ", table.num_rows, "rows,", table.num_columns, "columns")
        raised = False
    except Exception as error:
        print("read_table: ", type(error).__name__)
        raised = True
    assert raised, "pyarrow has changed"
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/find.py"
