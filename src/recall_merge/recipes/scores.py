"""The scores of one stage: models on tasks, kept one by one, so that a stop loses one task of one model at most."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recall_merge.files.durable import write_whole
from recall_merge.files.record import versions
from recall_merge.files.workspace import key_of
from recall_merge.models.tasks import TaskSpec
from recall_merge.progress import Progress
from recall_merge.recipes.settings import Settings

FORMAT = 1
Kept = dict[str, dict[str, dict[str, Any]]]  # role -> task -> score, with its items


@dataclass(frozen=True)
class Target:
    """A model to be scored, and on what."""

    role: str
    """base, before (the merge before), expert or merged."""
    folder: Path
    base: Path
    """What the folder is an adapter on, if it is one."""
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
    from recall_merge.models.evaluate import evaluate

    scoring = settings.scoring
    model, tokenizer = _load(target, settings)
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


def _load(target: Target, settings: Settings) -> tuple[Any, Any]:
    """A model, whole or an adapter on its base, and the tokenizer that goes with it."""
    import torch

    from recall_merge.files.adapter import is_adapter, open_adapter
    from recall_merge.files.checkpoint import open_checkpoint
    from recall_merge.files.experts import AdapterExpert, own_tensors
    from recall_merge.files.vocabulary import read_vocabulary
    from recall_merge.models.build import build_model, load_tokenizer

    device = settings.scoring.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = settings.scoring.dtype or ("float32" if device == "cpu" else "auto")
    tokenizer = load_tokenizer(target.folder if read_vocabulary(target.folder) is not None else target.base)
    if not is_adapter(target.folder):
        return build_model(target.folder, dtype=dtype).to(device), tokenizer
    base = open_checkpoint(target.base)
    expert = AdapterExpert(target.role, open_adapter(target.folder, base))
    tensors = own_tensors(expert, base, lambda _: True)
    model = build_model(target.base, tensors, dtype=dtype, vocabulary_size=len(tensors[base.embedding])).to(device)
    return model, tokenizer


def _read(file: Path, key: str) -> Kept | None:
    try:
        data = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return data["scores"] if data.get("format") == FORMAT and data.get("key") == key else None
