"""How a cell is done. Each function reads what it needs from the store and leaves there what it makes, whole or not at all."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from recall_merge.bench.jobs import Anchor, Carded, Cell, Merged, Model, Scores, Store, Trained, full_run
from recall_merge.merging.run import MergeRun
from recall_merge.runtime.progress import Progress


def do(cell: Cell, store: Store, progress: Progress | None = None) -> float:
    """Do a cell whose needs are done, and note what it took.    -> seconds"""
    start, done = time.monotonic(), cell
    match cell:
        case Trained():
            _train(cell, store, progress)
        case Anchor():
            _anchor(cell, store)
        case Carded():
            _card(cell, store, progress)
        case Merged():
            _write(cell, store, progress)
        case Scores():
            done = replace(cell, questions=tuple(store.missing(cell)))
            _score(done, store, progress)
    seconds = time.monotonic() - start
    store.note(cell, done.cost, seconds)
    return seconds


def _train(cell: Trained, store: Store, progress: Progress | None) -> None:
    from recall_merge.training.fine_tuning import train

    callbacks: list[Any] = []
    if cell.anchor is not None:
        from recall_merge.training.ewc import Consolidation, load_anchor

        callbacks.append(Consolidation(load_anchor(store.place(cell.anchor)), cell.strength))
    train(
        store.where(cell.base),
        cell.rows,
        store.place(cell),
        cell.settings,
        init_from=store.place(cell.start) if cell.start is not None else None,
        overwrite=True,
        progress=progress,
        callbacks=callbacks,
    )


def _anchor(cell: Anchor, store: Store) -> None:
    from recall_merge.models.load import load_tokenizer
    from recall_merge.training.ewc import anchored, fisher, load_anchor, save_anchor, trained_model, values_of
    from recall_merge.training.fine_tuning import encode_rows

    base, settings = store.where(cell.model.base), cell.model.settings
    model = trained_model(base, store.place(cell.model), settings.dtype)
    rows = [(row.input_ids, row.labels) for row in encode_rows(cell.rows, load_tokenizer(base), settings)]
    before = load_anchor(store.place(cell.before)) if cell.before is not None else None
    save_anchor(anchored(fisher(model, rows), values_of(model), before), store.place(cell))


def _card(cell: Carded, store: Store, progress: Progress | None) -> None:
    from recall_merge.merging.statistics import make_card

    model = cell.model
    samples = {**cell.samples, "path": str(store.keep_rows(model.rows))}
    expert = {"name": "expert", "path": str(store.place(model)), "same_base": True}
    run = {"base": str(store.where(model.base)), "experts": [expert], "samples": samples, "seed": model.settings.seed, "threads": 1}
    make_card(MergeRun.model_validate(run), folder=store.place(cell), progress=progress)


def _write(cell: Merged, store: Store, progress: Progress | None) -> None:
    from recall_merge.merging.merge import merge

    run = _run(cell, store)
    out = run.out.model_copy(update={"path": store.place(cell), "overwrite": True, "reload": False})
    merge(run.model_copy(update={"out": out}), progress=progress)


def _score(cell: Scores, store: Store, progress: Progress | None) -> None:
    from recall_merge.evaluation.scores import evaluate
    from recall_merge.evaluation.tasks import TaskSpec

    if not cell.questions:
        return
    first = cell.questions[0]
    model, tokenizer = _load(cell.model, store, first.dtype, progress)
    for question in cell.questions:
        spec = TaskSpec(question.task, question.rows, question.metric)
        told = {"batch_size": question.batch_size, "template": question.template}
        (score,) = evaluate(model, [spec], tokenizer=tokenizer, progress=progress, **told)
        store.keep_score(cell, question, score.to_json())


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
    return build_model(base, _fused(model, store, progress), dtype=dtype), load_tokenizer(base)


def _fused(merged: Merged, store: Store, progress: Progress | None) -> dict[str, Any]:
    """The tensors of a merge."""
    from recall_merge.files.experts import Digest
    from recall_merge.merging.plan import make_plan
    from recall_merge.merging.tensors import fuse
    from recall_merge.merging.weights import weigh

    plan = make_plan(_run(merged, store), writes=False)
    start = time.monotonic()
    tensors = dict(fuse(plan, weigh(plan, progress), Digest()))
    store.note_merge(merged, time.monotonic() - start)
    return tensors


def _run(merged: Merged, store: Store) -> Any:
    folders = {name: store.where(model) for name, model in merged.experts}
    samples = store.keep_rows(merged.samples) if merged.samples else None
    cards = {name: store.place(card) for name, card in merged.cards}
    return full_run(merged, folders, store.where(merged.base), samples, cards)
