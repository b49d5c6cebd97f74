"""Score a model on tasks: lm-eval asks, greedily and so deterministically, and the result of every item is kept.

The one place that uses private parts of sacrebleu: `Metric._extract_corpus_statistics` and `Metric._compute_score_from_stats`, which split
a corpus score into counts per sentence that add up. So the standard error of a corpus score takes a thousand sums, not a thousand passes
over the texts. Checked with sacrebleu 2.6 (tests/test_dependencies.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from recall_merge.evaluation.scoring import METRICS, Pair, columns, make_sacrebleu, written_answer
from recall_merge.evaluation.tasks import Definition, TaskSpec, build_task, check_tasks, define, load_named
from recall_merge.files.rows import numbered, unread_columns
from recall_merge.models.load import load_tokenizer
from recall_merge.models.tokens import token_ids
from recall_merge.runtime.device import is_full
from recall_merge.runtime.errors import CheckpointError, DataError, Faults, RunError, did_you_mean
from recall_merge.runtime.notebook import html_table
from recall_merge.runtime.progress import Progress, Silent

FEWSHOT_SEED = 1234  # lm-eval's own default
DRAWS = 1000  # of the bootstrap, for the standard errors of scores that are no mean over items


@dataclass(frozen=True)
class Item:
    """The result of one row."""

    id: int | str  # the row's position in its file; for a group of lm-eval's tasks `task/position`
    score: float | None  # from 0 to 1; None where the metric has no value for a single item
    prediction: str  # the choice that was taken, or the answer that was written
    choices: int = 0  # how many there were; 0 for a written answer


@dataclass(frozen=True)
class TaskScore:
    """A model's score on one task."""

    task: str
    metric: str
    score: float  # from 0 to 1 for every task from rows, BLEU and chrF too, so that scores of different tasks can be averaged
    stderr: float | None  # standard error of the score over items; None where it is not known, as for a single item
    n: int
    items: tuple[Item, ...]
    others: Mapping[str, float]  # what else was measured, e.g. `acc_norm` beside `acc`
    notes: tuple[str, ...] = ()  # what a reader of the score should know

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TaskScore:
        return cls(**{**data, "items": tuple(Item(**item) for item in data["items"]), "notes": tuple(data.get("notes", ()))})


class Scores(list[TaskScore]):
    """A model's scores, one for each task."""

    head = ("task", "metric", "score", "standard error", "rows")

    def lines(self) -> Iterator[list[str]]:
        """Each score in words, under `head`."""
        for score in self:
            error = "-" if score.stderr is None else f"{score.stderr:.3f}"
            yield [score.task, score.metric, f"{score.score:.3f}", error, str(score.n)]

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>note: {escape(f'{score.task}: {note}')}</p>" for score in self for note in score.notes)
        return html_table("scores, from 0 to 1", self.head, self.lines()) + notes


def score_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[TaskSpec],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    template: bool | str = True,
    progress: Progress | None = None,
) -> list[TaskScore]:
    """The score of a loaded model on each task, in the order of the tasks.

    The batch size changes the time, and no score. (For written answers this holds in float32. In bfloat16 the last bits depend on the
    shapes that are multiplied, and are coarse enough to change a close word.) Where the memory of an accelerator is too small for it,
    prompts are asked one by one; where it is too small for that, the model moves to the processor, in float32, and a note says so.

    Args:
        limit: only the first rows of each task.
        template: apply the model's chat template, if it has one, to tasks from rows; or that of this text. Tasks that come with lm-eval
            are asked without it, as lm-eval does.

    Raises:
        RunError: if a task is not known, or a metric does not fit.
        DataError: if rows cannot be scored, or do not fit the model.
        CheckpointError: if a model that is spread over several devices leaves too little memory for a prompt.
    """
    check_tasks(tasks).raise_any(RunError)
    score = partial(_score_loaded, model, tokenizer, tasks, limit=limit, template=template, progress=progress or Silent())
    for size in dict.fromkeys((batch_size, 1)):
        try:
            return score(batch_size=size)
        except RuntimeError as error:
            if model.device.type == "cpu" or not is_full(error):
                raise
    if hasattr(model, "hf_device_map"):
        what = "the devices that the model is spread over have too little memory left for a prompt"
        raise CheckpointError(what, where=model.name_or_path, fix="score it on the processor: --device cpu")
    note = f"{model.device} has too little memory for a prompt at a time: the processor scored the model, in float32"
    model.to("cpu").float()
    return [replace(each, notes=(*each.notes, note)) for each in score(batch_size=batch_size)]


