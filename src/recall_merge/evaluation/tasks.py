"""A task: rows and a metric, or a name that lm-eval knows; and its definition in lm-eval's own form, used here and written to a folder."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from recall_merge.evaluation import scoring
from recall_merge.evaluation.scoring import CHOICE_METRICS, METRICS
from recall_merge.files.row_sources import RowSource
from recall_merge.files.rows import Row, is_local
from recall_merge.models.tokens import Rendered, render_rows, token_ids
from recall_merge.runtime.errors import CheckpointError, DataError, Faults, RunError, did_you_mean

SPARE_TOKENS = 8  # that an answer may have more than the longest right one
SCORING_FILE = "recall_scoring.py"


@dataclass(frozen=True)
class TaskSpec:
    """What a model is scored on."""

    name: str
    rows: Sequence[Row] | None = None  # None: the task of this name that comes with lm-eval, as lm-eval defines it
    metric: str | None = None  # None: `acc` for rows with choices, else `exact_match`; for lm-eval's own task the first that it lists
    answers: Mapping[int, Sequence[str]] = field(default_factory=dict)  # further right ones, beside the completion, by a row's index

    @property
    def chosen_metric(self) -> str:
        """The metric of a task from rows."""
        return self.metric or ("acc" if self.rows and self.rows[0].choices else "exact_match")


@dataclass(frozen=True)
class Definition:
    """A task from rows in lm-eval's form."""

    config: dict[str, Any]  # the keys of a task's YAML; a `Function` stands for one of `scoring`
    documents: list[dict[str, Any]]


class Function(str):
    """The name of a function of `scoring`: `!function` in YAML."""


def task_word(word: str) -> tuple[str, str | None]:
    """The name of a task, and its rows unless it comes with lm-eval. The word is ROWS, NAME=ROWS, or a name that lm-eval knows.

    >>> task_word("data/french.jsonl"), task_word("f=french.jsonl"), task_word("hellaswag")
    (('french', 'data/french.jsonl'), ('f', 'french.jsonl'), ('hellaswag', None))
    """
    name, equals, rows = word.partition("=")
    if equals and not word.startswith("{"):
        return name, rows
    described = word.startswith("{") or word.endswith((".yaml", ".yml"))
    path = Path(RowSource.of(word).path if described else word)
    known = described or is_local(word) or path.is_file()
    return (Path(path.name.removesuffix(".gz")).stem, word) if known else (word, None)


def check_metrics(metrics: Iterable[str], names: Sequence[str]) -> Faults:
    """The names under which a metric is given, and which are none of the tasks."""
    faults = Faults()
    for name in metrics:
        if name not in names:
            faults.add(f"a metric is given for '{name}', which is none of the tasks", fix=did_you_mean(name, names))
    return faults


def check_tasks(tasks: Iterable[TaskSpec]) -> Faults:
    """What is wrong with the names and metrics of tasks, rows that cannot be scored, and names that lm-eval does not know."""
    faults = Faults()
    seen: set[str] = set()
    for task in tasks:
        if task.name in seen:
            faults.add(f"two tasks are named '{task.name}'", fix="give one another name: NAME=FILE")
        seen.add(task.name)
        if task.rows is None:
            _check_named(task.name, faults)
        else:
            with faults.collect():
                _check_rows(task, task.rows)
    return faults


def _check_named(name: str, faults: Faults) -> None:
    """Whether a task of this name comes with lm-eval."""
    index = task_manager().task_index
    if name not in index:
        close = get_close_matches(name, index, n=1)
        fix = (f"did you mean '{close[0]}'? " if close else "") + "`lm_eval ls tasks` lists them; rows are given as a file"
        faults.add(f"lm-eval has no task '{name}', and there is no such file", fix=fix)
    elif index[name].tags and index[name].yaml_path is None:
        members = ", ".join(sorted(index[name].tags))
        faults.add(f"'{name}' is a tag of several of lm-eval's tasks", fix=f"name one or more of them: {members}")


