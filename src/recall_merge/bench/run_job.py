"""How a job is done. Each function reads what it needs from the store and leaves there what it makes, whole or not at all."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from recall_merge.bench.jobs import Anchor, Job, Merged, Model, Scores, StatisticsJob, Store, Trained, full_run
from recall_merge.merging.run import MergeRun
from recall_merge.runtime.progress import Progress


def do(job: Job, store: Store, progress: Progress | None = None) -> float:
    """Do a job whose needs are done, and note what it took.    -> seconds"""
    start, done = time.monotonic(), job
    match job:
        case Trained():
            _train(job, store, progress)
        case Anchor():
            _anchor(job, store)
        case StatisticsJob():
            _statistics(job, store, progress)
        case Merged():
            _write(job, store, progress)
        case Scores():
            done = replace(job, questions=tuple(store.missing(job)))
            _score(done, store, progress)
    seconds = time.monotonic() - start
    store.note(job, done.cost, seconds)
    return seconds


def _train(job: Trained, store: Store, progress: Progress | None) -> None:
    from recall_merge.training.fine_tuning import train

    callbacks: list[Any] = []
    if job.anchor is not None:
        from recall_merge.training.ewc import Consolidation, load_anchor

        callbacks.append(Consolidation(load_anchor(store.place(job.anchor)), job.strength))
    train(
        store.where(job.base),
        job.rows,
        store.place(job),
        job.settings,
        init_from=store.place(job.start) if job.start is not None else None,
        overwrite=True,
        progress=progress,
        callbacks=callbacks,
    )


def _anchor(job: Anchor, store: Store) -> None:
    from recall_merge.models.load import load_tokenizer, load_trainable
    from recall_merge.models.tokens import encode_rows
    from recall_merge.training.ewc import anchored, fisher, load_anchor, save_anchor, values_of

    base, settings = store.where(job.model.base), job.model.settings
    model = load_trainable(store.place(job.model), base, dtype=settings.dtype)
    rows = [(row.input_ids, row.labels) for row in encode_rows(job.rows, load_tokenizer(base), **settings.encoding)]
    before = load_anchor(store.place(job.before)) if job.before is not None else None
    save_anchor(anchored(fisher(model, rows), values_of(model), before), store.place(job))


def _statistics(job: StatisticsJob, store: Store, progress: Progress | None) -> None:
    from recall_merge.merging.statistics import make_statistics

    model = job.model
    samples = {**job.samples, "path": str(store.keep_rows(model.rows))}
    expert = {"name": "expert", "path": str(store.place(model)), "same_base": True}
    run = {"base": str(store.where(model.base)), "experts": [expert], "samples": samples, "seed": model.settings.seed, "threads": 1}
    make_statistics(MergeRun.model_validate(run), folder=store.place(job), progress=progress)


def _write(job: Merged, store: Store, progress: Progress | None) -> None:
    from recall_merge.merging.merge import merge

    run = _run(job, store)
    out = run.out.model_copy(update={"path": store.place(job), "overwrite": True})
    merge(run.model_copy(update={"out": out}), progress=progress)


def _score(job: Scores, store: Store, progress: Progress | None) -> None:
    from recall_merge.evaluation.scores import evaluate
    from recall_merge.evaluation.tasks import TaskSpec

    if not job.questions:
        return
    first = job.questions[0]
    model, tokenizer = _load(job.model, store, first.dtype, progress)
    for question in job.questions:
        spec = TaskSpec(question.task, question.rows, question.metric)
        told = {"batch_size": question.batch_size, "template": question.template}
        (score,) = evaluate(model, [spec], tokenizer=tokenizer, progress=progress, **told)
        store.keep_score(job, question, score.to_json())


def _load(model: Model, store: Store, dtype: str, progress: Progress | None) -> tuple[Any, Any]:
    """A model as it is scored, and its tokenizer. Merges, and adapters on their bases, are put together in memory, in float32."""
    from recall_merge.files.adapter import is_adapter
    from recall_merge.models.load import build_model, load_tokenizer

    if isinstance(model, Trained) and is_adapter(store.place(model)):
        model = Merged(model.label, model.base, (("adapter", model),), {"method": "linear", "out": {"dtype": "float32"}})
    folder = store.where(model)
    if not isinstance(model, Merged) or folder.exists():
        return build_model(folder, dtype=dtype), load_tokenizer(folder)
    base = store.where(model.base)
    return build_model(base, _merged_tensors(model, store, progress), dtype=dtype), load_tokenizer(base)


def _merged_tensors(merged: Merged, store: Store, progress: Progress | None) -> dict[str, Any]:
    """The tensors of a merge."""
    from recall_merge.merging.merge import merge_in_memory
    from recall_merge.merging.plan import make_plan

    plan = make_plan(_run(merged, store), writes=False)
    start = time.monotonic()
    tensors, _ = merge_in_memory(plan, progress)
    store.note_merge(merged, time.monotonic() - start)
    return tensors


def _run(merged: Merged, store: Store) -> Any:
    folders = {name: store.where(model) for name, model in merged.experts}
    samples = store.keep_rows(merged.samples) if merged.samples else None
    statistics = {name: store.place(stats) for name, stats in merged.statistics}
    return full_run(merged, folders, store.where(merged.base), samples, statistics)
