"""The scores of one stage: models on tasks, kept one by one, so that a stop loses one task of one model at most."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recall_merge.continual.settings import Settings
from recall_merge.continual.state import key_of
from recall_merge.evaluation.evaluate import load_model
from recall_merge.evaluation.tasks import TaskSpec
from recall_merge.files.durable import write_whole
from recall_merge.files.record import versions
from recall_merge.runtime.progress import Progress

FORMAT = 1
Kept = dict[str, dict[str, dict[str, Any]]]  # role -> task -> score, with its items


@dataclass(frozen=True)
class Target:
    """A model to be scored, and on what."""

    role: str
    """base, before (the merge before), expert or merged."""
    folder: Path
    base: Path
    """What the folder is an adapter on, if it is one; a tokenizer comes from there where it has none of its own."""
    fingerprint: str
    tasks: tuple[str, ...]


def score(file: Path, targets: Sequence[Target], tasks: Sequence[TaskSpec], settings: Settings, key: str, progress: Progress) -> Kept:
    """The scores of all targets. `file` keeps them; what it holds under the same key is not asked again."""
    kept = _read(file, key) or {target.role: {} for target in targets}
    for target in targets:
        missing = [task for task in tasks if task.name in target.tasks and task.name not in kept[target.role]]
        if missing:
            _score_one(file, target, missing, settings, key, kept, progress)
    return kept


def scores_key(targets: Sequence[Target], hashes: dict[str, Any], settings: Settings) -> str:
    """All that scores depend on: models, tasks by their hashes and metrics, how they are asked, versions."""
    models = {target.role: [target.fingerprint, target.tasks] for target in targets}
    asked = settings.scoring.model_dump(mode="json", exclude={"batch_size"}) | {"template": settings.template}
    return key_of({"models": models, "tasks": hashes, "scoring": asked, "versions": versions()})


def read_scores(file: Path) -> Kept:
    """What the file of a stage's scores holds."""
    return json.loads(file.read_text("utf-8"))["scores"]


def _score_one(file: Path, target: Target, tasks: Sequence[TaskSpec], settings: Settings, key: str, kept: Kept, progress: Progress) -> None:
    from recall_merge.evaluation.scores import evaluate

    scoring = settings.scoring
    model, tokenizer = load_model(target.folder, target.base, device=scoring.device, dtype=scoring.dtype)
    for task in tasks:
        [found] = evaluate(
            model,
            [task],
            tokenizer=tokenizer,
            batch_size=scoring.batch_size,
            limit=scoring.limit,
            template=settings.template,
            progress=progress,
        )
        data = found.to_json()
        if not scoring.words:
            for item in data["items"]:
                item["prediction"] = ""
        kept[target.role][task.name] = data
        write_whole(file, json.dumps({"format": FORMAT, "key": key, "scores": kept}, ensure_ascii=False, indent=1) + "\n")


def _read(file: Path, key: str) -> Kept | None:
    try:
        data = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return data["scores"] if data.get("format") == FORMAT and data.get("key") == key else None