def _score_loaded(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[TaskSpec],
    *,
    batch_size: int,
    limit: int | None,
    template: bool | str,
    progress: Progress,
) -> list[TaskScore]:
    from recall_merge.evaluation.lm_eval_private import LocalModel, silence

    from_rows, named = [task for task in tasks if task.rows is not None], [task for task in tasks if task.rows is None]
    with silence(), greedy(model, tokenizer) as ends:
        objects = load_named([task.name for task in named])
        local = LocalModel(model, tokenizer, batch_size=batch_size, progress=progress)
        window = local.max_length
        definitions = {task.name: define(task, tokenizer, template=template, ends=ends, window=window) for task in from_rows}
        _check_lengths(definitions, tokenizer, window).raise_any(DataError)
        scores: dict[str, TaskScore] = {}
        if from_rows:
            local.add_bos_token = False  # a rendered text has its special tokens
            results = _run(local, {name: build_task(definition) for name, definition in definitions.items()}, {}, limit)
            scores |= {task.name: _score_rows(task, results) for task in from_rows}
        if named:
            local.add_bos_token = None  # the tokenizer decides, as in lm-eval
            results = _run(local, objects["tasks"], objects["groups"], limit)
            scores |= {task.name: _score_named(task, results) for task in named}
    return [scores[task.name] for task in tasks]


def check_lengths(folder: Path, tasks: Sequence[TaskSpec], *, base: Path | None = None, template: bool | str = True) -> Faults:
    """The rows that cannot be scored, or do not fit into a model's window, from config and tokenizer in its folder or its base's."""
    from recall_merge.evaluation.lm_eval_private import window_of

    tokenizer, faults, definitions = load_tokenizer(folder, base), Faults(), {}
    window = window_of(base or folder, tokenizer)
    for task in tasks:
        if task.rows is not None:
            with faults.collect():
                definitions[task.name] = define(task, tokenizer, template=template, window=window)
    faults.extend(_check_lengths(definitions, tokenizer, window))
    return faults


def _check_lengths(definitions: Mapping[str, Definition], tokenizer: Any, window: int) -> Faults:
    """The rows that do not fit into a window: lm-eval would cut the beginning of their prompts."""
    faults = Faults()
    for name, definition in definitions.items():
        room = definition.config.get("generation_kwargs", {}).get("max_gen_toks", -1)  # the last token of a choice is not read
        documents = definition.documents
        texts = [(d["id"], d["prompt"] + choice) for d in documents for choice in d.get("choices", [""])]
        counts = map(len, token_ids([text for _, text in texts], tokenizer, max(window - room, 0) + 1))  # one more is too long
        long = sorted({row for (row, _), count in zip(texts, counts, strict=True) if count + room > window})
        if long:
            what = f"{len(long)} of {len(documents)} rows of '{name}' are longer than the {window} tokens that the model can read"
            fix = "leave them out, or shorten them"
            if room > 0:  # as many tokens are kept free for every row as the longest answer has
                row = max(documents, key=lambda document: max(map(len, document["answers"])))["id"]
                fix += f"; each has {room} tokens kept free for its answer, for the longest is that of row {row + 1}: a task of its own?"
            faults.add(what, where=f"task '{name}', {numbered(long)}", fix=fix)
    return faults