def _check_rows(task: TaskSpec, rows: Sequence[Row]) -> None:
    faults, where = Faults(), f"task '{task.name}'"
    if not rows:
        faults.add("there are no rows", where=where)
    with_choices = [bool(row.choices) for row in rows]
    if any(with_choices) and not all(with_choices):
        first = rows[with_choices.index(not with_choices[0])]
        faults.add("some rows have choices and some have none", where=f"{where}, row {first.index + 1}", fix="make two tasks of them")
    for row in rows:
        if not row.prompt:
            what, fix = "a row of plain text has no question to score an answer to", "give it a prompt and a completion"
            faults.add(what, where=f"{where}, row {row.index + 1}", fix=fix)
        if row.details and not row.completion.strip():
            faults.add("a row's answer is a call of tools, not a text to score", where=f"{where}, row {row.index + 1}", fix="leave it out")
        if row.choices and (len(row.choices) < 2 or not all(choice.strip() for choice in row.choices)):
            what = "a row's choices must be two or more, and none empty"
            faults.add(what, where=f"{where}, row {row.index + 1}", fix="give each choice its words")
    metrics, kind = (CHOICE_METRICS, "with") if any(with_choices) else (tuple(METRICS), "without")
    if rows and task.chosen_metric not in metrics:
        what = f"'{task.metric}' is not a metric of rows {kind} choices"
        faults.add(what, where=where, fix=did_you_mean(task.chosen_metric, metrics))
    faults.raise_any(DataError)


def define(
    task: TaskSpec, tokenizer: Any, *, template: bool | str = True, ends: Sequence[int] = (), window: int | None = None
) -> Definition:
    """A task from rows in lm-eval's form. Its texts are rendered as for training (`render`): the prompt holds the chat template.

    Choices: the words of each choice after the prompt are scored, without the end of the turn, which all have in common. Where one choice
    of a row begins another (`cat`, `cat and dog`), the end is scored with all choices of that row; otherwise the shorter would always win.
    Answers are written greedily, until the end of the turn, with at most `SPARE_TOKENS` tokens more than the longest right answer; where
    all right answers of a row have one line, the first line counts. Raises DataError if the rows cannot be scored.
    """
    assert task.rows is not None, "a task of lm-eval's has its own definition"
    check_tasks([task]).raise_any()
    if task.rows[0].choices:
        each = [replace(row, completion=choice) for row in task.rows for choice in row.choices]
        rendered = iter(render_rows(each, tokenizer, template=template, where=f"task '{task.name}'"))
        documents = [_choice_document(row, list(islice(rendered, len(row.choices)))) for row in task.rows]
        metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in CHOICE_METRICS]
        kind: dict[str, Any] = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
    else:
        texts = render_rows(task.rows, tokenizer, template=template, where=f"task '{task.name}'")
        documents = []
        for row, text in zip(task.rows, texts, strict=True):
            answers = dict.fromkeys(answer.strip() for answer in (row.completion, *task.answers.get(row.index, ())))
            documents.append({"id": row.index, "prompt": text.prompt, "answers": list(answers)})
        names = [task.chosen_metric, *METRICS[task.chosen_metric].beside]
        corpus = {name: Function(f"corpus_{name}") for name in names if METRICS[name].corpus}
        metrics = [{"metric": name, "aggregation": corpus.get(name, "mean"), "higher_is_better": True} for name in names]
        kind = {
            "output_type": "generate_until",
            "doc_to_target": "answers",
            "generation_kwargs": _generation(texts, documents, tokenizer, ends, window),
            "process_results": Function(f"process_{task.chosen_metric}"),
        }
    config = {
        "task": task.name,
        "custom_dataset": Function("documents"),
        "dataset_kwargs": {"file": f"{_file_name(task.name)}.jsonl"},
        "test_split": "test",
        "num_fewshot": 0,
        "target_delimiter": "",
        "doc_to_text": "prompt",
        **kind,
        "metric_list": metrics,
        "metadata": {"version": 1},
    }
    return Definition(config, documents)


