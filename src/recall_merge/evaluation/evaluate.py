"""Score any model folder on any tasks: files of rows, tasks that come with lm-eval, and the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_merge.evaluation.tasks import TaskSpec, check_tasks, task_word
from recall_merge.files.adapter import CONFIG, is_adapter
from recall_merge.files.checkpoint import open_checkpoint, read_json, weight_files
from recall_merge.files.hub import locate
from recall_merge.files.model_card import add_scores, read_model_card
from recall_merge.files.rows import read_rows
from recall_merge.models.load import load_model
from recall_merge.runtime.errors import CheckpointError, Faults, MissingExtra, RunError, did_you_mean
from recall_merge.runtime.open_executor import check_executor, open_executor
from recall_merge.runtime.parallel import cores
from recall_merge.runtime.progress import Progress

if TYPE_CHECKING:
    from recall_merge.evaluation.scores import TaskScore

PAPER = "paper:"  # before the name of a task of the paper's


def evaluate(
    model: str,
    tasks: Sequence[str],
    *,
    base: str | None = None,
    metrics: Mapping[str, str] | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    template: bool = True,
    executor: str = "local",
    card: bool = False,
    progress: Progress | None = None,
) -> list[TaskScore]:
    """The score of a model on each task, in the order of the tasks.

    Args:
        model: a whole model or an adapter: a folder, or a hub name.
        tasks: FILE, NAME=FILE, the name of a task that comes with lm-eval, or paper:NAME for one of the paper's five on the hub.
        base: what an adapter is on; by default what its config names.
        executor: `local`, `ray` or `ray://ADDRESS`, where each task is scored on a worker of its own; all nodes must find the model.
        metrics: task -> metric, where it is not to be the default.
        card: add the scores to the model card in the model's folder.

    Raises:
        RecallError: with every fault that can be found before the model is loaded.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise MissingExtra("eval", "scoring") from error
    from recall_merge.evaluation.scores import check_named

    check_executor(executor)
    faults, places = Faults(), []
    with faults.collect():
        places.append(_places(model, base))
        if card:
            _check_card(model, places[0][0])
    specs = read_tasks(tasks, metrics or {}, faults)
    faults.extend(check_tasks(specs))
    faults.extend(check_named(specs))
    faults.raise_any(RunError)
    loaded, asked = {"device": device, "dtype": dtype}, {"batch_size": batch_size, "limit": limit, "template": template}
    scores = _all_scores(places[0], specs, loaded, asked, executor, progress)
    if card:
        add_scores(places[0][0], Path(model).absolute().resolve().name, list(map(asdict, scores)))
    return scores


def _check_card(model: str, folder: Path) -> None:
    """There must be a card, and it must be the user's own."""
    if not Path(model).exists():
        raise RunError("scores are not added to the card of a hub model", where=model, fix="leave out --card, or give a folder")
    read_model_card(folder)


def _all_scores(
    place: tuple[Path, Path | None],
    specs: Sequence[TaskSpec],
    loaded: Mapping[str, Any],
    asked: Mapping[str, Any],
    executor: str,
    progress: Progress | None,
) -> list[TaskScore]:
    if executor == "local":
        return _score(place, specs, loaded, asked, progress)
    memory = 2 * 4 * sum(stored.spec.numel for stored in open_checkpoint(place[1] or place[0]).tensors.values())
    with open_executor(executor, cores()) as workers:
        futures = [workers.submit(f"scores on {spec.name}", _score, place, [spec], loaded, asked, memory=memory) for spec in specs]
        return [score for future in futures for score in future.result()]


def _score(
    place: tuple[Path, Path | None],
    specs: Sequence[TaskSpec],
    loaded: Mapping[str, Any],
    asked: Mapping[str, Any],
    progress: Progress | None = None,
) -> list[TaskScore]:
    """Load a model, and ask it."""
    from recall_merge.evaluation.scores import evaluate as score

    built, tokenizer = load_model(*place, **loaded)
    return score(built, specs, tokenizer=tokenizer, progress=progress, **asked)


def read_tasks(words: Sequence[str], metrics: Mapping[str, str], faults: Faults) -> list[TaskSpec]:
    """Tasks with their rows, adding to the faults what cannot be read."""
    specs = []
    for word in words:
        name, file = task_word(word)
        with faults.collect():
            specs.append(_read_task(name, file, metrics.get(name)))
    if not words:
        faults.add("there is no task", fix="give --tasks FILE,NAME=FILE,NAME")
    names = [task_word(word)[0] for word in words]
    for name in metrics:
        if name not in names:
            faults.add(f"a metric is given for '{name}', which is none of the tasks", fix=did_you_mean(name, names))
    return specs


def _read_task(name: str, file: Path | None, metric: str | None) -> TaskSpec:
    if file is None and name.startswith(PAPER):
        from recall_merge.evaluation.paper_tasks import load_hub_task

        task = load_hub_task(name.removeprefix(PAPER))
        return replace(task, name=name, metric=metric or task.metric)
    return TaskSpec(name, None if file is None else read_rows(file), metric)


def _places(model: str, base: str | None) -> tuple[Path, Path | None]:
    """The folder of a model, and of what it is an adapter on."""
    folder = locate(model).folder
    if not is_adapter(folder):
        if base is not None:
            raise RunError("a base is given, but the model is no adapter", where=folder, fix="leave out --base")
        read_json(folder / "config.json")
        weight_files(folder, [path.name for path in folder.iterdir()], folder)
        return folder, None
    named = base or read_json(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise CheckpointError("the adapter does not say what it is on", where=folder, fix="give --base MODEL")
    return folder, locate(named).folder