@contextmanager
def greedy(model: Any, tokenizer: Any) -> Iterator[list[int]]:
    """All models write by the same rules: greedily, each until its own end tokens, which are given. What the file of a generation config
    says beside them (penalties, limits, beams, suppressed tokens) would score the same weights differently by where they come from.

    Undone at the end, with what lm-eval changes: it puts a model into evaluation mode, and gives a tokenizer without a padding token
    another one.
    """
    from transformers import GenerationConfig

    before, training, pad = model.generation_config, model.training, tokenizer.pad_token
    ids = {name: getattr(before, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")}
    model.generation_config = GenerationConfig(**ids)
    ends = ids["eos_token_id"]
    check = model.register_forward_hook(_refuse_nonfinite)
    try:
        yield ends if isinstance(ends, list) else [ends] if ends is not None else []
    finally:
        check.remove()
        model.generation_config = before
        model.train(training)
        tokenizer.pad_token = pad


def _refuse_nonfinite(model: Any, _: Any, output: Any) -> None:
    """Logits of NaN would look like answers: the first choice, the first token. A token may be ruled out by -infinity."""
    import torch

    total = output.logits.sum(dtype=torch.float32)
    if total.isnan() or total.isposinf():
        fix = "its training went wrong, or a merge; in half precision numbers may overflow: try float32"
        raise CheckpointError("the model's logits are NaN or infinite, so it has no score", where=model.name_or_path, fix=fix)


def _run(local: Any, tasks: Mapping[str, Any], groups: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    """Ask all tasks. Gives lm-eval's results."""
    from lm_eval.evaluator import evaluate

    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    try:
        results = evaluate(lm=local, task_dict={"tasks": dict(tasks), "groups": dict(groups)}, limit=limit, bootstrap_iters=DRAWS)
    except ValueError as error:  # code that is not trusted, images for a model that reads none
        raise RunError(f"lm-eval refuses: {' '.join(str(error).split())}", where=", ".join(tasks)) from error
    assert results is not None, "there is one process"
    return dict(results)


def _score_rows(task: TaskSpec, results: Mapping[str, Any]) -> TaskScore:
    """The score of a task from rows."""
    assert task.rows is not None
    name = task.chosen_metric
    corpus = METRICS[name] if name in METRICS and METRICS[name].corpus else None
    measured = {metric: value for (metric, _), value in _metrics(results["results"][task.name]).items()}
    samples, items = results["samples"][task.name], []
    for sample in samples:
        row = task.rows[sample["doc_id"]]
        written = [] if row.choices else [str(sample["filtered_resps"][0]), sample["doc"]["answers"]]
        prediction = written_answer(*written) if written else row.choices[_likeliest(sample)]
        score = corpus.score(*sample[name]) if corpus else float(sample[name])
        items.append(Item(row.index, score, prediction.strip(), len(row.choices)))
    values = [sample[name] for sample in samples]
    stderr = corpus_stderr(name, values) if corpus else mean_stderr([float(value) for value in values])
    notes = tuple(unread_columns(task.rows))
    return TaskScore(task.name, name, measured.pop(name), stderr, len(items), tuple(items), measured, notes)


def mean_stderr(scores: Sequence[float]) -> float | None:
    """Standard error of a mean: sqrt( sum (x - mean)^2 / (n - 1) / n ); None for a single item.

    >>> mean_stderr([1, 0, 1, 0])    # sqrt(1 / 3 / 4)
    0.28867513459481287
    """
    n = len(scores)
    if n < 2:
        return None
    mean = sum(scores) / n
    return (sum((score - mean) ** 2 for score in scores) / (n - 1) / n) ** 0.5


def corpus_stderr(metric: str, pairs: Sequence[Pair]) -> float | None:
    """Standard error of a score of all answers together: its standard deviation over `DRAWS` draws of as many items, with replacement and
    a fixed seed. None for a single item.
    """
    import numpy as np

    n, corpus = len(pairs), METRICS[metric].corpus
    if n < 2 or corpus is None:
        return None
    rng = np.random.default_rng(0)
    draws = (rng.integers(n, size=n) for _ in range(DRAWS))
    if metric in {"bleu", "chrf"}:
        sacrebleu = make_sacrebleu(metric)
        counts = np.array(sacrebleu._extract_corpus_statistics(*columns(pairs)), dtype=np.float64)  # (n, counts)
        scores = [sacrebleu._compute_score_from_stats(list(counts[rows].sum(axis=0))).score for rows in draws]
    else:
        scores = [100 * corpus([pairs[row] for row in rows]) for rows in draws]
    return float(np.std(scores, ddof=1)) / 100


def _score_named(task: TaskSpec, results: Mapping[str, Any]) -> TaskScore:
    """The score of a task or a group that comes with lm-eval, with lm-eval's own standard error."""
    entry = results["results"][task.name]
    measured = _metrics(entry)
    repeated = [name for name, _ in measured]
    keys = {",".join(key) if repeated.count(key[0]) > 1 else key[0]: key for key in measured}
    metric = task.metric or next(iter(keys), "")
    if metric not in keys:
        raise RunError(f"task '{task.name}' has no metric '{metric}'", fix=did_you_mean(metric, keys))
    name, answer_filter = keys[metric]
    stderr = entry.get(f"{name}_stderr,{answer_filter}")
    leaves, items = _leaves(task.name, results["group_subtasks"]), []
    for leaf in leaves:
        for sample in (sample for sample in results["samples"][leaf] if sample["filter"] in {answer_filter, "none"}):
            row = sample["doc_id"] if leaves == [task.name] else f"{leaf}/{sample['doc_id']}"
            items.append(_named_item(row, sample, sample.get(name)))
    others = {other: measured[key] for other, key in keys.items() if other != metric}
    stderr = stderr if isinstance(stderr, float) else None
    return TaskScore(task.name, metric, measured[name, answer_filter], stderr, len(items), tuple(items), others)


def _metrics(entry: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """(metric, filter) -> value, from lm-eval's 'metric,filter'."""
    pairs = ((key.partition(","), value) for key, value in entry.items() if "," in key)
    return {(name, answer_filter): float(value) for (name, _, answer_filter), value in pairs if not name.endswith("_stderr")}


def _leaves(name: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group and of the groups in it; a task is its own.

    >>> _leaves("a", {"a": ["b", "c"], "c": ["d"]})
    ['b', 'd']
    """
    return [leaf for child in groups[name] for leaf in _leaves(child, groups)] if groups.get(name) else [name]


def _named_item(row: int | str, sample: Mapping[str, Any], value: Any) -> Item:
    answers = sample["filtered_resps"]
    score = float(value) if isinstance(value, bool | int | float) else None
    if len(answers) > 1:  # one log-likelihood per choice; choices differ in their continuations, or else in their contexts
        choices = [tuple(map(str, arguments)) for arguments in sample["arguments"]]
        part = 1 if len({choice[1] for choice in choices}) > 1 else 0
        return Item(row, score, choices[_likeliest(sample)][part].strip(), len(answers))
    return Item(row, score, str(answers[0]).strip())


def _likeliest(sample: Mapping[str, Any]) -> int:
    """The choice with the highest log-likelihood, the first of equals, as in lm-eval."""
    likelihoods = [likelihood for likelihood, _ in sample["filtered_resps"]]
    return likelihoods.index(max(likelihoods))
