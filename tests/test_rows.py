"""Rows of data: every file format and form of record; and a new one, which is one entry in a table."""

import csv
import errno
import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from recall_merge.evaluation.tasks import task_word
from recall_merge.files import rows as rows_module
from recall_merge.files.rows import FORMATS, FORMS, Row, parse_rows, read_rows
from recall_merge.runtime.errors import DataError

RECORDS = [{"prompt": "is it good?", "completion": " yes", "choices": [" yes", " no"]}, {"prompt": "the fox", "completion": " jumps"}]
ROWS = [Row(0, (("user", "is it good?"),), " yes", (" yes", " no")), Row(1, (("user", "the fox"),), " jumps")]


def write_jsonl(path):
    path.write_text("\n".join(map(json.dumps, RECORDS)))


def write_json(path):
    path.write_text(json.dumps(RECORDS))


def write_parquet(path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)


def write_table(path):
    with path.open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        table.writerow(["prompt", "completion", "choices"])
        table.writerows([record["prompt"], record["completion"], json.dumps(record.get("choices", []))] for record in RECORDS)


WRITERS = {".jsonl": write_jsonl, ".json": write_json, ".parquet": write_parquet, ".csv": write_table, ".tsv": write_table}


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_rows(suffix, tmp_path):
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path)
    first = int(WRITERS[suffix] is write_table)  # the line of names
    assert read_rows(path) == [replace(row, index=row.index + first) for row in ROWS]
    assert task_word(str(path)) == ("rows", str(path))
    if suffix != ".parquet":
        packed = tmp_path / f"rows{suffix}.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        assert read_rows(packed) == read_rows(path)
        assert task_word(str(packed)) == ("rows", str(packed))


def test_rows_are_numbered_as_the_lines_of_their_file(tmp_path):
    good, bad = json.dumps(RECORDS[0]), json.dumps({"prompt": 3})
    (tmp_path / "rows.jsonl").write_text(f"\n{good}\n\n  \n{bad}\n{{\n{bad}\n")
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / "rows.jsonl")
    assert [fault.where.rpartition(", ")[2] for fault in caught.value.faults] == ["row 5", "line 6", "row 7"]  # all at once
    (tmp_path / "rows.csv").write_text('prompt,answer\n"two\nlines",a\n\n"b",\n"c",d,e\n')
    with pytest.raises(DataError, match=r"^3 cells for 2 columns\n  where: .*rows.csv, line 6\n"):
        read_rows(tmp_path / "rows.csv")
    (tmp_path / "rows.csv").write_text('prompt,answer\n"two\nlines",a\n\n"b",c\n')
    assert [(row.index + 1, row.plain, row.completion) for row in read_rows(tmp_path / "rows.csv")] == [
        (3, "two\nlines", "a"),
        (5, "b", "c"),
    ]


def test_lines_in_a_json_file_and_byte_order_marks(tmp_path):
    """As `datasets.Dataset.to_json` and pandas write `.json`, and Windows writes texts."""
    import datasets

    datasets.Dataset.from_list(RECORDS).to_json(tmp_path / "rows.json")
    assert read_rows(tmp_path / "rows.json") == ROWS
    for suffix in (".jsonl", ".json", ".csv"):
        WRITERS[suffix](tmp_path / f"plain{suffix}")
        (tmp_path / f"marked{suffix}").write_bytes(b"\xef\xbb\xbf" + (tmp_path / f"plain{suffix}").read_bytes())
        assert read_rows(tmp_path / f"marked{suffix}") == read_rows(tmp_path / f"plain{suffix}")


def test_a_folder_of_files_and_one_that_datasets_saved(tmp_path):
    import datasets

    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet")
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet")
    write_jsonl(tmp_path / "data" / "test.jsonl")
    assert [row.completion for row in read_rows(tmp_path)] == [" yes", " jumps"] * 2
    assert read_rows(tmp_path, split="test") == ROWS
    with pytest.raises(DataError, match="no file of rows of the split 'validation'"):
        read_rows(tmp_path, split="validation")
    (tmp_path / "data" / "test.csv").write_text("prompt,answer\na,\n")
    (tmp_path / "data" / "test.jsonl").write_text(json.dumps(RECORDS[0]) + '\n\n{"prompt": 3}\n')
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path, split="test")
    assert [fault.where for fault in caught.value.faults] == [f"{tmp_path}/data/test.jsonl, row 3"]
    saved = datasets.Dataset.from_list(RECORDS)
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "two"))
    assert read_rows(tmp_path / "one") == read_rows(tmp_path / "two") == ROWS
    with pytest.raises(DataError, match="`datasets` cannot read this folder"):
        read_rows(tmp_path / "two", split="test")


def test_a_set_on_the_hub_has_a_config_a_split_and_columns(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"question": "the fox", "answer": " jumps"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows("openai/gsm8k", split="test", config="main", columns={"prompt": "question", "completion": "answer"})
    assert [(row.plain, row.completion) for row in rows] == [("the fox", " jumps")]
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]


def test_a_folder_with_too_much_below_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "MAX_FILES", 3)
    (tmp_path / "train").mkdir()
    for name in "ab":
        (tmp_path / "train" / f"{name}.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert len(read_rows(tmp_path)) == 2
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match="there are more than 3 files and folders below this folder"):
        read_rows(tmp_path)


