"""Where rows are, how they are read, and what writes them as text, in one description for runs, workspaces, scores and benches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from recall_merge.files.hashing import hash_file
from recall_merge.files.rows import FORMATS, Row, is_local, numbered, read_rows
from recall_merge.runtime.errors import CheckpointError, DataError, RunError
from recall_merge.runtime.paths import exists, path_of
from recall_merge.runtime.safe_json import read_small
from recall_merge.runtime.safe_yaml import NotYaml, parse_yaml
from recall_merge.runtime.sections import Section, parse, read_mapping

S = TypeVar("S", bound="RowSource")


def read_template(given: bool | str | Path) -> bool | str:
    """Whether the model's chat template writes rows; or the text of another one, from a Jinja file. Raises DataError if there is none."""
    if isinstance(given, bool) or "{%" in str(given) or "{{" in str(given):
        return given if isinstance(given, bool) else str(given)
    try:
        text = read_small(path_of(given)).decode("utf-8")
    except (CheckpointError, OSError, ValueError) as error:
        fix = "`template` is true for the model's own, false for none, or a Jinja file"
        raise DataError(f"the chat template cannot be read: {error}", where=given, fix=fix) from error
    if "{" not in text:
        raise DataError("this file holds no chat template", where=given, fix="give a Jinja file that writes `messages`")
    return text


def _template(given: Any) -> Any:
    if not isinstance(given, bool | str | Path):
        raise PydanticCustomError("template", "the chat template is true, false or a Jinja file")
    try:
        return read_template(given)
    except DataError as error:  # a value of settings has its fault from pydantic
        fault = error.faults[0]
        raise PydanticCustomError("template", "{what}", {"what": fault.what, "fix": fault.fix}) from None


Template = Annotated[bool | str, BeforeValidator(_template)]
"""In settings: whether the model's chat template writes rows, or a Jinja file; settings, keys and records then hold its text."""


class RowSource(Section):
    """A file of rows, a folder of them, or a set on the hub; what its columns are called, and how its rows are written as text."""

    path: str = Field(min_length=1, description=f"rows: {', '.join(FORMATS)}, a folder of them, or a `datasets` name")
    split: str = Field("train", description="split, of a folder or a `datasets` name")
    config: str | None = Field(None, description="config, of a `datasets` name")
    columns: dict[str, str] | None = Field(None, description="what the rows call the fields that are read: `{prompt: question}`")
    system: str | None = Field(None, min_length=1, description="a system text for each row that has none of its own")
    template: Template | None = Field(
        None, description="what writes these rows: true for the model's chat template, false for none, or a Jinja file; by default as all"
    )

    @classmethod
    def of(cls, given: RowSource | Path | str, split: str = "train") -> RowSource:
        """A description of rows; or the one that a path or a name is, `{path: .., columns: ..}` as text, or a YAML file of these keys.

        `split` is that of a description without one. Raises RunError with every fault of it.
        """
        if isinstance(given, RowSource):
            return given
        where, data = str(given), {"path": str(given)}
        if where.startswith("{"):
            try:
                data = parse_yaml(where)
            except NotYaml as error:
                raise RunError(f"this is not readable YAML: {' '.join(str(error).split())}", where=where, fix="{path: FILE, ..}") from None
        elif where.endswith((".yaml", ".yml")):
            data = read_mapping(Path(where), "description of rows", "docs/run.md")
            there = {key: Path(where).parent / path_of(str(data[key])) for key in ("path", "template") if key in data}
            data |= {key: str(place) for key, place in there.items() if exists(place)}
        return parse(cls, _with_split(data, split), where=where)

    def under(self: S, folder: Path) -> S:
        """The same, its path being relative to a folder, unless it names a set on the hub."""
        there = folder / path_of(self.path)
        return self.model_copy(update={"path": str(there)}) if is_local(self.path) or exists(there) else self

    @property
    def is_missing(self) -> bool:
        return is_local(self.path) and not exists(path_of(self.path))

    def read(self) -> list[Row]:
        """All rows, each with what writes it. Raises DataError with every faulty one."""
        rows = read_rows(self.path, split=self.split, config=self.config, columns=self.columns)
        if self.system is not None:
            if plain := [row.index for row in rows if not row.prompt]:
                what, where = "rows of plain text have no turns that a system text could precede", f"{self.path}, {numbered(plain)}"
                raise DataError(what, where=where, fix="leave `system` out, or give rows of prompts and answers")
            rows = [row.under_system(self.system) for row in rows]
        return rows if self.template is None else [replace(row, template=self.template) for row in rows]

    def digest(self, rows: Sequence[Row] | None = None) -> str:
        """SHA-256 of a file; or of the rows of a folder or of a set on the hub, which are read if they are not given."""
        if path_of(self.path).is_file():
            return hash_file(path_of(self.path))
        content = [[row.index, row.prompt, row.completion, row.choices, row.details] for row in (self.read() if rows is None else rows)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _with_split(given: Any, split: str) -> Any:
    given = {"path": given} if isinstance(given, str) else given
    return {"split": split, **given} if isinstance(given, Mapping) else given


LearntRows = Annotated[RowSource, BeforeValidator(partial(_with_split, split="train"))]
ScoredRows = Annotated[RowSource, BeforeValidator(partial(_with_split, split="test"))]
"""Rows in a file of settings: a path, or the keys of a `RowSource`."""
