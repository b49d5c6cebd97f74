"""The scores of one stage: models on tasks, kept one by one in the stage's file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from recall_merge.continual.keys import KeyedFile
from recall_merge.continual.settings import Settings
from recall_merge.continual.steps import score_model, scores_key
from recall_merge.evaluation.tasks import TaskSpec
from recall_merge.models.load import load_model
from recall_merge.runtime.progress import Progress

StageScores = dict[str, dict[str, dict[str, Any]]]  # role -> task -> score, with its items


@dataclass(frozen=True)
class Target:
    """A model to be scored, and on which tasks."""

    role: str
    """base, before (the merge before), expert or merged."""
    folder: Path
    base: Path
    """The base of the folder, if that holds an adapter; its tokenizer is used where the folder has none."""
    fingerprint: str
    tasks: tuple[str, ...]


def score_stage(
    file: Path, targets: Sequence[Target], tasks: Mapping[str, TaskSpec], hashes: Mapping[str, Any], settings: Settings, progress: Progress
) -> StageScores:
    """The scores of all targets. `file` keeps them; what it holds under the same key is not scored again.

    Args:
        hashes: what tells each task from others of its name.
    """
    scoring = settings.scoring
    asked = scoring.model_dump(mode="json", exclude={"batch_size"}) | {"template": settings.template}
    kept = KeyedFile(file, scores_key({target.role: [target.fingerprint, target.tasks] for target in targets}, hashes, asked))
    scores: StageScores = kept.content.setdefault("scores", {})

    def keep(role: str, task: str, score: dict[str, Any]) -> None:
        if not scoring.words:
            for item in score["items"]:
                item["prediction"] = ""
        scores[role][task] = score
        kept.write()

    for target in targets:
        done = scores.setdefault(target.role, {})
        missing = [tasks[name] for name in target.tasks if name not in done]
        load = partial(load_model, target.folder, target.base, device=scoring.device, dtype=scoring.dtype)
        options: dict[str, Any] = {"batch_size": scoring.batch_size, "limit": scoring.limit, "template": settings.template}
        score_model(load, missing, partial(keep, target.role), **options, progress=progress)
    return scores


def read_scores(file: Path) -> StageScores:
    """The scores in a stage's file."""
    return json.loads(file.read_text("utf-8"))["scores"]