def test_a_folder_in_which_something_cannot_be_read_is_refused(tmp_path, monkeypatch):
    """As where a folder below it goes away meanwhile."""
    (tmp_path / "train").mkdir()
    real = os.scandir

    def scandir(path):
        if Path(path).name == "train":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match="the folder cannot be read: No such file or directory") as caught:
        read_rows(tmp_path)
    assert str(tmp_path / "train") in str(caught.value)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_file_that_cannot_be_read_is_told_as_such(name, tmp_path):
    """As from a broken disk: opening it works, reading does not."""
    (tmp_path / name).symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match="the file cannot be read: Input/output error") as caught:
        read_rows(tmp_path / name)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv.gz", "rows.json.gz"])
def test_a_damaged_gzip_file_is_refused(name, tmp_path):
    whole = gzip.compress(b"prompt,answer\na,b\n" * 1000)
    for data in (whole[:-20], b"prompt,answer", whole[:10] + b"\xff" * 30):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match="not a readable gzip file"):
            read_rows(tmp_path / name)


def test_a_file_of_an_unknown_suffix_is_json_lines(tmp_path):
    write_jsonl(tmp_path / "rows.txt")
    assert read_rows(tmp_path / "rows.txt") == ROWS


def test_a_missing_file_is_refused_with_the_formats(tmp_path):
    for suffix in FORMATS:
        with pytest.raises(DataError, match=rf"^there is no such file\n.*\n  fix: .*: {', '.join(FORMATS)}$"):
            read_rows(tmp_path / f"none{suffix}")


def test_a_new_format_is_one_entry(tmp_path, monkeypatch):
    def read_table(path):
        with path.open(newline="") as file:
            yield from csv.DictReader(file, delimiter="|")

    monkeypatch.setitem(FORMATS, ".psv", read_table)
    (tmp_path / "rows.psv").write_text("prompt|answer\nthe fox| jumps\n")
    assert read_rows(tmp_path / "rows.psv") == [Row(0, (("user", "the fox"),), " jumps")]
    assert task_word("none.psv")[1] is not None
    with pytest.raises(DataError, match=r"\.tsv, \.psv$"):
        read_rows(tmp_path / "none.psv")


EXAMPLES = {  # of each form: a record, its row, and a record that is faulty, with the fault
    "messages": (
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
        Row(0, (("system", "s"), ("user", "u")), "a"),
        ({"messages": [{"role": "user", "content": "u"}]}, "the last of the turns must be the assistant's"),
    ),
    "conversations": (
        {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
        Row(0, (("user", "u"),), "a"),
        ({"conversations": [{"from": "human"}]}, "field `content` must be text, it is missing"),
    ),
    "instruction": (
        {"instruction": "add", "input": "1 2", "output": "3"},
        Row(0, (("user", "add\n1 2"),), "3"),
        ({"instruction": "add"}, "field `output` must be text, it is missing"),
    ),
    "prompt": (
        {"prompt": "p", "answer": "b", "choices": ["a", "b"]},
        Row(0, (("user", "p"),), "b", ("a", "b")),
        ({"prompt": "p", "answer": "c", "choices": ["a", "b"]}, "the answer 'c' is not among its choices ['a', 'b']"),
    ),
    "text": ({"text": "t"}, Row(0, (), "t"), ({"text": 3}, "field `text` must be text, it is int")),
}


@pytest.mark.parametrize("key", FORMS)
def test_every_form(key):
    record, row, (faulty, fault) = EXAMPLES[key]
    assert parse_rows([record], where="here") == [row]
    with pytest.raises(DataError) as caught:
        parse_rows([record, faulty], where="here")
    [found] = caught.value.faults
    assert (found.what, found.where) == (fault, "here, row 2")
    assert all(form.words in found.fix for form in FORMS.values())


def test_an_instruction_without_input():
    assert parse_rows([{"instruction": "add", "output": "3"}], where="here")[0].plain == "add"


def test_a_record_of_no_form_and_none():
    with pytest.raises(DataError, match=r"none of the accepted forms; its fields are \['question'\]"):
        parse_rows([{"question": "q"}], where="here")
    with pytest.raises(DataError, match="there are no rows"):
        parse_rows([], where="here")


def test_a_report_reads_the_samples_by_the_same_columns(tmp_path):
    from recall_merge.report.words import sample_texts

    (tmp_path / "rows.csv").write_text("question,reply\nthe fox,jumps\nthe dog,sleeps\n")
    rows = read_rows(tmp_path / "rows.csv", columns={"prompt": "question", "completion": "reply"})
    assert sample_texts(rows, {2}) == {2: "the dog\nsleeps"}


def test_byte_order_marks_are_read(tmp_path):
    records = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    lines = [json.dumps(record) for record in records]
    texts = {"a.jsonl": "\n\ufeff".join(lines), "b.json": json.dumps(records), "c.csv": "prompt,completion\na,b\nc,d\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text("\ufeff" + text, "utf-8")
        assert [(row.plain, row.completion) for row in read_rows(tmp_path / name)] == [("a", "b"), ("c", "d")]
