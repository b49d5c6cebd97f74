"""How a job is done. It reads what it needs from the store and leaves there what it makes, whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from recall_merge.bench.jobs import (
    Anchor,
    Job,
    Merged,
    Model,
    OwnStatistics,
    Question,
    Scores,
    StatisticsJob,
    Store,
    Trained,
    base_of,
    cost_of,
)
from recall_merge.continual.steps import merge_models, score_model, take_own_statistics, take_statistics
from recall_merge.evaluation.tasks import TaskSpec
from recall_merge.files.rows import Row
from recall_merge.files.statistics import open_statistics
from recall_merge.merging.merge import merge_in_memory
from recall_merge.merging.plan import make_plan
from recall_merge.merging.run import MergeRun
from recall_merge.models.load import build_model, load_model, load_tokenizer, load_trainable, placed
from recall_merge.models.tokens import encode_rows, template_of
from recall_merge.runtime import memory
from recall_merge.runtime.device import find_device
from recall_merge.runtime.progress import Progress
from recall_merge.training.fine_tuning import train


def run_job(job: Job, store: Store, progress: Progress | None = None) -> float:
    """Do a job whose needs are done, and note what it took.    -> seconds"""
    start, cost = time.monotonic(), cost_of(job)
    memory.restart_peak()
    store.keep_base(base_of(job))  # the base may have changed since the job before, or during this one
    match job:
        case Trained():
            _train(job, store, progress)
        case Anchor():
            _anchor(job, store)
        case StatisticsJob(model=model):
            samples = _samples(job.samples, model.rows, store)
            experts = [{"name": "expert", "path": str(store.path_of(model)), "same_base": True}]
            run = {"base": str(store.folder_of(model.base)), "experts": experts, "samples": samples}
            run |= {"seed": model.settings.seed, "threads": 1, "device": base_of(job).device}
            take_statistics(MergeRun.model_validate(run), store.path_of(job), gradients=job.gradients, progress=progress)
        case OwnStatistics(model=base):
            take_own_statistics(base.folder, store.path_of(job), seed=job.seed, device=base.device, progress=progress)
        case Merged():
            run = make_run(job, store)
            out = run.out.model_copy(update={"path": store.path_of(job), "overwrite": True})
            merge_models(run.model_copy(update={"out": out}), progress=progress)
        case Scores():
            missing = store.missing(job)
            cost = cost_of(replace(job, questions=tuple(missing))) if missing else 0.0
            _score(job, missing, store, progress)
    seconds = time.monotonic() - start
    store.keep_base(base_of(job))
    note = {"kind": job.kind, "label": job.label, "cost": cost, "seconds": round(seconds, 2)}
    store.write("notes", job.key, note | ({"peak_bytes": peak} if (peak := memory.peak()) else {}))
    return seconds


def _samples(settings: Mapping[str, Any], rows: Sequence[Row], store: Store) -> dict[str, Any]:
    """Rows of the store as a run's samples."""
    return {**settings, "path": str(store.keep_rows(rows)), "template": template_of(rows, settings["template"])}


def make_run(merged: Merged, store: Store) -> MergeRun:
    """The run of a merge whose models, rows and statistics lie in the store."""
    statistics = {name: str(store.path_of(job)) for name, job in merged.statistics}
    experts = [
        {"name": name, "path": str(store.folder_of(model)), "same_base": True, "stats": statistics.get(name)}
        for name, model in merged.experts
    ]
    run = {**merged.run, "base": str(store.folder_of(merged.base)), "experts": experts, "threads": 1}
    run["device"] = base_of(merged).device
    if merged.samples:
        run["samples"] = _samples(run["samples"], merged.samples, store)
    return MergeRun.model_validate(run)


def _train(job: Trained, store: Store, progress: Progress | None) -> None:
    callbacks: list[Any] = []
    if job.anchor is not None:
        from recall_merge.training.ewc import Consolidation, load_anchor

        callbacks.append(Consolidation(load_anchor(store.path_of(job.anchor)), job.strength))
    if job.apart:
        from recall_merge.training.o_lora import Orthogonality

        callbacks.append(Orthogonality([store.path_of(model) for model in job.apart], job.strength))
    start = store.path_of(job.start) if job.start is not None else None
    base = store.folder_of(job.base)
    options: dict[str, Any] = {"init_from": start, "callbacks": callbacks, "progress": progress, "allowed": job.settings.arguments}
    options["earlier"] = {task: open_statistics(store.path_of(statistics)) for task, statistics in job.earlier}
    train(base, job.rows, store.path_of(job), job.settings, device=base_of(job).device, overwrite=True, **options)


def _anchor(job: Anchor, store: Store) -> None:
    from recall_merge.training.ewc import anchored, fisher, load_anchor, save_anchor, values_of

    base, settings = store.folder_of(job.model.base), job.model.settings
    model = load_trainable(store.path_of(job.model), base, dtype=settings.dtype).to(base_of(job).device)
    rows = [(row.input_ids, row.labels) for row in encode_rows(job.rows, load_tokenizer(base), **settings.encoding)]
    before = load_anchor(store.path_of(job.before)) if job.before is not None else None
    save_anchor(anchored(fisher(model, rows), values_of(model), before), store.path_of(job))


def _score(job: Scores, missing: Sequence[Question], store: Store, progress: Progress | None) -> None:
    first, questions = job.questions[0], {question.task: question for question in missing}
    load = partial(_load, job.model, store, first.dtype, progress)
    specs = [TaskSpec(question.task, question.rows, question.metric) for question in missing]
    options: dict[str, Any] = {"batch_size": first.batch_size, "template": first.template, "progress": progress}

    def keep(task: str, score: Mapping[str, Any]) -> None:
        store.keep_base(base_of(job))  # before each, since a score that is kept is not asked for again
        store.write("scores", job.score_key(questions[task]), score)

    score_model(load, specs, keep, **options)


def _load(model: Model, store: Store, dtype: str, progress: Progress | None) -> tuple[Any, Any]:
    """A model as it is scored, on the bench's device, and its tokenizer. Merges that are not written are made in memory, in float32."""
    device = base_of(model).device
    if not isinstance(model, Merged) or store.is_done(model):
        base = store.folder_of(model.base) if isinstance(model, Trained) else None
        return load_model(store.folder_of(model), base, device=device, dtype=dtype)
    plan = make_plan(make_run(model, store), writes=False)
    start = time.monotonic()
    tensors, _ = merge_in_memory(plan, progress)
    store.write("merges", model.key, {"seconds": round(time.monotonic() - start, 2)})
    base = store.folder_of(model.base)
    merged = placed(partial(build_model, base, tensors, dtype=dtype), find_device(device))
    merged.name_or_path = str(store.path_of(model))
    return merged, load_tokenizer(base)
