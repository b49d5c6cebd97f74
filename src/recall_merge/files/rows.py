"""Rows of data: a file in one of `FORMATS`, a folder of such files, or a `datasets` name; each record becomes a `Row` (`forms`).

To add a file format, write the function that reads it and enter it in the table at the end of this module.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import zlib
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from recall_merge.files.forms import FORMS, Row, Unfit, make_row
from recall_merge.runtime.errors import DataError, Fault
from recall_merge.runtime.paths import path_of

MAX_FAULTS = 20  # of one file; further ones are counted
MAX_LINE, MAX_LIST = 64_000_000, 1_000_000_000  # bytes of a line, and of a .json file, which is read at once
MAX_FILES = 100_000  # and folders, that a folder of rows is searched for them: a stranger's workspace may name the root of the disk
MAX_ROWS = 2_000_000  # of one source: a few megabytes of Parquet or gzip may mean any number
PIECE = 1 << 20
SPLITS = {"train", "test", "validation", "valid", "val", "dev", "eval"}  # words for splits in names of files
BLANK = object()
"""What a reader of lines yields for a line that holds no record, so that rows are counted as the file's lines are."""


def read_rows(
    source: str | Path, *, split: str = "train", config: str | None = None, columns: Mapping[str, str] | None = None
) -> list[Row]:
    """Read all rows of a file, a folder, or a `datasets` hub name.

    Args:
        split, config: of a folder or of a set on the hub.
        columns: the fields of a form and what the records call them, as {"prompt": "question"}.

    Raises DataError with every faulty row, its line number and the fix.
    """
    return parse_rows(read_records(source, split=split, config=config), where=str(source), columns=columns)


def parse_rows(records: Iterable[Any], *, where: str, columns: Mapping[str, str] | None = None) -> list[Row]:
    """Turn records into rows, collecting the faults of all of them."""
    rows: list[Row] = []
    faults: list[Fault] = []
    fix = f"give each row one of these forms: {'; '.join(form.words for form in FORMS.values())}"
    start = index = 0
    for record in records:
        if isinstance(record, Path):  # of a folder: what follows is from this file
            where, start = str(record), index
            continue
        if index >= MAX_ROWS:
            raise _too_many(where)
        try:
            if isinstance(record, DataError):
                faults += record.faults
            elif record is not BLANK:
                rows.append(make_row(index, record, columns))
        except (ValueError, TypeError) as error:
            faults.append(Fault(str(error), f"{where}, row {index - start + 1}", error.fix if isinstance(error, Unfit) else fix))
        index += 1
    if len(faults) > MAX_FAULTS:
        faults = [*faults[:MAX_FAULTS], Fault(f"... and {len(faults) - MAX_FAULTS} more faulty rows", where)]
    if faults:
        raise DataError(faults)
    if not rows:
        raise DataError("there are no rows", where=where, fix="give a file with at least one row")
    return rows


def unread_columns(rows: Iterable[Row]) -> list[str]:
    """What a plan says of columns that are not read, if there are any."""
    counts = Counter(name for row in rows for name in row.unread)
    return [f"columns of the rows that are not read: {', '.join(sorted(counts))}"] if counts else []


def is_file_of_rows(path: str | Path) -> bool:
    """Whether a name has the suffix of one of `FORMATS`, also with a further `.gz`."""
    return _format(Path(path)) in FORMATS


def is_local(source: str | Path) -> bool:
    """Whether a name is that of a file or folder, which may be missing; otherwise it may be one of a set on the hub."""
    return isinstance(source, Path) or is_file_of_rows(source) or source.startswith(("/", ".", "~"))


def read_records(source: str | Path, *, split: str = "train", config: str | None = None) -> Iterator[Any]:
    """The raw records of a file, a folder or a `datasets` name, in order; of a folder, each file's after its path.

    A file of an unknown suffix is read as JSON lines.
    """
    path = path_of(source)
    if path.is_dir():
        yield from _folder(path, split)
        return
    if is_local(source) or path.exists():
        if not path.is_file():
            raise DataError("there is no such file", where=path, fix=f"give the path of a file of rows: {', '.join(FORMATS)}")
        yield from FORMATS.get(_format(path), _json_lines)(path)
        return

    import datasets

    try:
        yield from datasets.load_dataset(str(source), config, split=split)
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


