"""The five tasks of the RECALL paper (arXiv:2510.20479) on the hub: where they are, which split, and how a record becomes a row.

The paper names the tasks and their metrics, but not its prompts. These prompts are ours, one per kind of task, in the form of all our
rows: a prompt that ends without a space, a completion that begins with one.
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
    """Read the hub's own copy in Parquet: the repository holds a script, which `datasets` no longer runs."""


def sst2(record: Record) -> dict[str, Any]:
    """Sentiment of a sentence; one of two words.

    >>> sst2({"idx": 0, "sentence": "a joy to watch ", "label": 1})["completion"]
    ' positive'
    """
    choices = [" negative", " positive"]
    prompt = f"Review: {record['sentence'].strip()}\nIs the sentiment positive or negative?\nAnswer:"
    return {"prompt": prompt, "completion": choices[_label(record["label"], 2)], "choices": choices}


def squad_v2(record: Record) -> dict[str, Any]:
    """A question on a passage. The answer is in the words of the passage, or there is none.

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
"""The paper's five; RACE also with its easier half."""


def load_hub_task(name: str, *, train: bool = False, limit: int | None = None) -> TaskSpec:
    """A task with its rows and metric, from the test split or the training split.

    Args:
        name: one of `HUB_TASKS`.
        limit: only the first rows.

    Raises:
        RunError: if there is no such task.
        DataError: if its data cannot be loaded, or a record cannot be a row.
    """
    records = _load_records(name, train=train, limit=limit)
    answers = {i: tuple(record["answers"]) for i, record in enumerate(records) if record.get("answers")}
    return TaskSpec(name, parse_rows(records, where=f"{name} of the hub"), HUB_TASKS[name].metric, answers)


def write_hub_rows(name: str, file: Path, *, train: bool, limit: int | None = None) -> Path:
    """Write a split's rows as JSON lines, e.g. for `recall learn --train`.

    Raises:
        RunError, DataError: as `load_hub_task`.
    """
    records = _load_records(name, train=train, limit=limit)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return file


def _load_records(name: str, *, train: bool, limit: int | None) -> list[dict[str, Any]]:
    """A split's records, converted."""
    import datasets

    if name not in HUB_TASKS:
        raise RunError(f"the paper has no task '{name}'", fix=did_you_mean(name, HUB_TASKS))
    task = HUB_TASKS[name]
    split = task.train if train else task.test
    try:
        records: Any = datasets.load_dataset(
            task.hub,
            None if task.parquet else task.config,
            data_files={split: f"{task.config}/{split}/*.parquet"} if task.parquet else None,
            revision="refs/convert/parquet" if task.parquet else None,
            split=split if limit is None else f"{split}[:{limit}]",
        )
    except Exception as error:  # `datasets` raises many kinds; all mean that there are no rows
        what = f"its rows cannot be loaded: {' '.join(str(error).split())}"
        raise DataError(what, where=task.hub, fix="is there a network, and room for its cache?") from error
    converted = []
    for number, record in enumerate(records, start=1):
        try:
            converted.append(task.convert(record))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what, where = f"this record cannot be a row: {error}", f"{name} of the hub, row {number}"
            raise DataError(what, where=where, fix="read a split that has labels") from error
    return converted


def _lettered(before: str, question: str, options: list[str], right: int) -> dict[str, Any]:
    """A question with lettered options. The letters are scored, not the words: one token each, so that no choice is longer than another."""
    listed = "\n".join(f"{letter}. {option.strip()}" for letter, option in zip(LETTERS, options, strict=True))
    prompt = f"{before}Question: {question.strip()}\n{listed}\nAnswer:"
    return {"prompt": prompt, "completion": f" {LETTERS[right]}", "choices": [f" {letter}" for letter in LETTERS]}


def _label(label: Any, count: int) -> int:
    """A label within range. The hub's hidden labels are -1."""
    if not isinstance(label, int) or not 0 <= label < count:
        raise ValueError(f"the label is {label!r}; it must be one of 0 to {count - 1}")
    return label
