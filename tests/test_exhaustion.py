"""Small files that mean much: refused at once, in little memory."""

import gzip
import json
import shutil
import time

import pyarrow
import pytest
from pyarrow import parquet

from recall_merge import MergeRun, RecallError, compute_weights, make_plan, merge
from recall_merge.continual.state import read_journal
from recall_merge.evaluation.evaluate import evaluate
from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.files.resolved_config import resolved
from recall_merge.files.row_sources import read_template
from recall_merge.files.rows import MAX_ROWS, read_rows
from recall_merge.files.safetensors import MAX_HEADER
from recall_merge.merging.statistics import make_statistics
from recall_merge.models.architecture import empty_model
from recall_merge.models.load import build_model, load_config
from recall_merge.runtime.errors import CheckpointError, DataError
from recall_merge.training.fine_tuning import train
from recall_merge.training.settings import TrainSettings
from tiny import edit_json, fine_tuned, write_rows


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


COUNTS = [
    ("llama", "num_hidden_layers", 10**9),
    ("llama", "num_hidden_layers", 1e9),
    ("mixtral", "num_local_experts", 10**30),
    ("qwen3-moe", "num_experts", 10**9),
    ("gemma2", "num_hidden_layers", 10**9),
    ("gpt2", "num_hidden_layers", 10**9),  # beside a sound n_layer
    ("gpt2", "n_head", 10**9),
]


@pytest.mark.parametrize(("family", "key", "count"), COUNTS)
def test_a_config_that_asks_for_a_thousand_million_parts(bases, tmp_path, family, key, count):
    base = shutil.copytree(bases(family), tmp_path / "base")
    edit_json(base / "config.json", **{key: count})
    with pytest.raises(CheckpointError, match=f"the config says `{key}`: 1.*no model has so many"):
        load_config(base)
    assert resolved(json.loads((base / "config.json").read_text())) is None


def test_parts_within_parts(bases, tmp_path):
    base = shutil.copytree(bases("llama"), tmp_path / "base")
    edit_json(base / "config.json", model_type="llama4", text_config={"num_local_experts": 10**9})
    with pytest.raises(CheckpointError, match="`num_local_experts`"):
        load_config(base)


SIZES = [("llama", "head_dim", 10**9), ("llama", "hidden_size", 4 * 10**9), ("gpt2", "n_inner", 10**9), ("phi3", "hidden_size", 10**9)]


@pytest.mark.parametrize(("family", "key", "size"), SIZES)
def test_a_config_that_asks_for_tensors_of_gigabytes(bases, tmp_path, family, key, size):
    base = shutil.copytree(bases(family), tmp_path / "base")
    edit_json(base / "config.json", **{key: size})
    with pytest.raises(CheckpointError, match=r"the config asks for a tensor of .* numbers beside the weights"):
        empty_model(base)


def test_a_config_that_asks_for_very_many_parameters(llama, tmp_path, monkeypatch):
    base = shutil.copytree(llama, tmp_path / "base")
    monkeypatch.setattr("recall_merge.files.bounded.MAX_PARAMETERS", 100)
    edit_json(base / "config.json", num_hidden_layers=1000)
    for build in (empty_model, build_model):
        with pytest.raises(CheckpointError, match="the config asks for more than 100 parameters"):
            build(base)


@pytest.mark.parametrize("command", ["evaluate", "stats", "train", "reload", "weights", "losses"])
def test_a_forward_pass_that_fails_is_told_in_words(bases, tmp_path, command):
    base = shutil.copytree(bases("mixtral"), tmp_path / "base")
    fine_tuned(base, tmp_path / "expert", seed=1)
    for name in ("base", "expert"):
        edit_json(tmp_path / name / "config.json", num_experts_per_tok=10**9)
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"is the fox {word}?", "completion": " yes"} for word in ("quick", "lazy")])
    run = {"base": str(base), "experts": [{"name": "a", "path": str(tmp_path / "expert")}], "method": "linear"}
    run |= {"samples": {"path": str(rows), "count": 1}, "out": {"path": str(tmp_path / "out"), "reload": command == "reload"}}
    commands = {
        "evaluate": lambda: evaluate(str(base), [str(rows)]),
        "stats": lambda: make_statistics(MergeRun.model_validate(run)),
        "train": lambda: train(base, read_rows(rows), tmp_path / "out", TrainSettings(rank=2, targets=["q_proj"])),
        "reload": lambda: merge(run),
        "weights": lambda: compute_weights(make_plan(run | {"method": "recall"})),
        "losses": lambda: compute_weights(make_plan(run | {"weights": {"losses": {}}})),
    }
    with pytest.raises(RecallError, match="cannot be run: selected index k out of range"):
        commands[command]()
    assert not (tmp_path / "out").exists()


def test_a_number_of_positions_that_is_none_is_told_in_words(bases, tmp_path):
    base = shutil.copytree(bases("gpt2"), tmp_path / "base")
    edit_json(base / "config.json", max_position_embeddings=[10**9])  # beside a sound n_positions
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "is it?", "completion": " yes"}])
    with pytest.raises(CheckpointError, match="int\\(\\) argument"):
        evaluate(str(base), [str(rows)])


def test_a_window_that_texts_do_not_fit_is_told_in_words(llama, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    edit_json(base / "config.json", sliding_window=-1)
    for name, choices in (("choices", [" yes", " no"]), ("written", None)):
        rows = [{"prompt": f"is the fox {word}?", "completion": " yes", "choices": choices} for word in ("quick", "lazy")]
        with pytest.raises(RecallError, match="the model cannot be run"):
            evaluate(str(base), [str(write_rows(tmp_path / f"{name}.jsonl", rows))])


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
