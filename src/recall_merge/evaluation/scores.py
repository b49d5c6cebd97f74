"""Score a model on tasks: lm-eval asks, greedily and so deterministically, and every item's result is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_merge.evaluation import scoring
from recall_merge.evaluation.tasks import Definition, TaskSpec, build_task, check_tasks, define
from recall_merge.files.rows import Row, numbered
from recall_merge.models.load import build_model, load_config, load_tokenizer
from recall_merge.runtime.errors import DataError, Faults, RunError, did_you_mean
from recall_merge.runtime.progress import Progress, Silent

if TYPE_CHECKING:
    from recall_merge.evaluation.lm_eval_model import Engine

FEWSHOT_SEED = 1234  # lm-eval's own default
BOOTSTRAP_DRAWS = 1000  # for the standard error of those of lm-eval's tasks that are no mean over items


@dataclass(frozen=True)
class Item:
    """What became of one row."""

    id: int | str
    """The row's position in its file; for a group of lm-eval's tasks `task/position`."""
    score: float | None
    """From 0 to 1; 0 or 1 where it is right or wrong. None where the metric has no value for one item."""
    prediction: str
    """The choice that was taken, or the answer that was written."""
    choices: int = 0
    """How many there were to choose from; 0 for a written answer."""


@dataclass(frozen=True)
class TaskScore:
    """A model's score on one task."""

    task: str
    metric: str
    score: float
    """From 0 to 1 for every task from rows, BLEU and chrF too: scores of different tasks are averaged."""
    stderr: float | None
    """Standard error of the score over items; None where it is not known, as for a single item."""
    n: int
    items: tuple[Item, ...]
    others: Mapping[str, float]
    """What else was measured on the way, e.g. `acc_norm` beside `acc`."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TaskScore:
        return cls(**{**data, "items": tuple(Item(**item) for item in data["items"])})


def evaluate(
    model: Path | Any,
    tasks: Sequence[TaskSpec],
    *,
    tokenizer: Any = None,
    batch_size: int = 8,
    limit: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    template: bool = True,
    progress: Progress | None = None,
) -> list[TaskScore]:
    """The score of a model on each task, in the order of the tasks.

    The batch size changes the time, and no score. (Written answers keep this promise in float32; in bfloat16 the last bits, which
    depend on the shapes that are multiplied, are coarse enough to turn a close word.)

    Args:
        model: a folder, or a loaded model, whose device and dtype are taken as they are.
        tokenizer: a loaded model's; a folder has its own.
        batch_size: prompts at a time.
        limit: only the first rows of each task.
        device: a folder's; by default a GPU if there is one.
        dtype: a folder's; by default float32 on a CPU, and on a GPU what the folder has.
        template: put the prompts of tasks from rows into the model's chat template, if it has one. Tasks that come with lm-eval are
            asked without, as lm-eval does.

    Raises:
        RunError: if a task is not known, or a metric does not fit.
        DataError: if rows cannot be scored, or do not fit the model.
        CheckpointError: if the folder cannot be loaded.
    """
    check_tasks(tasks).raise_any(RunError)
    check_named(tasks).raise_any(RunError)
    from recall_merge.evaluation.lm_eval_model import Engine, silence

    own, named = [task for task in tasks if task.rows is not None], [task for task in tasks if task.rows is None]
    with silence():
        theirs = _load_named(named)
        if isinstance(model, str | Path):
            model, tokenizer = _load(Path(model), device, dtype), tokenizer or load_tokenizer(Path(model))
        elif tokenizer is None:
            raise RunError("a loaded model comes without its tokenizer", fix="give `tokenizer` too")
        definitions = {task.name: define(task, tokenizer, template=template) for task in own}
        scores: dict[str, TaskScore] = {}
        with _left_as_it_was(model, tokenizer):
            executor = Engine(model, tokenizer, batch_size=batch_size, progress=progress or Silent())
            _too_long(definitions, tokenizer, executor.max_length).raise_any(DataError)
            if own:
                executor.add_bos_token = False  # a rendered text has its special tokens
                results = _ask(executor, {name: build_task(definition) for name, definition in definitions.items()}, {}, limit)
                scores |= {task.name: _own_score(task, results) for task in own}
            if named:
                executor.add_bos_token = None  # whatever the tokenizer does, which is lm-eval's way
                results = _ask(executor, theirs["tasks"], theirs["groups"], limit)
                scores |= {task.name: _named_score(task, results) for task in named}
    return [scores[task.name] for task in tasks]


def check_named(tasks: Sequence[TaskSpec]) -> Faults:
    """What is wrong with the names of tasks that should come with lm-eval."""
    faults = Faults()
    for task in (task for task in tasks if task.rows is None):
        index = _manager().task_index
        if task.name not in index:
            from difflib import get_close_matches

            close = get_close_matches(task.name, index, n=1)
            fix = (f"did you mean '{close[0]}'? " if close else "") + "`lm_eval ls tasks` lists them; rows are given as a file"
            faults.add(f"lm-eval has no task '{task.name}', and there is no such file", fix=fix)
        elif index[task.name].tags and index[task.name].yaml_path is None:
            members = ", ".join(sorted(index[task.name].tags))
            faults.add(f"'{task.name}' is a tag of lm-eval's for several tasks", fix=f"name the ones that are meant: {members}")
    return faults


@cache
def _manager() -> Any:
    """lm-eval's list of tasks; it reads some ten thousand files."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load_named(tasks: Sequence[TaskSpec]) -> dict[str, Any]:
    """lm-eval's task objects, which fetch their data when they are made."""
    if not tasks:
        return {}
    try:
        return _manager().load([task.name for task in tasks])
    except Exception as error:  # the hub, `datasets` and a task's own code each raise their own
        what = f"lm-eval cannot load its tasks: {' '.join(str(error).split())}"
        raise DataError(
            what, where=", ".join(task.name for task in tasks), fix="their data come from the hub: is there a network?"
        ) from error


