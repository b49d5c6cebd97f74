"""The five tasks of the RECALL paper on the hub: `paper_tasks.yaml` says where they are, and how a record becomes a row."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from recall_merge.evaluation.tasks import TaskSpec
from recall_merge.files.rows import parse_rows
from recall_merge.runtime.errors import DataError, RunError, did_you_mean

LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True)
class HubTask:
    """A task of the hub; `paper_tasks.yaml` explains the keys."""

    hub: str
    test: str
    metric: str
    prompt: str
    train: str = "train"
    config: str | None = None
    parquet: bool = False
    choices: tuple[str, ...] = LETTERS
    options: str = ""
    right: str = ""
    answers: str = ""


HUB_TASKS = {
    name: HubTask(**keys)
    for name, keys in yaml.safe_load((files("recall_merge.evaluation") / "paper_tasks.yaml").read_text("utf-8")).items()
}


def load_hub_task(name: str, *, train: bool = False, limit: int | None = None) -> TaskSpec:
    """A task of `HUB_TASKS` with its rows and metric, from the test split or the training split; `limit`: only the first rows.
    Raises RunError if there is no such task; DataError if its data cannot be loaded, or a record cannot be a row.
    """
    records = _load_records(name, train=train, limit=limit)
    answers = {i: tuple(record["answers"]) for i, record in enumerate(records) if record.get("answers")}
    return TaskSpec(name, parse_rows(records, where=f"{name} of the hub"), HUB_TASKS[name].metric, answers)


def write_hub_rows(name: str, file: Path, *, train: bool, limit: int | None = None) -> Path:
    """Write a split's rows as JSON lines, e.g. for `recall learn --train`. Raises as `load_hub_task` does."""
    records = _load_records(name, train=train, limit=limit)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return file


def _load_records(name: str, *, train: bool, limit: int | None) -> list[dict[str, Any]]:
    """A split's records, converted."""
    import datasets
    from jinja2 import TemplateError

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
    convert, converted = _converter(task), []
    for number, record in enumerate(records, start=1):
        try:
            converted.append(convert(record))
        except (KeyError, TypeError, ValueError, AttributeError, TemplateError) as error:
            what, where = f"this record cannot be a row: {error}", f"{name} of the hub, row {number}"
            raise DataError(what, where=where, fix="read a split that has labels") from error
    return converted


def _converter(task: HubTask) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function: record -> prompt, which ends without a space; completion, which begins with one; and choices or further right answers."""
    from jinja2 import Environment, StrictUndefined

    environment: Any = Environment(undefined=StrictUndefined)
    template = environment.from_string(task.prompt)
    options, answers, right = (
        environment.compile_expression(text or "none", undefined_to_none=False) for text in (task.options, task.answers, task.right)
    )

    def convert(record: Mapping[str, Any]) -> dict[str, Any]:
        lettered = zip(LETTERS, options(record), strict=True) if task.options else ()
        prompt = template.render(record, lettered="\n".join(f"{letter}. {option.strip()}" for letter, option in lettered))
        if task.answers:
            first, *further = dict.fromkeys(answer.strip() for answer in answers(record))
            return {"prompt": prompt, "completion": f" {first}", "answers": further}
        label, choices = right(record), task.choices
        if isinstance(label, str):
            if label not in choices:
                raise ValueError(f"the answer {label!r} is none of {', '.join(choices)}")
            label = choices.index(label)
        elif not isinstance(label, int) or not 0 <= label < len(choices):  # the hub's hidden labels are -1
            raise ValueError(f"the label is {label!r}; it must be one of 0 to {len(choices) - 1}")
        return {"prompt": prompt, "completion": f" {choices[label]}", "choices": [f" {choice}" for choice in choices]}

    return convert
