"""The five tasks of the RECALL paper (arXiv:2510.20479), as they lie on the hub: where, which split, and how a record becomes a row.

The paper names the tasks and their metrics; its prompts are not known. These are ours, one for each kind of task, in the form of all
our rows: a prompt that ends without a space, a completion that begins with one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recall_merge.evaluation.tasks import TaskSpec
from recall_merge.files.rows import parse_rows
from recall_merge.runtime.errors import DataError, RunError, did_you_mean

Record = Mapping[str, Any]
LETTERS = ("A", "B", "C", "D")
UNANSWERABLE = "unanswerable"


@dataclass(frozen=True)
class HubTask:
    """A task of the hub."""

    hub: str
    config: str | None
    train: str
    test: str
    """The split that is scored: `validation` where the hub's test split hides its labels."""
    metric: str
    convert: Callable[[Record], dict[str, Any]]
    """A record -> prompt, completion, and choices or further right answers where there are any."""
    parquet: bool = False
    """The repository holds a script, which `datasets` no longer runs: read the hub's own copy in Parquet."""


def sst2(record: Record) -> dict[str, Any]:
    """Sentiment of a sentence; one of two words.

    >>> sst2({"idx": 0, "sentence": "a joy to watch ", "label": 1})["completion"]
    ' positive'
    """
    choices = [" negative", " positive"]
    prompt = f"Review: {record['sentence'].strip()}\nIs the sentiment positive or negative?\nAnswer:"
    return {"prompt": prompt, "completion": choices[_label(record["label"], 2)], "choices": choices}


def squad_v2(record: Record) -> dict[str, Any]:
    """A question on a passage; the answer is in the passage's words, or there is none.

    >>> squad_v2({"context": "Ann sings.", "question": "Who dances?", "answers": {"text": [], "answer_start": []}})["completion"]
    ' unanswerable'
    """
    texts = list(dict.fromkeys(text.strip() for text in record["answers"]["text"])) or [UNANSWERABLE]
    ask = f"Answer with words from the passage, or '{UNANSWERABLE}':"
    prompt = f"Passage: {record['context'].strip()}\nQuestion: {record['question'].strip()}\n{ask}"
    return {"prompt": prompt, "completion": f" {texts[0]}", "answers": texts[1:]}


def iwslt2017_en_fr(record: Record) -> dict[str, Any]:
    """Translation of a sentence of a talk.

    >>> iwslt2017_en_fr({"translation": {"en": "Thank you.", "fr": "Merci."}})["completion"]
    ' Merci.'
    """
    pair = record["translation"]
    return {"prompt": f"Translate English to French.\nEnglish: {pair['en'].strip()}\nFrench:", "completion": f" {pair['fr'].strip()}"}


def race(record: Record) -> dict[str, Any]:
    """A question on an article of an English exam; the letter of one of four options.

    >>> race({"article": "Ann sings.", "question": "Who sings?", "options": ["Bo", "Ann", "Cy", "Di"], "answer": "B"})["completion"]
    ' B'
    """
    if record["answer"] not in LETTERS:
        raise ValueError(f"the answer {record['answer']!r} is none of {', '.join(LETTERS)}")
    return _lettered(f"Article: {record['article'].strip()}\n", record["question"], record["options"], LETTERS.index(record["answer"]))


def medmcqa(record: Record) -> dict[str, Any]:
    """A question of a medical entrance exam; the letter of one of four options.

    >>> medmcqa({"question": "Vitamin of citrus fruit?", "opa": "A", "opb": "B12", "opc": "C", "opd": "D", "cop": 2})["completion"]
    ' C'
    """
    options = [record[f"op{letter}"] for letter in "abcd"]
    return _lettered("", record["question"], options, _label(record["cop"], 4))


HUB_TASKS: dict[str, HubTask] = {
    "sst2": HubTask("stanfordnlp/sst2", None, "train", "validation", "acc", sst2),
    "squad_v2": HubTask("rajpurkar/squad_v2", None, "train", "validation", "f1", squad_v2),
    "iwslt2017-en-fr": HubTask("IWSLT/iwslt2017", "iwslt2017-en-fr", "train", "test", "bleu", iwslt2017_en_fr, parquet=True),
    "race": HubTask("ehovy/race", "high", "train", "test", "acc", race),
    "race-all": HubTask("ehovy/race", "all", "train", "test", "acc", race),
    "medmcqa": HubTask("openlifescienceai/medmcqa", None, "train", "validation", "acc", medmcqa),
}
"""The five, and RACE also with its easier half."""


def load_hub_task(name: str, *, train: bool = False, limit: int | None = None) -> TaskSpec:
    """A task with its rows and metric, of the test split or the training split.

    Args:
        name: one of `HUB_TASKS`.
        limit: only the first rows.

    Raises:
        RunError: if there is no such task.
        DataError: if its data cannot be had, or a record cannot be a row.
    """
    task, where = _find(name), f"{name} of the hub"
    converted = [_convert(task, record, f"{where}, row {i + 1}") for i, record in enumerate(_records(task, train=train, limit=limit))]
    answers = {i: tuple(record["answers"]) for i, record in enumerate(converted) if record.get("answers")}
    return TaskSpec(name, parse_rows(converted, where=where), task.metric, answers)


def write_hub_rows(name: str, file: Path, *, train: bool, limit: int | None = None) -> Path:
    """A split's rows as JSON lines, e.g. for `recall learn --train`.

    Raises:
        RunError, DataError: as `load_hub_task`.
    """
    task = _find(name)
    rows = [_convert(task, record, f"{name} of the hub, row {i + 1}") for i, record in enumerate(_records(task, train=train, limit=limit))]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return file


def _find(name: str) -> HubTask:
    if name not in HUB_TASKS:
        raise RunError(f"there is no task '{name}' of the paper", fix=did_you_mean(name, HUB_TASKS))
    return HUB_TASKS[name]


def _records(task: HubTask, *, train: bool, limit: int | None) -> Any:
    import datasets

    split = task.train if train else task.test
    files = {split: f"{task.config}/{split}/*.parquet"} if task.parquet else None
    try:
        return datasets.load_dataset(
            task.hub,
            None if task.parquet else task.config,
            data_files=files,
            revision="refs/convert/parquet" if task.parquet else None,
            split=split if limit is None else f"{split}[:{limit}]",
        )
    except Exception as error:  # `datasets` raises many kinds; all mean that the rows cannot be had
        what = f"its rows cannot be had: {' '.join(str(error).split())}"
        raise DataError(what, where=task.hub, fix="is there a network, and room for its cache?") from error


def _convert(task: HubTask, record: Record, where: str) -> dict[str, Any]:
    try:
        return task.convert(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"this record cannot be a row: {error}", where=where, fix="read a split that has labels") from error


def _lettered(before: str, question: str, options: list[str], right: int) -> dict[str, Any]:
    """A question with lettered options. The letters are scored, not the words: one token each, none longer than another."""
    listed = "\n".join(f"{letter}. {option.strip()}" for letter, option in zip(LETTERS, options, strict=True))
    prompt = f"{before}Question: {question.strip()}\n{listed}\nAnswer:"
    return {"prompt": prompt, "completion": f" {LETTERS[right]}", "choices": [f" {letter}" for letter in LETTERS]}


def _label(label: Any, count: int) -> int:
    """A label that is there: the hub's hidden ones are -1."""
    if not isinstance(label, int) or not 0 <= label < count:
        raise ValueError(f"the label is {label!r}; it must be one of 0 to {count - 1}")
    return label