def _load(folder: Path, device: str | None, dtype: str | None) -> Any:
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return build_model(folder, dtype=dtype or ("float32" if device == "cpu" else "auto")).to(device)


@contextmanager
def _left_as_it_was(model: Any, tokenizer: Any) -> Iterator[None]:
    """lm-eval puts a model into evaluation mode and gives a tokenizer without a padding token another token for one."""
    training, pad = model.training, tokenizer.pad_token
    try:
        yield
    finally:
        model.train(training)
        tokenizer.pad_token = pad


def check_lengths(folder: Path, tasks: Sequence[TaskSpec], *, template: bool = True) -> Faults:
    """Which rows a model cannot be scored on, since its window does not hold them: known before there are weights.

    Args:
        folder: the model, or another with its config and tokenizer.

    Raises:
        DataError: if rows cannot be scored at all.
        CheckpointError: if config or tokenizer cannot be used.
    """
    tokenizer = load_tokenizer(folder)
    definitions = {task.name: define(task, tokenizer, template=template) for task in tasks if task.rows is not None}
    return _too_long(definitions, tokenizer, window_of(folder, tokenizer))


def window_of(folder: Path, tokenizer: Any) -> int:
    """How many tokens the model of a folder reads at most, as lm-eval takes it from its config."""
    from recall_merge.evaluation.lm_eval_model import HFLM, resolve_max_length, silence

    with silence():
        return resolve_max_length(load_config(folder), tokenizer, default=HFLM._DEFAULT_MAX_LENGTH)


def _too_long(definitions: Mapping[str, Definition], tokenizer: Any, window: int) -> Faults:
    """Rows that the model's window cannot hold: lm-eval would cut the beginning of the prompt."""
    faults = Faults()
    for name, definition in definitions.items():
        room = definition.config.get("generation_kwargs", {}).get("max_gen_toks", -1)  # the last token of a choice is not read
        documents = definition.documents
        texts = [(d["id"], d["prompt"] + choice) for d in documents for choice in d.get("choices", [""])]
        counts = map(len, tokenizer([text for _, text in texts], add_special_tokens=False)["input_ids"])
        long = sorted({row for (row, _), count in zip(texts, counts, strict=True) if count + room > window})
        if long:
            what = f"{len(long)} of {len(documents)} rows of '{name}' are longer than the {window} tokens that the model can read"
            faults.add(what, where=f"task '{name}', {numbered(long)}", fix="leave them out, or shorten them")
    return faults