def _choice_document(row: Row, rendered: Sequence[Rendered]) -> dict[str, Any]:
    words = [text.answer for text in rendered]
    if any(a != b and b.startswith(a) for a in words for b in words):
        words = [text.completion for text in rendered]
    return {"id": row.index, "prompt": rendered[0].prompt, "choices": words, "answer": row.choices.index(row.completion)}


def _generation(
    texts: Sequence[Rendered], documents: Sequence[Mapping[str, Any]], tokenizer: Any, ends: Sequence[int], window: int | None
) -> dict[str, Any]:
    if tokenizer.eos_token_id is None:
        raise CheckpointError("the tokenizer has no end token, so no answer ends", fix="set `eos_token` in its tokenizer_config.json")
    right = [text.completion for text in texts] + [answer for document in documents for answer in document["answers"]]
    longest = max(map(len, token_ids(right, tokenizer, window)))  # beside an answer that fills the window no prompt has room
    added, end = tokenizer.added_tokens_decoder, texts[0].end
    special = [token for token in tokenizer(end, add_special_tokens=False)["input_ids"] if token in added and added[token].special]
    before = (end.partition(added[special[0]].content)[0] if special else end).strip()
    return {
        "do_sample": False,
        "max_gen_toks": longest + SPARE_TOKENS,
        "until": [before] if before else [],  # white space alone may open an answer
        # subtle: by default the model's generation config says where to stop, and may say nothing; lm-eval then drops the end token from
        # the text but keeps what was written after it
        "eos_token_id": list(dict.fromkeys([tokenizer.eos_token_id, *special, *ends])),
    }


def load_named(names: list[str]) -> dict[str, Any]:
    """lm-eval's objects for its tasks and groups, which fetch their data when they are made."""
    try:
        return task_manager().load(names) if names else {}
    except Exception as error:  # the hub, `datasets` and a task's own code each raise their own
        what = f"lm-eval cannot load its tasks: {' '.join(str(error).split())}"
        raise DataError(what, where=", ".join(names), fix="their data come from the hub: is there a network?") from error


@cache
def task_manager() -> Any:
    """lm-eval's list of its own tasks; making it reads some ten thousand files."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def build_task(definition: Definition) -> Any:
    """A definition as one of lm-eval's task objects."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    documents = {"test": datasets.Dataset.from_list(definition.documents)}
    config = _resolved(definition.config) | {"custom_dataset": lambda **_: documents}
    return ConfigurableTask(config=config)


def _resolved(value: Any) -> Any:
    """A copy with every `Function` looked up."""
    if isinstance(value, Mapping):
        return {key: _resolved(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item) for item in value]
    return getattr(scoring, value) if isinstance(value, Function) else value


def export_task(task: TaskSpec, folder: Path, tokenizer: Any, *, template: bool | str = True) -> Path:
    """Write a task from rows for lm-eval's own command line: NAME.yaml, its documents beside it, and how they are scored.

        lm_eval --model hf --model_args pretrained=MODEL,dtype=float32,add_bos_token=False --include_path FOLDER --tasks NAME

    gives the score of `evaluate`. The prompts hold the chat template of the tokenizer, so `--apply_chat_template` must not be given.
    Raises as `define` does, and RunError for a task that lm-eval has already.
    """
    if task.rows is None:
        raise RunError(f"'{task.name}' is lm-eval's own task", fix="give its name to lm_eval as it is")
    definition = define(task, tokenizer, template=template)
    folder.mkdir(parents=True, exist_ok=True)
    stem = _file_name(task.name)
    lines = (json.dumps(document, ensure_ascii=False) + "\n" for document in definition.documents)
    (folder / f"{stem}.jsonl").write_text("".join(lines), "utf-8")
    (folder / SCORING_FILE).write_text(inspect.getsource(scoring), "utf-8")
    target = folder / f"{stem}.yaml"
    target.write_text(yaml.dump(definition.config, Dumper=_Dumper, sort_keys=False, allow_unicode=True), "utf-8")
    return target


def _file_name(task: str) -> str:
    return re.sub(r"[^\w.-]", "_", task)


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(Function, lambda dumper, function: dumper.represent_scalar("!function", f"{Path(SCORING_FILE).stem}.{function}"))
