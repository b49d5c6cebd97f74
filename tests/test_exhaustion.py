"""Small files that mean much: refused at once, in little memory."""

import gzip
import json
import shutil
import time

import pyarrow
import pytest
from pyarrow import parquet

from recall_merge.continual.state import read_journal
from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.files.resolved_config import resolved
from recall_merge.files.row_sources import read_template
from recall_merge.files.rows import MAX_ROWS, read_rows
from recall_merge.files.safetensors import MAX_HEADER
from recall_merge.models.load import load_config
from recall_merge.runtime.errors import CheckpointError, DataError
from tiny import edit_json


@pytest.fixture(autouse=True)
def quick():
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 30  # each of them took minutes, or all memory


def test_a_parquet_file_of_a_few_kilobytes_with_forty_million_rows(tmp_path):
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.nulls(40_000_000, pyarrow.int32()), pyarrow.array(["x"]))
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "rows.parquet", compression="zstd")
    assert (tmp_path / "rows.parquet").stat().st_size < 1_000_000
    with pytest.raises(DataError, match=f"there are more than {MAX_ROWS:,} rows"):
        read_rows(tmp_path / "rows.parquet")


def test_lines_without_end_from_a_packed_file(tmp_path, monkeypatch):
    monkeypatch.setattr("recall_merge.files.rows.MAX_ROWS", 1000)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wb") as file:
        file.write(b'{"text": "a"}\n' * 1001)
    with pytest.raises(DataError, match="there are more than 1,000 rows"):
        read_rows(tmp_path / "rows.jsonl.gz")


def test_a_header_of_99_megabytes(llama, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    length = 99_000_000
    with (base / "model.safetensors").open("r+b") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(8 + length)
    with pytest.raises(CheckpointError, match=f"the header is longer than {MAX_HEADER:,} bytes"):
        open_checkpoint(base)


@pytest.mark.parametrize("labels", [10**9, 1e9, "1000000000"])
def test_a_config_that_asks_for_a_thousand_million_labels(llama, tmp_path, labels):
    base = shutil.copytree(llama, tmp_path / "base")
    edit_json(base / "config.json", num_labels=labels)
    config = json.loads((base / "config.json").read_text())
    assert len((resolved(config) or {}).get("id2label", {})) < 10
    assert len(load_config(base).id2label) < 10


def test_journals_and_templates_have_a_bound(tmp_path):
    for name in ("journal.jsonl", "template.jinja"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(8_000_000_000)
    with pytest.raises(CheckpointError, match="longer than"):
        read_journal(tmp_path)
    with pytest.raises(DataError, match="longer than"):
        read_template(str(tmp_path / "template.jinja"))
    with pytest.raises(DataError, match="is not a file"):
        read_template("/dev/zero")