def _ask(executor: Engine, tasks: Mapping[str, Any], groups: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    """Ask all tasks, and return what lm-eval makes of the answers."""
    from lm_eval.evaluator import evaluate as run

    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    try:
        results = run(lm=executor, task_dict={"tasks": dict(tasks), "groups": dict(groups)}, limit=limit, bootstrap_iters=BOOTSTRAP_DRAWS)
    except ValueError as error:  # code that is not trusted, images for a model without eyes
        raise RunError(f"lm-eval refuses: {' '.join(str(error).split())}", where=", ".join(tasks)) from error
    assert results is not None, "there is one process"
    return dict(results)


def _own_score(task: TaskSpec, results: Mapping[str, Any]) -> TaskScore:
    """The score of a task from rows."""
    metric, samples = task.chosen_metric, results["samples"][task.name]
    found = {name: value for (name, _), value in _metrics(results["results"][task.name]).items()}
    assert task.rows is not None
    items = tuple(_own_item(task.rows[sample["doc_id"]], sample, _item_score(metric, sample[metric])) for sample in samples)
    if metric in scoring.CORPUS_METRICS:
        stderr = scoring.corpus_stderr(metric, [sample[metric] for sample in samples])
    else:
        stderr = scoring.mean_stderr([float(sample[metric]) for sample in samples])
    return TaskScore(task.name, metric, found.pop(metric), stderr, len(items), items, found)


def _named_score(task: TaskSpec, results: Mapping[str, Any]) -> TaskScore:
    """The score of a task or a group that comes with lm-eval, with lm-eval's own standard error."""
    entry = results["results"][task.name]
    found = _metrics(entry)
    names = {",".join(key) if [k for k, _ in found].count(key[0]) > 1 else key[0]: key for key in found}
    metric = task.metric or next(iter(names), "")
    if metric not in names:
        raise RunError(f"task '{task.name}' has no metric '{metric}'", fix=did_you_mean(metric, names))
    name, chosen = names[metric]
    stderr = entry.get(f"{name}_stderr,{chosen}")
    parts = _leaves(task.name, results["group_subtasks"])
    items = []
    for part in parts:
        for sample in (sample for sample in results["samples"][part] if sample["filter"] in {chosen, "none"}):
            place = sample["doc_id"] if parts == [task.name] else f"{part}/{sample['doc_id']}"
            items.append(_named_item(place, sample, sample.get(name)))
    others = {other: found[key] for other, key in names.items() if other != metric}
    return TaskScore(
        task.name, metric, found[name, chosen], stderr if isinstance(stderr, float) else None, len(items), tuple(items), others
    )


def _metrics(entry: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """(metric, filter) -> value, of what lm-eval writes as 'metric,filter'."""
    pairs = ((key.partition(","), value) for key, value in entry.items() if "," in key)
    return {(name, chosen): float(value) for (name, _, chosen), value in pairs if not name.endswith("_stderr")}


def _leaves(name: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group, and of its groups; a task is its own.

    >>> _leaves("a", {"a": ["b", "c"], "c": ["d"]})
    ['b', 'd']
    """
    return [leaf for child in groups[name] for leaf in _leaves(child, groups)] if groups.get(name) else [name]


def _own_item(row: Row, sample: Mapping[str, Any], score: float) -> Item:
    prediction = row.choices[_likeliest(sample)] if row.choices else str(sample["filtered_resps"][0])
    return Item(row.index, score, prediction.strip(), len(row.choices))


def _named_item(place: int | str, sample: Mapping[str, Any], value: Any) -> Item:
    answers = sample["filtered_resps"]
    score = float(value) if isinstance(value, bool | int | float) else None
    if len(answers) > 1:  # one log-likelihood a choice, which stands in the continuation, or else in the context
        choices = [tuple(map(str, arguments)) for arguments in sample["arguments"]]
        at = 1 if len({choice[1] for choice in choices}) > 1 else 0
        return Item(place, score, choices[_likeliest(sample)][at].strip(), len(answers))
    return Item(place, score, str(answers[0]).strip())


def _likeliest(sample: Mapping[str, Any]) -> int:
    """The choice of the highest log-likelihood, the first of equals, as lm-eval takes it."""
    likelihoods = [likelihood for likelihood, _ in sample["filtered_resps"]]
    return likelihoods.index(max(likelihoods))


def _item_score(metric: str, value: Any) -> float:
    return scoring.ITEM_METRICS[metric](*value) if metric in scoring.CORPUS_METRICS else float(value)
