"""The steps of continual learning, for workspaces, benches and the demo: train an expert, take its input statistics, merge, score.

Each step is done once. An artefact in its place is used again if it was made from the same bytes in the same way and is unchanged;
otherwise it is made anew. A step that was stopped is finished by the same call, with the result that it would have had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_merge.continual.keys import KeyedFile, fingerprint, key_of
from recall_merge.files.hashing import hash_file
from recall_merge.files.record import versions
from recall_merge.files.rows import Row
from recall_merge.merging.merge import MergeResult, merge, reuse
from recall_merge.merging.run import MergeRun
from recall_merge.merging.statistics import RANK, make_statistics
from recall_merge.report.merge_charts import draw_weights
from recall_merge.runtime.progress import Progress

if TYPE_CHECKING:
    from recall_merge.evaluation.tasks import TaskSpec
    from recall_merge.training.fine_tuning import TrainResult
    from recall_merge.training.settings import TrainSettings

KEY = "key.json"  # in the folder of an expert's statistics
SCORES_FORMAT = 2  # of the files that keep scores; part of their key


def train_expert(
    base: Path,
    rows: Sequence[Row],
    folder: Path,
    settings: TrainSettings,
    *,
    init_from: Path | None = None,
    callbacks: Sequence[Any] = (),
    progress: Progress | None = None,
) -> TrainResult:
    """Fine-tune a base on rows, or go on from the expert `init_from`. Another expert of ours in `folder` is replaced.

    Raises:
        RecallError: if settings, rows or models cannot be used, or something that is not ours lies in `folder`.
    """
    from recall_merge.training.fine_tuning import train

    return train(base, rows, folder, settings, init_from=init_from, overwrite=True, callbacks=callbacks, progress=progress)


def take_statistics(run: MergeRun, folder: Path, *, rank: int = RANK, progress: Progress | None = None) -> None:
    """Write the input statistics of the run's newest expert, on the run's samples, into `folder`.

    Raises:
        RecallError: with every fault of the run; or if the folder cannot be written to.
    """
    assert run.samples is not None, "statistics are taken from rows"
    facts: dict[str, Any] = {"rank": rank, "seed": run.seed, "samples": run.samples.model_dump(mode="json", exclude={"path"})}
    facts |= {"rows": hash_file(Path(run.samples.path)), "versions": versions()}
    facts |= {"base": fingerprint(Path(run.base)), "expert": fingerprint(Path(run.experts[-1].path))}
    made = KeyedFile(folder / KEY, key_of(facts))
    if not made.exists:
        (folder / KEY).unlink(missing_ok=True)  # subtle: statistics that a stop leaves half replaced belong to no key
        make_statistics(run, rank=rank, folder=folder, progress=progress)
        made.write()


def merge_models(run: MergeRun, *, progress: Progress | None = None) -> MergeResult:
    """Merge as the run says, into `run.out.path`.

    Raises:
        RecallError: with every fault of the run and its files, before any work starts; or with what went wrong later.
    """
    return reuse(run) or merge(run, progress=progress, draw=draw_weights)


def scores_key(models: Mapping[str, Any], tasks: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """The key of scores: of each model its fingerprint, of each task its rows' hash and metric, and how models are asked."""
    return key_of({"format": SCORES_FORMAT, "models": models, "tasks": tasks, "asked": asked, "versions": versions()})


def score_model(
    load: Callable[[], tuple[Any, Any]],
    tasks: Sequence[TaskSpec],
    keep: Callable[[str, dict[str, Any]], None],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    template: bool = True,
    progress: Progress | None = None,
) -> None:
    """Score a model on tasks, one by one: a stop loses one task at most. Without tasks, the model is not loaded.

    Args:
        load: gives the model, and its tokenizer.
        tasks: those that are not scored yet.
        keep: called with a task's name and its score, items included, as soon as it is known.
        batch_size, limit, template: as for `evaluation.scores.score_tasks`.
    """
    if not tasks:
        return
    from recall_merge.evaluation.scores import score_tasks

    model, tokenizer = load()
    asked: dict[str, Any] = {"batch_size": batch_size, "limit": limit, "template": template}
    for task in tasks:
        [score] = score_tasks(model, tokenizer, [task], progress=progress, **asked)
        keep(task.name, score.to_json())
