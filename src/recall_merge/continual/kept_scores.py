"""The scores of a stage with their items, as its file keeps them."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from recall_merge.continual.state import Stage, found_path
from recall_merge.evaluation.scores import TaskScore
from recall_merge.maths.metrics import is_score
from recall_merge.runtime.errors import WorkspaceError
from recall_merge.runtime.sealed import read_sealed


def read_scores(folder: Path, stage: Stage) -> dict[str, Any]:
    """The scores of a stage with their items, by role and task. Raises WorkspaceError where they are damaged."""
    path, plain = found_path(folder, stage.scores.file), stage.scores.model_dump(exclude={"file"})
    scores = read_sealed(path).get("scores")
    with suppress(ValidationError):
        # subtle: from JSON, strict types take objects for dataclasses
        checked = TypeAdapter(dict[str, dict[str, TaskScore]]).validate_json(json.dumps(scores), strict=True)
        each = [score for tasks in checked.values() for score in tasks.values()]
        numbers = [number for score in each for number in (score.score, score.stderr, *(item.score for item in score.items))]
        whole = all(tasks.keys() <= checked.get(role, {}).keys() for role, tasks in plain.items())
        if whole and all(number is None or is_score(number) for number in numbers):
            return cast("dict[str, Any]", scores)
    raise WorkspaceError(f"the scores of stage {stage.id} are damaged", where=path, fix="put back the file that was there")
