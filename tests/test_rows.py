"""Rows of data: every file format and form of record; and a new one, which is one entry in a table."""

import csv
import json

import pytest

from recall_merge.evaluation.tasks import task_word
from recall_merge.files.rows import FORMATS, FORMS, Row, parse_rows, read_rows
from recall_merge.runtime.errors import DataError

RECORDS = [{"prompt": "is it good?", "completion": " yes", "choices": [" yes", " no"]}, {"prompt": "the fox", "completion": " jumps"}]
ROWS = [Row(0, (("user", "is it good?"),), " yes", (" yes", " no")), Row(1, (("user", "the fox"),), " jumps")]


def write_jsonl(path):
    path.write_text("\n\n".join(map(json.dumps, RECORDS)))


def write_json(path):
    path.write_text(json.dumps(RECORDS))


def write_parquet(path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)


WRITERS = {".jsonl": write_jsonl, ".json": write_json, ".parquet": write_parquet}


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_rows(suffix, tmp_path):
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path)
    assert read_rows(path) == ROWS
    assert task_word(str(path)) == ("rows", path)


def test_a_file_of_an_unknown_suffix_is_json_lines(tmp_path):
    write_jsonl(tmp_path / "rows.txt")
    assert read_rows(tmp_path / "rows.txt") == ROWS


def test_a_missing_file_is_refused_with_the_formats(tmp_path):
    for suffix in FORMATS:
        with pytest.raises(DataError, match=rf"^there is no such file\n.*\n  fix: .*: {', '.join(FORMATS)}$"):
            read_rows(tmp_path / f"none{suffix}")


def test_a_new_format_is_one_entry(tmp_path, monkeypatch):
    def read_csv(path):
        with path.open(newline="") as file:
            yield from csv.DictReader(file)

    monkeypatch.setitem(FORMATS, ".csv", read_csv)
    (tmp_path / "rows.csv").write_text("prompt,answer\nthe fox, jumps\n")
    assert read_rows(tmp_path / "rows.csv") == [Row(0, (("user", "the fox"),), " jumps")]
    assert task_word("none.csv")[1] is not None
    with pytest.raises(DataError, match=r"\.parquet, \.csv$"):
        read_rows(tmp_path / "none.csv")


EXAMPLES = {  # of each form: a record, its row, and a record that is faulty, with the fault
    "messages": (
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
        Row(0, (("system", "s"), ("user", "u")), "a"),
        ({"messages": [{"role": "user", "content": "u"}]}, "the last of `messages` must be the assistant's"),
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
    assert all(keys in found.fix for keys, _ in FORMS.values())


def test_an_instruction_without_input():
    assert parse_rows([{"instruction": "add", "output": "3"}], where="here")[0].plain == "add"


def test_a_record_of_no_form_and_none():
    with pytest.raises(DataError, match=r"none of the accepted forms; its fields are \['question'\]"):
        parse_rows([{"question": "q"}], where="here")
    with pytest.raises(DataError, match="there are no rows"):
        parse_rows([], where="here")
