"""Score any model folder on any tasks: files of rows, tasks that come with lm-eval, and the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from recall_merge.evaluation.gate import read_conditions
from recall_merge.evaluation.paper_tasks import load_hub_task
from recall_merge.evaluation.scores import Scores, TaskScore, check_lengths, score_tasks
from recall_merge.evaluation.tasks import TaskSpec, check_metrics, check_tasks, task_word
from recall_merge.files.adapter import CONFIG, is_adapter
from recall_merge.files.checkpoint import open_checkpoint, read_json, weight_files
from recall_merge.files.hub import locate
from recall_merge.files.model_card import MODEL_CARD, add_scores, read_model_card
from recall_merge.files.row_sources import RowSource, read_template
from recall_merge.models.load import load_model
from recall_merge.runtime.device import find_device
from recall_merge.runtime.errors import (
    CheckpointError,
    DataError,
    Faults,
    MissingExtra,
    OutputError,
    RecallError,
    RunError,
)
from recall_merge.runtime.executor import check_executor, device_of_tasks, open_executor
from recall_merge.runtime.parallel import cores
from recall_merge.runtime.progress import Progress

PAPER = "paper:"  # before the name of one of the paper's tasks


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
    template: bool | str | Path = True,
    executor: str = "local",
    card: bool = False,
    require: Sequence[str] = (),
    progress: Progress | None = None,
) -> Scores:
    """The score of a model on each task, in the order of the tasks.

    Args:
        model: a whole model or an adapter: a folder, or a hub name.
        tasks: ROWS, NAME=ROWS, the name of a task that comes with lm-eval, or paper:NAME for one of the paper's five on the hub. ROWS are
            a file, a folder, or what `RowSource.of` reads: `{path: openai/gsm8k, config: main, columns: {prompt: question}}`.
        template: apply the model's chat template if it has one; or that of a Jinja file.
        base: the base of an adapter; by default the one that its config names.
        device: as `find_device` takes it; a model that is too large for one accelerator is spread over all of them and the processor.
        executor: `local`, `ray` or `ray://ADDRESS`, where each task is scored by a worker of its own; all nodes must find the model.
        metrics: task -> metric, where it is not the default.
        card: add the scores to the model card in the model's folder.
        require: conditions on the scores, as `read_conditions` takes them, that are checked beforehand and left to the caller to decide.

    Raises:
        RecallError: with every fault that can be found before the model is loaded.
    """
    if find_spec("lm_eval") is None:
        raise MissingExtra("eval", "scoring")
    check_executor(executor)
    faults, folders = Faults(), (Path(), None)
    with faults.collect():
        device = device_of_tasks(executor, device)
        find_device(device)
    with faults.collect():
        folders = _find_model(model, base)
        if card:
            if not Path(model).exists():
                raise RunError("scores are not added to the card of a hub model", where=model, fix="leave out --card, or give a folder")
            read_model_card(folders[0])
    specs = _read_tasks(tasks, metrics or {}, faults)
    with faults.collect():
        read_conditions(require, [name for name, _ in map(task_word, tasks)], where="--require")
    template = faults.attempt(read_template, template) or False
    faults.extend(check_tasks(specs))
    faults.raise_any(RunError)
    check_lengths(folders[0], specs, base=folders[1], template=template).raise_any(DataError)
    score = partial(_load_and_score, folders, {"device": device, "dtype": dtype}, batch_size=batch_size, limit=limit, template=template)
    if executor == "local":
        scores = score(specs, progress=progress)
    else:
        memory = 2 * 4 * sum(stored.spec.numel for stored in open_checkpoint(folders[1] or folders[0]).tensors.values())
        with open_executor(executor, cores()) as workers:
            futures = [workers.submit(f"scores on {spec.name}", score, [spec], memory=memory) for spec in specs]
            scores = [score for future in futures for score in future.result()]
    if card:
        try:
            add_scores(folders[0], Path(model).absolute().resolve().name, list(map(asdict, scores)))
        except Exception as error:  # whatever went wrong with the card: the scores are not lost with it
            raise CardError(folders[0], scores, error) from error
    return Scores(scores)


class CardError(OutputError):
    """Scores that cannot be added to the model card; the error holds them."""

    def __init__(self, folder: Path, scores: Sequence[TaskScore], error: Exception) -> None:
        reason = error.faults[0].what if isinstance(error, RecallError) else str(error)
        told = ", ".join(f"{score.task} {score.metric} {score.score:.4f}" for score in scores)
        super().__init__(f"the scores cannot be added to the model card: {reason}", where=folder / MODEL_CARD, fix=f"they are: {told}")
        self.scores = list(scores)


def _load_and_score(
    folders: tuple[Path, Path | None], loading: Mapping[str, Any], specs: Sequence[TaskSpec], **options: Any
) -> list[TaskScore]:
    return score_tasks(*load_model(*folders, **loading), specs, **options)


def _read_tasks(words: Sequence[str], metrics: Mapping[str, str], faults: Faults) -> list[TaskSpec]:
    """Tasks with their rows. What cannot be read is added to the faults."""
    specs, names = [], []
    for word in words:
        name, file = task_word(word)
        names.append(name)
        with faults.collect():
            if file is None and name.startswith(PAPER):
                task = load_hub_task(name.removeprefix(PAPER))
                specs.append(replace(task, name=name, metric=metrics.get(name) or task.metric))
            else:
                specs.append(TaskSpec(name, None if file is None else RowSource.of(file, "test").read(), metrics.get(name)))
    if not words:
        faults.add("there is no task", fix="give --tasks FILE,NAME=FILE,NAME")
    faults.extend(check_metrics(metrics, names))
    return specs


def _find_model(model: str, base: str | None) -> tuple[Path, Path | None]:
    """The folder of a model, and that of its base if it is an adapter."""
    folder = locate(model).folder
    if not is_adapter(folder):
        if base is not None:
            raise RunError("a base is given, but the model is no adapter", where=folder, fix="leave out --base")
        read_json(folder / "config.json")
        weight_files(folder, [path.name for path in folder.iterdir()], folder)
        return folder, None
    base = base or read_json(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError("the adapter does not name its base", where=folder, fix="give --base MODEL")
    return folder, locate(base).folder
