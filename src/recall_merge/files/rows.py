"""Data rows: JSON lines, Parquet or a `datasets` name, in any of the accepted forms, as one `Row` type."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recall_merge.runtime.errors import DataError, Fault

FORMS = "prompt + completion (+ choices), prompt + answer, instruction (+ input) + output, messages, or text"
MAX_FAULTS = 20  # of one file; the rest is counted
MAX_LINE, MAX_LIST = 64_000_000, 1_000_000_000  # bytes of a line, and of a .json file, which is read at once


@dataclass(frozen=True)
class Row:
    """One example. `prompt` is a conversation of (role, content) turns, empty for plain text; `completion` is the answer."""

    index: int
    """Position in its file, from 0."""
    prompt: tuple[tuple[str, str], ...]
    completion: str
    choices: tuple[str, ...] = ()

    @property
    def plain(self) -> str:
        """The prompt without roles, for models that have no chat template."""
        return "\n".join(content for _, content in self.prompt)


def read_rows(source: str | Path, *, split: str = "train") -> list[Row]:
    """Read all rows of a `.jsonl`, `.json` (a list) or `.parquet` file, or of a `datasets` hub name.

    Raises:
        DataError: with every faulty row of the file, its line number and the fix.
    """
    return parse_rows(read_records(source, split=split), where=str(source))


def parse_rows(records: Iterable[Any], *, where: str) -> list[Row]:
    """Turn records into rows, collecting the faults of all of them."""
    rows: list[Row] = []
    faults: list[Fault] = []
    for index, record in enumerate(records):
        try:
            rows.append(_row(index, record))
        except (ValueError, TypeError) as error:
            faults.append(Fault(str(error), f"{where}, row {index + 1}", f"give each row one of these forms: {FORMS}"))
    if len(faults) > MAX_FAULTS:
        faults = [*faults[:MAX_FAULTS], Fault(f"... and {len(faults) - MAX_FAULTS} more faulty rows", where)]
    if faults:
        raise DataError(faults)
    if not rows:
        raise DataError("there are no rows", where=where, fix="give a file with at least one row")
    return rows


def read_records(source: str | Path, *, split: str = "train") -> Iterator[Any]:
    """The raw records of a file or a `datasets` name, in order."""
    path = Path(source)
    if path.suffix in {".jsonl", ".json", ".parquet"} or path.exists():
        if not path.is_file():
            raise DataError("there is no such file", where=path, fix="give the path of a .jsonl, .json or .parquet file")
        if path.suffix == ".parquet":
            from pyarrow import parquet

            try:
                yield from parquet.read_table(path).to_pylist()
            except Exception as error:  # pyarrow raises its own tree; the message is what helps
                raise DataError(f"this is not a readable Parquet file: {error}", where=path) from error
        elif path.suffix == ".json":
            if path.stat().st_size > MAX_LIST:
                raise DataError(f"the file is longer than {MAX_LIST:,} bytes", where=path, fix="write one JSON object a line, and .jsonl")
            records = _json(path.read_bytes(), str(path))
            if not isinstance(records, list):
                raise DataError("a .json file of rows must hold one list", where=path, fix="use one JSON object a line, and .jsonl")
            yield from records
        else:
            with path.open("rb") as lines:
                for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), b""), start=1):
                    if len(line) > MAX_LINE:
                        what = f"the line is longer than {MAX_LINE:,} bytes"
                        raise DataError(what, where=f"{path}, line {number}", fix="write one JSON object a line")
                    if line.strip():
                        yield _json(line, f"{path}, line {number}")
        return

    import datasets

    try:
        yield from datasets.load_dataset(str(source), split=split)
    except Exception as error:  # datasets raises many kinds; all mean that the rows cannot be had
        raise DataError(
            f"no rows under this name: {error}", where=source, fix="give a file, or the name of a dataset on the hub"
        ) from error


def numbered(indices: Sequence[int], shown: int = 5) -> str:
    """Rows in words, by their numbers from 1; of many, the first.

    >>> numbered([0]), numbered([0, 3, 4], shown=2)
    ('row 1', 'rows 1, 4 and 1 more')
    """
    words = ", ".join(str(index + 1) for index in indices[:shown])
    more = f" and {len(indices) - shown} more" if len(indices) > shown else ""
    return f"row{'s' * (len(indices) > 1)} {words}{more}"


def _json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError("this is not UTF-8 text", where=where, fix="save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"this is not JSON: {error}", where=where, fix="write one JSON object a line") from error


def _row(index: int, record: Any) -> Row:
    if not isinstance(record, Mapping):
        raise ValueError(f"a row must be an object, this is {type(record).__name__}")
    if "messages" in record:
        turns = tuple((_text(turn, "role"), _text(turn, "content")) for turn in record["messages"])
        if not turns or turns[-1][0] != "assistant":
            raise ValueError("the last of `messages` must be the assistant's")
        return Row(index, turns[:-1], turns[-1][1])
    if "instruction" in record:
        extra = _text(record, "input") if record.get("input") else ""
        return Row(index, _user("\n".join(filter(None, [_text(record, "instruction"), extra]))), _text(record, "output"))
    if "prompt" in record:
        answer = "completion" if "completion" in record else "answer"
        given = record.get("choices") or []
        if not isinstance(given, list | tuple) or not all(isinstance(choice, str | int | float) for choice in given):
            raise ValueError("`choices` must be a list of texts")
        choices = tuple(str(choice) for choice in given)
        row = Row(index, _user(_text(record, "prompt")), _text(record, answer), choices)
        if choices and row.completion not in choices:
            raise ValueError(f"the {answer} {row.completion!r} is not among its choices {list(choices)}")
        return row
    if "text" in record:
        return Row(index, (), _text(record, "text"))
    raise ValueError(f"a row has none of the accepted forms; its fields are {sorted(map(str, record))}")


def _user(content: str) -> tuple[tuple[str, str], ...]:
    return (("user", content),)


def _text(record: Any, field: str) -> str:
    value = record.get(field) if isinstance(record, Mapping) else None
    if not isinstance(value, str):
        raise ValueError(f"field `{field}` must be text, it is {'missing' if value is None else type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"field `{field}` holds half of a character (a lone surrogate)") from None
    return value
