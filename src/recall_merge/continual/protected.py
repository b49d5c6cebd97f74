"""How far an expert's training has moved the answers of the tasks before it, as its record tells."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from recall_merge.files.checkpoint import read_json
from recall_merge.files.record import RECORD
from recall_merge.runtime.errors import CheckpointError

Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Protected:
    """What `training/protection.py` records."""

    strength: Share
    moved: dict[str, list[Share | None]]
    """By task and layer, E|D x|^2 / E|W x|^2; None where nothing is trained."""
    answers: dict[str, Share] = field(default_factory=dict)
    """By task, the root of the mean over layers."""


def protected_by(expert: Path) -> Protected | None:
    """None for an expert whose training has protected nothing. Raises CheckpointError where its record is damaged."""
    record = expert / RECORD
    found = read_json(record).get("protection") if record.is_file() else None
    try:
        return found if found is None else TypeAdapter(Protected).validate_python(found)
    except ValidationError as error:
        what = "what the record tells of protection is damaged"
        raise CheckpointError(what, where=record, fix="put back the file that was there") from error