def _format(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def _folder(folder: Path, split: str) -> Iterator[Any]:
    """The records of a folder that `datasets` saved, or of all files of a split: those named after it, or after none."""
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        import datasets

        try:
            saved: Any = datasets.load_from_disk(str(folder))
            yield from saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        except Exception as error:  # as above
            raise DataError(f"`datasets` cannot read this folder: {error}", where=folder, fix="check the folder and `split`") from error
        return
    files = _files_below(folder)
    splits = {file: SPLITS.intersection(re.findall("[a-z]+", str(file.relative_to(folder)).lower())) for file in files}
    named = [file for file, words in splits.items() if split in words] or [file for file, words in splits.items() if not words]
    if not named:
        what = f"the folder has no file of rows of the split '{split}'"
        raise DataError(what, where=folder, fix=f"give one of its files, or `split`; files of rows are {', '.join(FORMATS)}")
    for file in named:
        yield file
        yield from read_records(file)


def _files_below(folder: Path) -> list[Path]:
    """The files of rows in a folder and below it."""

    def fail(error: OSError) -> None:
        raise error

    seen, found = 0, list[Path]()
    try:
        for place, folders, names in os.walk(folder, onerror=fail):
            found += [file for name in names if is_file_of_rows(file := Path(place, name)) and file.is_file()]
            seen += len(folders) + len(names)
            if seen > MAX_FILES:
                what = f"there are more than {MAX_FILES:,} files and folders below this folder"
                raise DataError(what, where=folder, fix="give the folder of the rows alone, or one of its files")
    except OSError as error:
        fix = "check the permissions of all that is below it"
        raise DataError(f"the folder cannot be read: {error.strerror or error}", where=error.filename or folder, fix=fix) from error
    return sorted(found)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file, unpacked where it is packed."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield cast(IO[bytes], file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"this is not a readable gzip file: {error}", where=path, fix="pack it again") from error
    except OSError as error:
        fix = "check the file's permissions, and its disk"
        raise DataError(f"the file cannot be read: {error.strerror or error}", where=path, fix=fix) from error


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text, without a byte order mark."""
    with _opened(path) as file:
        for number, line in enumerate(iter(partial(file.readline, MAX_LINE + 1), b""), start=1):
            where = f"{path}, line {number}"
            if len(line) > MAX_LINE:
                raise DataError(f"the line is longer than {MAX_LINE:,} bytes", where=where, fix="write one JSON object per line")
            yield _decoded(line.removeprefix(BOM_UTF8), where)  # of the file, or of one that was appended to it


def _json_lines(path: Path) -> Iterator[Any]:
    for number, line in enumerate(_lines(path), start=1):
        try:
            yield _json(line, f"{path}, line {number}") if line.strip() else BLANK
        except DataError as error:
            yield error


def _json_list(path: Path) -> Iterator[Any]:
    """The objects of one list; or, as `datasets` and pandas write them, one per line."""
    fix = "write one JSON object per line, in a .jsonl file"
    with _opened(path) as file:
        data = b"".join(islice(iter(partial(file.read, PIECE), b""), MAX_LIST // PIECE + 1)).removeprefix(BOM_UTF8)
    if len(data) > MAX_LIST:
        raise DataError(f"the file is longer than {MAX_LIST:,} bytes", where=path, fix=fix)
    if data.lstrip().startswith(b"{"):
        yield from _json_lines(path)
        return
    records = _json(_decoded(data, str(path)), str(path))
    if not isinstance(records, list):
        raise DataError("a .json file of rows must hold one list", where=path, fix=fix)
    yield from records


def _table(path: Path, delimiter: str) -> Iterator[Any]:
    """The records of a table in text, whose first line names the columns."""
    csv.field_size_limit(MAX_LINE)
    table = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    at = 0
    try:
        columns = next(table, [])
        if len(set(columns)) < len(columns):
            raise DataError("two columns have the same name", where=path, fix="rename one of them")
        for cells in table:
            yield from [BLANK] * (table.line_num - at - 1)  # the lines before, and those inside a cell
            at = table.line_num
            wrong = DataError(
                f"{len(cells)} cells for {len(columns)} columns", where=f"{path}, line {at}", fix="quote cells with a delimiter"
            )
            yield BLANK if not cells else wrong if len(cells) != len(columns) else dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"this is not a readable table: {error}", where=f"{path}, line {table.line_num}", fix="quote each cell") from error


def _too_many(where: object) -> DataError:
    return DataError(f"there are more than {MAX_ROWS:,} rows", where=where, fix="give a part of them: each is held in memory")


def _parquet(path: Path) -> Iterator[Any]:
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if file.metadata.num_rows > MAX_ROWS:
                raise _too_many(path)
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except DataError:
        raise
    except Exception as error:  # pyarrow raises its own tree; the message is what helps
        raise DataError(f"this is not a readable Parquet file: {error}", where=path) from error


def _decoded(text: bytes, where: str) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError("this is not UTF-8 text", where=where, fix="save the file as UTF-8") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"this is not JSON: {error}", where=where, fix="write one JSON object per line") from error


FORMATS: dict[str, Callable[[Path], Iterable[Any]]] = {
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".parquet": _parquet,
    ".csv": partial(_table, delimiter=","),
    ".tsv": partial(_table, delimiter="\t"),
}
"""File formats: a file's suffix, and the function that yields the file's records. Texts may be packed: `.jsonl.gz`."""
