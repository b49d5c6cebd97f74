"""Rows of data: a file in one of `FORMATS`, or a `datasets` name, whose records each have one of `FORMS`, become `Row`s.

To add a file format or a form of record, write the function that reads it and enter it in the table at the end of this module.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recall_merge.runtime.errors import DataError, Fault

MAX_FAULTS = 20  # of one file; further ones are counted
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


Example = tuple[tuple[tuple[str, str], ...], str, tuple[str, ...]]  # prompt, completion and choices, as in `Row`


def read_rows(source: str | Path, *, split: str = "train") -> list[Row]:
    """Read all rows of a file, or of a `datasets` hub name. Raises DataError with every faulty row, its line number and the fix."""
    return parse_rows(read_records(source, split=split), where=str(source))


def parse_rows(records: Iterable[Any], *, where: str) -> list[Row]:
    """Turn records into rows, collecting the faults of all of them."""
    rows: list[Row] = []
    faults: list[Fault] = []
    fix = f"give each row one of these forms: {'; '.join(keys for keys, _ in FORMS.values())}"
    for index, record in enumerate(records):
        try:
            rows.append(Row(index, *_example(record)))
        except (ValueError, TypeError) as error:
            faults.append(Fault(str(error), f"{where}, row {index + 1}", fix))
    if len(faults) > MAX_FAULTS:
        faults = [*faults[:MAX_FAULTS], Fault(f"... and {len(faults) - MAX_FAULTS} more faulty rows", where)]
    if faults:
        raise DataError(faults)
    if not rows:
        raise DataError("there are no rows", where=where, fix="give a file with at least one row")
    return rows


def read_records(source: str | Path, *, split: str = "train") -> Iterator[Any]:
    """The raw records of a file or a `datasets` name, in order. A file of an unknown suffix is read as JSON lines."""
    path = Path(source)
    if path.suffix in FORMATS or path.exists():
        if not path.is_file():
            raise DataError("there is no such file", where=path, fix=f"give the path of a file of rows: {', '.join(FORMATS)}")
        yield from FORMATS.get(path.suffix, _json_lines)(path)
        return

    import datasets

    try:
        yield from datasets.load_dataset(str(source), split=split)
    except Exception as error:  # datasets raises many kinds; all mean that the rows cannot be had
        fix = "give a file, or the name of a dataset on the hub"
        raise DataError(f"no rows under this name: {error}", where=source, fix=fix) from error


def numbered(indices: Sequence[int], shown: int = 5) -> str:
    """Rows in words, by their numbers from 1; of many, the first.

    >>> numbered([0]), numbered([0, 3, 4], shown=2)
    ('row 1', 'rows 1, 4 and 1 more')
    """
    words = ", ".join(str(index + 1) for index in indices[:shown])
    more = f" and {len(indices) - shown} more" if len(indices) > shown else ""
    return f"row{'s' * (len(indices) > 1)} {words}{more}"


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), b""), start=1):
            if len(line) > MAX_LINE:
                what = f"the line is longer than {MAX_LINE:,} bytes"
                raise DataError(what, where=f"{path}, line {number}", fix="write one JSON object per line")
            if line.strip():
                yield _json(line, f"{path}, line {number}")


def _json_list(path: Path) -> list[Any]:
    fix = "write one JSON object per line, in a .jsonl file"
    if path.stat().st_size > MAX_LIST:
        raise DataError(f"the file is longer than {MAX_LIST:,} bytes", where=path, fix=fix)
    records = _json(path.read_bytes(), str(path))
    if not isinstance(records, list):
        raise DataError("a .json file of rows must hold one list", where=path, fix=fix)
    return records


def _parquet(path: Path) -> list[Any]:
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow raises its own tree; the message is what helps
        raise DataError(f"this is not a readable Parquet file: {error}", where=path) from error


def _json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError("this is not UTF-8 text", where=where, fix="save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"this is not JSON: {error}", where=where, fix="write one JSON object per line") from error


def _example(record: Any) -> Example:
    if not isinstance(record, Mapping):
        raise ValueError(f"a row must be an object, this is {type(record).__name__}")
    for key, (_, read) in FORMS.items():
        if key in record:
            return read(record)
    raise ValueError(f"a row has none of the accepted forms; its fields are {sorted(map(str, record))}")


def _messages(record: Mapping[str, Any]) -> Example:
    turns = tuple((_text(turn, "role"), _text(turn, "content")) for turn in record["messages"])
    if not turns or turns[-1][0] != "assistant":
        raise ValueError("the last of `messages` must be the assistant's")
    return turns[:-1], turns[-1][1], ()


def _instruction(record: Mapping[str, Any]) -> Example:
    parts = [_text(record, "instruction"), _text(record, "input") if record.get("input") else ""]
    return (("user", "\n".join(filter(None, parts))),), _text(record, "output"), ()


def _prompt(record: Mapping[str, Any]) -> Example:
    field = "completion" if "completion" in record else "answer"
    choices = record.get("choices") or []
    if not isinstance(choices, list | tuple) or not all(isinstance(choice, str | int | float) for choice in choices):
        raise ValueError("`choices` must be a list of texts")
    choices = tuple(map(str, choices))
    prompt, completion = (("user", _text(record, "prompt")),), _text(record, field)
    if choices and completion not in choices:
        raise ValueError(f"the {field} {completion!r} is not among its choices {list(choices)}")
    return prompt, completion, choices


def _text(record: Any, field: str) -> str:
    value = record.get(field) if isinstance(record, Mapping) else None
    if not isinstance(value, str):
        raise ValueError(f"field `{field}` must be text, it is {'missing' if value is None else type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"field `{field}` holds half of a character (a lone surrogate)") from None
    return value


FORMATS: dict[str, Callable[[Path], Iterable[Any]]] = {".jsonl": _json_lines, ".json": _json_list, ".parquet": _parquet}
"""File formats: a file's suffix, and the function that yields the file's records."""
FORMS: dict[str, tuple[str, Callable[[Mapping[str, Any]], Example]]] = {
    "messages": ("messages", _messages),
    "instruction": ("instruction (+ input) + output", _instruction),
    "prompt": ("prompt + completion or answer (+ choices)", _prompt),
    "text": ("text", lambda record: ((), _text(record, "text"), ())),
}
"""Forms of record: the key by which the form is recognised (the first one in the record decides), all its keys, and its function."""
